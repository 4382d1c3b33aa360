"""
Fuzz what reads files of others with coverage as the guide. Needs `pip install atheris`, which no test does.

    python recipes/studies/fuzz.py report -max_total_time=300
    python recipes/studies/fuzz.py state -max_total_time=300
    python recipes/studies/fuzz.py conversation -max_total_time=300

`report` feeds bytes to a run folder, `state` to the callbacks' state in a checkpoint, `conversation` JSON to the reader
of dataset rows. What is no clear error of ours is a finding, and its input is written to `crash-...`.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["trl_grpo_ext.observe.report", "trl_grpo_ext.rollouts", "trl_grpo_ext.host.checkpoints"]
):
    from trl_grpo_ext.host.checkpoints import CheckpointError, load_tensors
    from trl_grpo_ext.observe.report import NotARunError, read_run
    from trl_grpo_ext.observe.report.figures import axes_of, panels_of
    from trl_grpo_ext.observe.report.page import page_data, render
    from trl_grpo_ext.rollouts.dialogue import read_turns

FOLDER = Path(tempfile.mkdtemp())


def report(data: bytes) -> None:
    """Three files, separated by a byte that is in none of them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "monitor").mkdir(parents=True)
    names = ("metrics.jsonl", "run.json", "alarms.jsonl")
    for name, part in zip(names, data.split(b"\xff", 2), strict=False):
        (FOLDER / "monitor" / name).write_bytes(part)
    with contextlib.suppress(NotARunError):
        runs = [read_run(FOLDER)]
        render(page_data(runs, axes_of(runs), panels_of(runs), 10)).encode()


def state(data: bytes) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "state.pt").write_bytes(data)
    with contextlib.suppress(CheckpointError):
        load_tensors(FOLDER / "state.pt")


def conversation(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):  # of the JSON parser too
        row = json.loads(data)
        if isinstance(row, dict):
            read_turns(row)


if __name__ == "__main__":
    target = {"report": report, "state": state, "conversation": conversation}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
