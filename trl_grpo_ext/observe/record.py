"""The record of a run: `run.json`, `metrics.jsonl` and `alarms.jsonl` in one folder. Who writes it, and who reads it.

A record may be of a run that is going on, that was killed in the middle of a line, or that somebody else sent. So what
is read is bounded in size and depth, comes from ordinary files of the folder, and is never trusted to be well formed.
"""

import contextlib
import functools
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Container, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, TypeGuard

from ..host.checkpoints import write_whole
from .alarms import Event
from .secrets import finite

logger = logging.getLogger(__name__)

FOLDER = "monitor"  # of `output_dir`
RUN, METRICS, ALARMS = "run.json", "metrics.jsonl", "alarms.jsonl"
HELD_OUT = "held_out.jsonl"  # beside that folder
MAX_LINE = 2**20  # characters of a line, of which a log takes a few thousand
MAX_FILE = 2**28  # bytes of a file that is read as a whole
MAX_DEPTH = 40  # of lists and dictionaries in each other
MAX_STEP = 2**53  # what a float counts exactly
MAX_TEXT = 2000  # characters of a text in an alarm


class Record:
    """Files with one object a line. A line that cannot be written costs the record, and not the run."""

    def __init__(self) -> None:
        self._cut: set[Path] = set()  # files whose last line may be half written
        self._has_warned = False

    def _keep(self, path: Path, step: int, steps: Container[int] | None = None) -> None:
        """Leave in a file what it holds up to `step`, of those `steps` alone; nothing at step 0."""
        entries = entries_of(path, path.parent) if step > 0 else ()
        kept = (e for e in entries if e["step"] <= step and (steps is None or e["step"] in steps))
        lines = (f"{json.dumps(entry)}\n".encode() for entry in kept)
        write_whole(path, functools.partial(_write_lines, lines))

    def _append(self, path: Path, *entries: dict[str, Any]) -> None:
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        with self._going_on(path):
            with open(path, "a", encoding="utf-8", opener=_open_no_link) as file:
                file.write(f"\n{lines}" if path in self._cut else lines)
            self._cut.discard(path)

    @contextlib.contextmanager
    def _going_on(self, path: Path) -> Iterator[None]:
        """A disk that is full, or a file system that is gone for a while, costs lines of the record and not the run."""
        try:
            yield
        except OSError as error:
            self._cut.add(path)
            if not self._has_warned:
                self._has_warned = True
                logger.warning(f"{path} could not be written ({error}): training goes on, and the record has a gap")


