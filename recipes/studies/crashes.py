"""
Kill a training at random moments, resume it, and compare what comes out with the run that was never interrupted.

    python recipes/studies/crashes.py            # 60 kills
    python recipes/studies/crashes.py --kills 4  # only to see that it runs

A tiny model trains with adaptive groups, a curriculum, dynamic sampling and the monitor, and saves every step, in the
middle of a generation batch too. Kills (SIGKILL) are aimed at generating, scoring, updating and saving in turn, at a
random moment of each. After every kill the last checkpoint must be at least the last one that was written, and each
complete one the same bit by bit as that of the uninterrupted run; at the end so must weights, optimizer, callbacks and
logs be. Needs a system with `fork`, which makes a start take less than a second.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also because the training is forked

import torch
from skills import MAX_COMPLETION, as_dataset, is_right, make_examples, make_tokenizer
from transformers import HfArgumentParser, PrinterCallback
from transformers.utils import logging

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.host.checkpoints import checkpoints_in, last_complete, why_incomplete
from trl_grpo_ext.recipe.tiny import tiny_model

PHASES = {
    "_generate": "generate",
    "_calculate_rewards": "score",
    "_compute_loss": "update",
    "_save_checkpoint": "save",
}
FORK = multiprocessing.get_context("fork")


@dataclass
class Options:
    kills: int = field(default=60, metadata={"help": "Kills in all."})
    steps: int = field(default=24, metadata={"help": "Optimizer steps of a run. When one is through, another begins."})
    seed: int = field(default=0, metadata={"help": "Of the moments. The training always has the same seed."})
    output_dir: str = field(default="runs/crashes", metadata={"help": "Where the runs and the table go."})


def train(folder: str, steps: int, limit: int | None, pipe: Any) -> None:
    """One life of a training: from the last complete checkpoint, if there is one, to the end."""
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    trainer = AdaptiveGRPOTrainer(
        model=tiny_model(tokenizer, seed=0),
        reward_funcs=[is_right, vowels],
        args=AdaptiveGRPOConfig(
            output_dir=folder,
            group_size="variance",
            curriculum="online",
            dynamic_sampling_rounds=1,
            monitor=True,
            num_iterations=2,
            steps_per_generation=2,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=MAX_COMPLETION,
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=limit,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=as_dataset(make_examples({"greet": 32, "translate": 32}, seed=0)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    for method, phase in PHASES.items():
        setattr(trainer, method, told(getattr(trainer, method), phase, trainer, pipe))
    found, _ = last_complete(folder)
    trainer.train(resume_from_checkpoint=found is not None)
    states = [callback.state_dict() for callback in trainer.grpo_callbacks]
    logs = [
        {k: v for k, v in entry.items() if "time" not in k} for entry in trainer.state.log_history if "loss" in entry
    ]
    record = [json.loads(line) for line in Path(folder, "monitor", "metrics.jsonl").read_text().splitlines()]
    result = {
        "weights": fingerprint(dict(trainer.model.named_parameters())),
        "optimizer": fingerprint(trainer.optimizer.state_dict()),
        "callbacks": fingerprint(states),
        "logs": logs,
        "record": [{k: v for k, v in line.items() if "time" not in k} for line in record if "loss" in line],
    }
    Path(folder, "result.json").write_text(json.dumps(result))


def vowels(completions: list[str], **kwargs: Any) -> list[float]:
    time.sleep(0.03)  # as long as other phases, so that it can be hit
    return [sum(letter in "aeiou" for letter in text) / 4 for text in completions]


def told(method: Any, phase: str, trainer: Any, pipe: Any) -> Any:
    """The method, which says when it begins and ends."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pipe.send((phase, trainer.state.global_step))
        try:
            return method(*args, **kwargs)
        finally:
            pipe.send((f"after {phase}", trainer.state.global_step))

    return wrapped


