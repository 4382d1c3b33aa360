"""
In whose code the time of a step of a small model goes: this package's, TRL's, transformers' or torch's.

    python recipes/studies/shares.py

takes steps of `compute.py` with a model of 6 layers of width 256, where the machine computes little and Python much.
It prints the processor time of a step against stock TRL, and, from a profile, the share of each package. An operation
of torch counts for the package whose code calls it; `torch` is what torch's own Python does, the backward pass and the
optimizer included.
"""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
import warnings
from collections import Counter
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that processor time is time

from compute import make_trainer, step
from metering import spread
from transformers.utils import logging
from trl import GRPOTrainer

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}
SMALL = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
PACKAGES = ("trl_grpo_ext", "trl", "transformers", "peft", "accelerate", "torch")


def owner(file: str) -> str:
    """The package that a file belongs to."""
    parts = file.split(os.sep)
    return next((name for name in PACKAGES if name in parts), "other")


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """The share of the time that each package spends, in its own Python and in what it calls of C++."""
    spent: Counter[str] = Counter()
    functions: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, _), (_, _, own, _, callers) in functions.items():
        if file != "~":
            spent[owner(file)] += own
            continue
        for (caller, _, _), (_, _, called, _) in callers.items():  # a built-in function: who called it?
            spent[owner(caller)] += called
    whole = sum(spent.values())
    return {name: value / whole for name, value in spent.most_common()}


def profiled(trainer: GRPOTrainer, steps: int) -> dict[str, float]:
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(steps):
        step(trainer)
    profile.disable()
    return shares(profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of each")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one workload")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    for workload in ("prompt 64",) if options.smoke else ("prompt 64", "prompt 256"):
        with tempfile.TemporaryDirectory() as folder:
            shape = SMALL if options.smoke else SHAPE
            trainers = {name: make_trainer(name, workload, shape, folder) for name in ("stock", "on")}
            times: dict[str, list[float]] = {name: [] for name in trainers}
            for trainer in trainers.values():
                step(trainer)  # warm up
            for _ in range(options.steps):
                for name, trainer in trainers.items():
                    start = time.process_time()
                    step(trainer)
                    times[name].append(time.process_time() - start)
            ratios = [ours / stock for ours, stock in zip(times["on"], times["stock"], strict=True)]
            print(f"{workload}: {spread(ratios, 2)} of stock's processor time")
            for name, trainer in trainers.items():
                told = [f"{package} {share:.1%}" for package, share in profiled(trainer, options.steps).items()]
                print(f"{workload}, {name}: {median(times[name]):.2f} s a step: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
