"""
What does planning cost? One generation batch over a pool of a million prompts, with the state that it needs.

    python recipes/studies/planning.py

Plans with the online curriculum and variance sizes, takes in made-up rewards, and plans again, as a run does. Prints
the median and the range of the milliseconds per plan, and the megabytes of state that a checkpoint holds.
"""

import time
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import HfArgumentParser, TrainerControl, TrainerState

from trl_grpo_ext import AdaptiveGRPOConfig, OnlineCurriculumCallback, VarianceGroupSizeCallback
from trl_grpo_ext.plan.planner import Planner


@dataclass
class Options:
    prompts: int = field(default=1_000_000, metadata={"help": "Size of the pool."})
    rows: int = field(default=512, metadata={"help": "Rows per generation batch."})
    batches: int = field(default=30, metadata={"help": "Number of plans that are timed, after one that is not."})


def main(options: Options) -> None:
    args = AdaptiveGRPOConfig(
        output_dir="runs/planning", per_device_train_batch_size=options.rows, use_cpu=True, bf16=False
    )
    dataset = Dataset.from_dict({"prompt": [""] * options.prompts})
    callbacks = [VarianceGroupSizeCallback(), OnlineCurriculumCallback()]
    trainer: Any = SimpleNamespace(train_dataset=dataset)
    for callback in callbacks:
        callback.on_setup(args=args, state=TrainerState(), control=TrainerControl(), trainer=trainer)
    planner = Planner(args, dataset)
    milliseconds = []
    for _ in range(options.batches + 1):
        start = time.perf_counter()
        plan = planner.plan(callbacks, TrainerState(), TrainerControl())
        milliseconds.append(1000 * (time.perf_counter() - start))
        assert plan.group_sizes.sum() == options.rows
        count = plan.group_sizes.numel()
        for callback in callbacks:
            callback.posterior.update(plan.prompt_index, torch.rand(count), torch.rand(count), plan.group_sizes)
    tensors = [value for c in callbacks for value in c.state_dict().values() if isinstance(value, torch.Tensor)]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    timed = milliseconds[1:]
    print(f"{options.prompts:,} prompts, {options.rows} rows, {torch.get_num_threads()} threads")
    print(f"plan:  median {median(timed):.1f} ms, {min(timed):.1f} to {max(timed):.1f} (first {milliseconds[0]:.1f})")
    print(f"state: {megabytes:.1f} MB")


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