def fingerprint(value: Any) -> str:
    """A hash of tensors and plain data, bit by bit, but for the times in it."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted((key for key in part if "time" not in str(key)), key=str):
                digest.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.detach().numpy().tobytes())
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def contents(checkpoint: Path) -> dict[str, str]:
    """What training goes on from, file by file. `trainer_state.json` holds times."""
    names = ["optimizer.pt", "scheduler.pt", "rng_state.pth", *(path.name for path in checkpoint.glob("grpo_*.pt"))]
    found = {name: fingerprint(torch.load(checkpoint / name, weights_only=name != "rng_state.pth")) for name in names}
    return found | {"model": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()}


def live(
    folder: Path, options: Options, limit: int | None, aim: tuple[str, int, float] | None
) -> tuple[str, list[tuple[str, int, float]]]:
    """
    One life of the training, in a process of its own. `aim` is a phase, how often it has begun, and seconds after that.

    Returns:
        The phase in which it was killed, or `"finished"`, and what it told, with times.
    """
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train, args=(str(folder), options.steps, limit, theirs))
    process.start()
    theirs.close()
    heard: list[tuple[str, int, float]] = []
    left = -1 if aim is None else aim[1]
    while True:
        try:
            heard.append((*ours.recv(), time.perf_counter()))
        except EOFError:
            break
        if aim is not None and heard[-1][0] == aim[0]:
            left -= 1
            if left == 0:
                time.sleep(aim[2])
                process.kill()
    process.join()
    if process.exitcode == 0:
        return "finished", heard
    assert process.exitcode == -9, f"the training ended by itself: exit code {process.exitcode}"
    phase = heard[-1][0]
    return phase if phase in PHASES.values() else "between", heard


def main(options: Options) -> dict[str, Any]:
    root, rng = Path(options.output_dir), random.Random(options.seed)
    root.mkdir(parents=True, exist_ok=True)
    own = [path for path in root.iterdir() if path.name in ("whole", "table.json") or path.name.startswith("run-")]
    others = sorted({path.name for path in root.iterdir()} - {path.name for path in own})
    if others:
        raise SystemExit(f"{root} holds more than an earlier table of this script ({others[0]}): name another folder")
    shutil.rmtree(root)
    root.mkdir()
    outcome, heard = live(root / "whole", options, None, None)
    assert outcome == "finished"
    expected = json.loads((root / "whole" / "result.json").read_text())
    seconds = durations(heard)
    right = {path.name: contents(path) for path in checkpoints_in(root / "whole")}
    killed: Counter[str] = Counter()
    found: Counter[str] = Counter()
    while sum(killed.values()) < options.kills:
        folder = root / f"run-{found['runs']}"
        found["runs"] += 1
        outcome = "killed"
        while outcome != "finished":
            phase = list(PHASES.values())[sum(killed.values()) % len(PHASES)]
            times = rng.randint(1, 4)
            aim = (phase, times, rng.uniform(0, seconds[phase]))
            is_last = sum(killed.values()) >= options.kills
            outcome, heard = live(folder, options, 2, None if is_last else aim)
            if outcome != "finished":
                killed[outcome] += 1
            check(folder, heard, right, found)
        result = json.loads((folder / "result.json").read_text())
        differs = [name for name in expected if result[name] != expected[name]]
        assert not differs, f"{folder} differs from the run that was never interrupted: {differs}"
        shutil.rmtree(folder)
    table = {"kills": sum(killed.values()), "killed in": dict(killed), **found, "differing runs": 0}
    print(json.dumps(table, indent=2))
    (root / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


def durations(heard: list[tuple[str, int, float]]) -> dict[str, float]:
    """The longest time that each phase took."""
    found: dict[str, float] = {}
    for (phase, _, start), (_, _, end) in itertools.pairwise(heard):
        found[phase] = max(found.get(phase, 0.0), end - start)
    return found


def check(
    folder: Path, heard: list[tuple[str, int, float]], right: dict[str, dict[str, str]], found: Counter[str]
) -> None:
    """The last checkpoint is as new as what was written, and what the uninterrupted run wrote."""
    saved = max([step for phase, step, _ in heard if phase == "after save"], default=0)
    last, skipped = last_complete(folder)
    found["half-written checkpoints passed over"] += len(skipped)
    assert (0 if last is None else int(last.name.split("-")[1])) >= saved, f"{folder} lost checkpoint {saved}"
    for checkpoint in checkpoints_in(folder):
        if why_incomplete(checkpoint) is None and checkpoint.name in right:
            found["checkpoints compared bit by bit"] += 1
            assert contents(checkpoint) == right[checkpoint.name], f"{checkpoint} differs"


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
