"""
Sharpening or learning? What a policy could do before, and after training by stock GRPO and by `efficient.yaml`.

    python recipes/studies/sharpening.py

On the tiny task of `compare.py`, mixed pool, the chance that a sample answers a held-out prompt right is known exactly.
So `pass@1`, `pass@16`, and the prompts that the policy hardly ever answered right before are too. Entropy is that of
the next token along the answer. Each training is a cell: started again, the study goes on where it stopped.
"""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from comparison.cells import Cells
from comparison.methods import METHODS, STOCK, train
from comparison.tiny import TinyTask
from metering import spread
from transformers import PreTrainedModel

HARD = 0.05  # chance of a right answer below which a prompt was hardly ever right: one in twenty
RATES = {STOCK: 1e-3, "efficient": 1e-3}  # the learning rates that docs/measured/efficient.md chose


class Sharpened(TinyTask):
    """The task, which also says what it takes to tell sharpening from learning."""

    def final(self, model: PreTrainedModel, num_samples: int = 4) -> dict[str, Any]:
        right, entropy = self.chances(model)
        return {"right": right.tolist(), "entropy": entropy}

    def held_out_reward(self, model: PreTrainedModel) -> float:
        return float("nan")


def work(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    task = Sharpened(cell["seed"], folder, cell["pool_size"], cell["held_out"], cell["warm_start"])
    return train(task, cell, str(folder / "trainer")) | {"start": task.final(task.policy())}


def summary(start: list[float], right: list[float], entropy: float) -> dict[str, float]:
    """
    What is told of one policy, given the chances of the policy before.

    ```python
    >>> summary([0.0, 0.5], [0.5, 1.0], entropy=0.1)
    {'pass@1': 0.75, 'pass@16': 1.0, 'hard': 0.5, 'entropy': 0.1}

    ```
    """
    before, now = torch.tensor(start), torch.tensor(right)
    was_hard = before < HARD
    return {
        "pass@1": round(now.mean().item(), 4),
        "pass@16": round((1 - (1 - now) ** 16).mean().item(), 4),
        "hard": round(now[was_hard].mean().item(), 4) if was_hard.any() else float("nan"),
        "entropy": entropy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 10, 11, ...")
    parser.add_argument("--rollouts", type=int, default=3840, help="budget of a run, in completions")
    parser.add_argument("--output_dir", default="runs/sharpening", help="where the cells go")
    parser.add_argument("--smoke", action="store_true", help="one seed, two steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rollouts = 1, 128
    folder = Path(options.output_dir)
    shared = {"pool": "mixed", "rows": 64, "num_generations": 8, "pool_size": 256, "held_out": 256, "eval_every": 640}
    shared |= {"rollouts": options.rollouts, "warm_start": 10 if options.smoke else 350}
    cells = [
        {"method": method, "seed": seed, "learning_rate": rate, "options": METHODS[method].options, **shared}
        for seed in range(10, 10 + options.seeds)
        for method, rate in RATES.items()
    ]
    records = Cells(folder / "cells", functools.partial(work, folder=folder), 1).run(cells)
    told: dict[str, list[dict[str, float]]] = {}
    for record in records:
        start, final = record["result"]["start"], record["result"]["final"]
        told.setdefault("before", []).append(summary(start["right"], start["right"], start["entropy"]))
        told.setdefault(record["cell"]["method"], []).append(summary(start["right"], final["right"], final["entropy"]))
    print(f"| | pass@1 | pass@16 | right on prompts below {HARD} before | entropy |\n| --- | --- | --- | --- | --- |")
    for method, rows in told.items():
        cells_of_row = [spread([row[name] for row in rows], 3) for name in ("pass@1", "pass@16", "hard", "entropy")]
        print(f"| {method} | " + " | ".join(cells_of_row) + " |")


if __name__ == "__main__":
    main()