class RunRecord(Record):
    """
    The record of a run: `run.json`, `metrics.jsonl` and `alarms.jsonl` in one folder.

    Args:
        folder (`Path`):
            Where the files go.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.run, self.metrics, self.alarms = (folder / name for name in (RUN, METRICS, ALARMS))

    def start(self, description: dict[str, Any], step: int) -> None:
        """Start anew at step 0. At a later one, go on with the record that is there, as it was at that step."""
        folder = self.run.parent
        if folder.is_symlink():
            raise OSError(f"{folder} is a link, and the record would go where it leads: delete it")
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics, self.alarms):
            self._keep(path, step)
        started: dict[str, Any] = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if step > 0:
            before = self._described()
            resumed = before.get("resumed_at_steps")
            started["started"] = before.get("started", started["started"])
            started["resumed_at_steps"] = [*(resumed if isinstance(resumed, list) else []), step]
        _replace(self.run, json.dumps({**started, **description, "status": "running"}, indent=2) + "\n")

    def update(self, **changes: Any) -> None:
        with self._going_on(self.run):
            _replace(self.run, json.dumps({**self._described(), **changes}, indent=2) + "\n")

    def _described(self) -> dict[str, Any]:
        """What `run.json` holds; nothing where it is missing or damaged."""
        try:
            description = read_whole(self.run.parent, self.run)
        except (OSError, ValueError):
            return {}
        return description if isinstance(description, dict) else {}

    def log(self, step: int, logs: dict[str, Any], events: list[tuple[Event, str | None]]) -> None:
        """Append the metrics of a training step or an evaluation, and the alarms that came with them."""
        now = time.time()
        if "loss" in logs or any(name.startswith("eval_") for name in logs):
            numbers = {name: finite(value) for name, value in logs.items() if isinstance(value, int | float | None)}
            self._append(self.metrics, {"step": step, "epoch": logs.get("epoch"), "time": now} | numbers)
        for event, action in events:
            entry = {"step": step, "time": now, "name": event.alarm.name, "state": event.state}
            entry |= {"evidence": event.evidence, "cause": event.alarm.cause, "remedy": event.alarm.remedy}
            self._append(self.alarms, entry | {"action": action})


class HeldOutRecord(Record):
    """
    What was answered to held-out prompts: [`HELD_OUT`] in the folder of a run, a line for each answer.

    Args:
        folder (`Path`):
            `output_dir` of the run.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / HELD_OUT
        self._written: set[tuple[int, str]] = set()  # evaluations by step and dataset

    def start(self, step: int, evaluated: list[int]) -> None:
        """Start anew at step 0. At a later one, go on with the evaluations that the run knows of."""
        with self._going_on(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep(self.path, step, evaluated)
            entries = entries_of(self.path, self.path.parent)
            self._written = {(entry["step"], str(entry.get("dataset", ""))) for entry in entries}

    def log(self, step: int, dataset: str, answers: Iterable[dict[str, Any]]) -> None:
        """Append the answers of an evaluation, unless there is one of this step."""
        if (step, dataset) in self._written:
            return
        self._written.add((step, dataset))
        named = {"dataset": dataset} if dataset else {}
        self._append(self.path, *({"step": step, **named, **answer} for answer in answers))

    def keep(self, step: int, kept: int) -> None:
        """Say that at the end, in `step`, the weights of step `kept` were restored."""
        self._append(self.path, {"step": step, "kept": kept})


def is_own_file(folder: Path, path: Path) -> bool:
    """Whether `path` is an ordinary file that no link leads out of `folder`: no secret, no device, nothing endless."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(folder.resolve()) and stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError):
        return False


def _parse(text: str) -> Any:
    """The value that JSON stands for. Raises `ValueError` for what is none, or nested beyond reason."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level, depth = [value], 0
    while level := [part for item in level for part in _parts(item)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return value


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def read_whole(folder: Path, path: Path) -> Any:
    if not is_own_file(folder, path) or path.stat().st_size > MAX_FILE:
        raise OSError(f"{path} is no file of this folder, or too large")
    return _parse(path.read_text(encoding="utf-8", errors="replace"))


def read_lines(path: Path, folder: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file with one per line; `None` for a line that is broken (a last, half-written one aside)."""
    if not is_own_file(folder, path):
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while line := file.readline(MAX_LINE):
            end = line
            while end and not end.endswith("\n"):  # too long: pass over the rest
                end = file.readline(MAX_LINE)
            if not line.strip():
                continue
            try:
                value = _parse(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            elif end:  # a last line without an end is still being written
                yield None


def entries_of(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one per line that name a step."""
    return (line for line in read_lines(path, folder) if line is not None and isinstance(line.get("step"), int))


def read_alarms(path: Path, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Raised and cleared, joined into one entry per alarm, and how many lines are broken."""
    broken = 0
    found: list[dict[str, Any]] = []
    still_open: dict[str, dict[str, Any]] = {}
    for event in read_lines(path, folder):
        if event is None:
            broken += 1
            continue
        step, name = event.get("step"), str(event.get("name"))[:MAX_TEXT]
        if not is_number(step) or not 0 <= step < MAX_STEP:
            continue
        if event.get("state") == "cleared":
            if name in still_open:
                still_open.pop(name)["cleared"] = int(step)
        elif name not in still_open:
            texts = {key: str(event.get(key) or "")[:MAX_TEXT] for key in ("evidence", "cause", "remedy", "action")}
            still_open[name] = {"step": int(step), "cleared": None, "name": name, **texts}
            found.append(still_open[name])
    return found, broken


def is_number(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def _open_no_link(path: str, flags: int) -> int:
    """Open a file unless its name is a link, which somebody else may have put there. Windows has no such flag."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _write_lines(lines: Iterable[bytes], file: IO[bytes]) -> None:
    file.writelines(lines)


def _replace(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
