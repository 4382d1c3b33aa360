"""
Does it help to credit plans and implementations apart? A tree of 4 plans x 4 implementations against flat GRPO.

    python recipes/studies/trees.py            # 3 methods x 5 seeds
    python recipes/studies/trees.py --smoke    # only to see that it runs

A prompt such as `Pabc` asks to encipher a word; which of four ciphers is right depends on its mark `P`, `Q`, `R` or
`S`. The plan names a cipher and the implementation applies it, so with a wrong plan no implementation earns anything:
the plan matters. A tiny model is warm-started to name the right plan 40 % of the time and to apply the cipher of its
plan with slips, once per seed, and then trained from the same weights on the same prompts by a tree, and by flat GRPO
on conversations of plan and implementation: 16 for each prompt (as many implementations as the tree) or 10 (as many
sampled completions, since a tree has 4 + 16). Every run ends at the same number of generated tokens. Training is set
in `configs/trees.yaml`.
"""

import copy
import csv
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

import ciphers
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_grpo_ext import (
    AdaptiveGRPOConfig,
    AdaptiveGRPOTrainer,
    GRPOCallback,
    HierarchicalCallback,
    MultiTurnCallback,
    RolloutBatch,
)
from trl_grpo_ext.recipe.flags import FlagParser, config_of
from trl_grpo_ext.recipe.tiny import tiny_model

METHODS = {"tree of 4 x 4": None, "flat, 16 rollouts": 16, "flat, 10 rollouts": 10}
COLUMNS = ("right answers", "right plans", "right answers to the right plan")
TARGET = 0.75  # right answers

Measure: TypeAlias = Callable[[PreTrainedModel], tuple[float, float, float]]  # a value for each of `COLUMNS`


@dataclass
class Options:
    seeds: int = field(default=5, metadata={"help": "Number of seeds."})
    first_seed: int = field(default=0, metadata={"help": "Seed 100 was used to choose the learning rate."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which methods."})
    tokens: int = field(default=100_000, metadata={"help": "Generated tokens of a run, at which it ends."})
    prompts_per_step: int = field(default=8, metadata={"help": "Prompts of a step."})
    prompts: int = field(default=512, metadata={"help": "Prompts to train on."})
    held_out: int = field(default=512, metadata={"help": "Held-out prompts."})
    warm_start: int = field(default=1000, metadata={"help": "Steps of supervised training."})
    smoke: bool = field(default=False, metadata={"help": "One seed and two steps."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods names {unknown[0]!r}: use some of {', '.join(METHODS)}")


class Budget(GRPOCallback):
    """Ends the run when so many tokens have been generated, and measures the policy on the way."""

    def __init__(self, tokens: int, measure: Measure) -> None:
        self.tokens, self.measure = tokens, measure
        self.spent, self.completions = 0, 0
        self.curve: list[tuple[float, ...]] = []

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self.spent += int(batch.completion_lengths.sum())
        self.completions += batch.completion_lengths.numel()

    def tokens_to_target(self) -> float:
        """Generated tokens until so many answers were right, between two measurements by a straight line."""
        for (before, low, *_), (after, high, *_) in itertools.pairwise([(0, 0.0), *self.curve]):
            if low < TARGET <= high:
                return before + (after - before) * (TARGET - low) / (high - low)
        return math.inf

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        control.should_training_stop = self.spent >= self.tokens
        if control.should_training_stop or self.spent >= (len(self.curve) + 1) * self.tokens / 10:
            self.curve.append((self.spent, *self.measure(model)))


def train(
    method: str,
    tasks: list[ciphers.Task],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    measure: Measure,
    args: AdaptiveGRPOConfig,
    options: Options,
) -> Budget:
    """Train a copy of the model by one method, until the budget is spent."""
    size = METHODS[method]
    rollout = HierarchicalCallback(4, 4, ciphers.ASK_PLAN, ciphers.ASK_ANSWER)
    rows = options.prompts_per_step * (size or rollout.num_rows)
    sized: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "num_generations": size or 4,
        "generation_batch_size": None,
    }
    budget = Budget(options.tokens, measure)
    trainer = AdaptiveGRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=ciphers.is_right,
        args=replace(args, **sized),
        train_dataset=ciphers.as_dataset(tasks, turns=size is not None),
        processing_class=tokenizer,
        callbacks=[MultiTurnCallback(history="independent") if size else rollout, budget],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if not budget.curve or budget.curve[-1][0] < budget.spent:  # max_steps ended it
        budget.curve.append((budget.spent, *measure(trainer.model)))
    return budget


def main(options: Options, args: AdaptiveGRPOConfig) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.smoke:
        options.seeds, options.tokens, options.warm_start = 1, 1000, 10
    tokenizer = ciphers.make_tokenizer()
    rows: list[dict[str, Any]] = []
    finals: dict[str, list[tuple[float, ...]]] = {method: [] for method in options.methods}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        held_out = ciphers.make_tasks(options.held_out, seed, salt=1)
        exclude = frozenset(task.prompt for task in held_out)
        tasks = ciphers.make_tasks(options.prompts, seed, exclude=exclude)
        model = ciphers.warm_start(tiny_model(tokenizer, seed), tokenizer, exclude, seed, options.warm_start)
        measure = functools.partial(ciphers.accuracy, tokenizer=tokenizer, tasks=held_out)
        start, args.seed = measure(model), seed
        for method in options.methods:
            budget = train(method, tasks, model, tokenizer, measure, args, options)
            finals[method].append((*budget.curve[-1][1:], budget.tokens_to_target()))
            for tokens, *values in [(0, *start), *budget.curve]:
                cell = {"method": method, "seed": seed, "completions": budget.completions, "tokens": tokens}
                rows.append(cell | dict(zip(COLUMNS, values, strict=True)))
            print(f"seed {seed}, {method}: {start[0]:.3f} to {finals[method][-1][0]:.3f}", flush=True)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with (Path(args.output_dir) / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("method", *COLUMNS, f"tokens to {TARGET}", sep=" | ")
    for method, ends in finals.items():
        cells = zip(*ends, strict=True)
        print(method, *(f"{median(c):.4g} ({min(c):.4g} to {max(c):.4g})" for c in cells), sep=" | ")


if __name__ == "__main__":
    main(*FlagParser((Options, AdaptiveGRPOConfig), config_of(__file__)).parse())
