"""
PPO, DPO, RLOO, stock GRPO and this package at one budget of sampled completions.

    accelerate launch recipes/studies/compare.py            # the tiny task of configs/compare.yaml
    accelerate launch recipes/studies/compare.py --smoke    # only to see that it runs
    accelerate launch recipes/studies/compare.py --config recipes/studies/configs/compare_smollm2.yaml

Every method starts from the same weights and trains on the same prompts and the same reward, helpfulness + 0.5 *
harmlessness - a little for each token, until it has sampled as many completions as the others; each is counted in the
reward function, through which all of them pass. Where there are several learning rates, each method takes the one that
does best on seeds that are not in the table: the mean of its held-out helpfulness over the run is largest. The grid is
continued where the best one is at its end. Every
training is a cell with a file of its own in `output_dir/cells`: started again, the comparison goes on where it stopped.
Writes `results.csv`, `table.md`, `tuning.md` and plots to `output_dir`. Measured results: docs/measured/comparison.md.
"""

import functools
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model is too small for a second thread to help
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # every cell is a fork

from comparison import results
from comparison.cells import Cells
from comparison.drop import DropTask
from comparison.methods import METHODS, STOCK, train
from comparison.smollm2 import AnswerTask, HelpfulTask, SmolTask
from comparison.tiny import POOLS, TinyTask

from trl_grpo_ext.recipe.flags import FlagParser, config_of

TASKS = ("tiny", "drop", "smollm2", "helpful", "arithmetic", "reasoning")


@dataclass
class Options:
    task: str = field(default="tiny", metadata={"help": f"One of {', '.join(TASKS)}."})
    seeds: int = field(default=5, metadata={"help": "Number of seeds: first_seed, first_seed + 1, ..."})
    first_seed: int = field(default=0, metadata={"help": "First seed of the tables."})
    methods: list[str] = field(default_factory=lambda: [STOCK], metadata={"help": f"Of {', '.join(METHODS)}."})
    pools: list[str] = field(default_factory=lambda: list(POOLS), metadata={"help": "Which pools of prompts."})
    rollouts: int = field(default=3840, metadata={"help": "Budget of one run, in sampled completions."})
    dpo_budgets: list[int] = field(default_factory=list, metadata={"help": "Smaller budgets of DPO, for its curve."})
    rows: int = field(default=64, metadata={"help": "Completions per step."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt (PPO: 1), or their mean."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-3], metadata={"help": "Grid for each method."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Of the learning rate, as TRL names it."})
    tuning_seeds: list[int] = field(default_factory=lambda: [100, 101], metadata={"help": "Seeds of the grid."})
    pool_size: int = field(default=256, metadata={"help": "Prompts of a pool of the tiny task."})
    held_out: int = field(default=256, metadata={"help": "Held-out prompts of the tiny task."})
    warm_start: int = field(default=350, metadata={"help": "Supervised steps of the tiny task."})
    start: float = field(default=0.6, metadata={"help": "Held-out helpfulness to count from."})
    target: float = field(default=0.8, metadata={"help": "Held-out helpfulness to count up to."})
    further: float = field(default=0.9, metadata={"help": "One more to count up to."})
    eval_every: int = field(default=128, metadata={"help": "Rollouts between two evaluations of the tiny task."})
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM beside the training, not DPO and RLOO."})
    workers: int = field(default=1, metadata={"help": "Trainings at a time, each on one thread."})
    output_dir: str = field(default="runs/compare", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "One seed, one pool and a budget of 2 steps."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods names {unknown[0]!r}: use some of {', '.join(METHODS)}")
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown: use one of {', '.join(map(repr, TASKS))}")
        if self.use_vllm and self.task in ("tiny", "drop"):
            raise ValueError(f"use_vllm=True needs a model whose heads vLLM knows: use another task than {self.task!r}")
        if self.use_vllm and {"DPO", "RLOO"} & set(self.methods):
            raise ValueError("use_vllm=True is not for DPO and RLOO, which sample without it here: leave them out")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} runs nothing: use at least 1")
        if self.smoke:
            self.seeds, self.pools, self.rollouts, self.warm_start = 1, self.pools[:1], 2 * self.rows, 10
            self.learning_rates, self.dpo_budgets, self.eval_every = self.learning_rates[:1], [self.rows], self.rows
            self.output_dir = str(Path(self.output_dir) / "smoke")  # no part of the tables


def make_task(options: Options, seed: int) -> TinyTask | SmolTask:
    if options.task == "smollm2":
        return SmolTask()
    if options.task == "helpful":
        return HelpfulTask()
    if options.task in ("arithmetic", "reasoning"):
        return AnswerTask(options.task, Path(options.output_dir))
    kind: type[TinyTask] = DropTask if options.task == "drop" else TinyTask
    return kind(seed, Path(options.output_dir), options.pool_size, options.held_out, options.warm_start)


def work(cell: dict[str, Any], options: Options) -> dict[str, Any]:
    return train(make_task(options, cell["seed"]), cell, f"{options.output_dir}/trainer")


def make_cell(
    options: Options, method: str, pool: str, seed: int, learning_rate: float, rollouts: int | None = None
) -> dict[str, Any]:
    """All settings that a result depends on."""
    names = ("task", "rows", "num_generations", "pool_size", "held_out", "warm_start", "eval_every")
    cell = {"method": method, "pool": pool, "seed": seed, "learning_rate": learning_rate}
    cell["rollouts"] = options.rollouts if rollouts is None else rollouts
    if options.use_vllm:
        cell["use_vllm"] = True
    if options.lr_scheduler_type != "constant":
        cell["lr_scheduler_type"] = options.lr_scheduler_type
    return cell | {name: getattr(options, name) for name in names} | {"options": METHODS[method].options}


def tune(options: Options, cells: Cells, method: str) -> tuple[float, dict[float, float]]:
    """The learning rate whose held-out helpfulness, averaged over run and tuning seeds, is largest; and all of them."""
    tuned = METHODS[method].tuned_as or method
    scores: dict[float, float] = {}
    rates = options.learning_rates if len(options.learning_rates) > 1 else []
    while rates:
        for rate in rates:
            grid = [make_cell(options, tuned, options.pools[0], seed, rate) for seed in options.tuning_seeds]
            scores[rate] = mean(results.score(record) for record in cells.run(grid))
        best = max(scores, key=scores.__getitem__)
        # The best of a grid says little while it is the last one at an end of it.
        rates = [best / 3] if best == min(scores) else [best * 3] if best == max(scores) else []
    return max(scores, key=scores.__getitem__, default=options.learning_rates[0]), scores


def main(options: Options) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("compare.py trains each cell on one process: launch it with --num_processes 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that trainings under way end with this process
    folder = Path(options.output_dir)
    cells = Cells(folder / "cells", functools.partial(work, options=options), options.workers)
    grid = {method: tune(options, cells, method) for method in options.methods}
    trainings = [
        make_cell(options, method, pool, seed, grid[method][0], rollouts)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for pool in options.pools
        for method in options.methods
        for rollouts in [*(options.dpo_budgets if method == "DPO" else []), options.rollouts]
    ]
    records = cells.run(trainings, lambda record: print(results.line_of(record), flush=True))
    results.write(records, grid, folder, (options.start, options.target, options.further))
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    main(*FlagParser((Options,), config_of(__file__)).parse())
