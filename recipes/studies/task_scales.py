"""
Two tasks whose rewards differ in level and scale: trained together, and each alone with the same rollouts for each.

    python recipes/studies/task_scales.py            # 2 pools, 3 seeds
    python recipes/studies/task_scales.py --smoke    # only to see that it runs

The tiny model of `skills.py` is warm-started once per seed, by supervision, and half knows two ciphers. `exact` (prompt
`T abcd=`) earns 1 for the right word and 0 for any other. `graded` (prompts `G abcd=`) earns 5 for each right letter,
less 15: from -15 to 5. In the pool `two`, half of the prompts belong to each. In the pool `flat`, a third belongs to
each, and a third to `hopeless`, a task that nobody can learn. Alone, a task gets as many rollouts as its share of the
pool. What is measured is the exact probability of a right word on held-out prompts of each task. Writes `results.csv`
(a row per run, as it ends) and `table.md` to `output_dir`.
"""

import copy
import functools
import os
import random
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

import torch
from datasets import Dataset
from metering import append, read, spread
from skills import LETTERS, MAX_COMPLETION, WORD, Example, accuracy, answer_log_probs, fit, make_tokenizer
from transformers import HfArgumentParser, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.recipe.tiny import tiny_model
from trl_grpo_ext.rewards import as_reward, by_task

SHIFTS = {"exact": 13, "graded": 5}  # how far the cipher of a task moves every letter
MARKS = {"exact": "T", "graded": "G", "hopeless": "H"}
POOLS = {"two": ["exact", "graded"], "flat": ["exact", "graded", "hopeless"]}
ALONE = "alone"
BATCH = {"scale_rewards": "batch"}
BY_TASK = {**BATCH, "task_column": "task", "task_advantages": True}
MEAN = {"group_size": "single", "baseline": "batch"}
METHODS: dict[str, dict[str, Any]] = {
    ALONE: BATCH,
    "together": BATCH,
    "together, by task": BY_TASK,
    "together, scaled by group": {},
    "together, batch mean": BATCH | MEAN,
    "together, batch mean by task": BY_TASK | MEAN,
    "together, by task, adaptive": BY_TASK | {"task_mixing": "adaptive"},
}


@dataclass
class Options:
    seeds: int = field(default=3, metadata={"help": "Number of seeds: first_seed, first_seed + 1, ..."})
    first_seed: int = field(default=0, metadata={"help": "First seed of the table."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all methods, constant; as in mixed_pool.py."})
    rollouts: int = field(default=3840, metadata={"help": "Budget for each task of the pool."})
    rows: int = field(default=64, metadata={"help": "Rows per step."})
    prompts: int = field(default=128, metadata={"help": "Prompts of each task."})
    held_out: int = field(default=256, metadata={"help": "Held-out prompts of each task."})
    warm_start: int = field(default=350, metadata={"help": "Steps of supervised training."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which methods."})
    pools: list[str] = field(default_factory=lambda: list(POOLS), metadata={"help": "Which pools."})
    output_dir: str = field(default="runs/task_scales", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "One seed and a budget of 2 steps for each task."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.seeds, self.rollouts, self.warm_start = 1, 2 * self.rows, 10


def make_example(task: str, rng: random.Random, noisy: bool = False) -> Example:
    """
    One example. In a `noisy` one of a cipher some letters come out one off: `a` is right 30 % of the time, `z` 95 %.

    ```python
    >>> make_example("graded", random.Random(0))
    Example(prompt='G mynb=', answer='rdsg', skill='graded')

    ```
    """
    word = [rng.randrange(len(LETTERS)) for _ in range(WORD)]
    if task == "hopeless":  # a random word that the prompt says nothing of
        answer = [rng.randrange(len(LETTERS)) for _ in range(WORD)]
    else:
        slips = [noisy and rng.random() > 0.3 + 0.65 * i / (len(LETTERS) - 1) for i in word]
        answer = [(i + SHIFTS[task] + slip) % len(LETTERS) for i, slip in zip(word, slips, strict=True)]
    text, answer_text = ("".join(LETTERS[i] for i in part) for part in (word, answer))
    return Example(f"{MARKS[task]} {text}=", answer_text, task)


def make_examples(task: str, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Example]:
    """Distinct examples of a task whose prompts are not in `exclude`."""
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = make_example(task, rng)
        if example.prompt not in exclude:
            found.setdefault(example.prompt, example)
    return list(found.values())


def is_right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if the completion is the answer and nothing else, 0 otherwise."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def right_letters(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """How many of the answer's letters are at their place; none where there are more letters than those."""
    return [
        float(sum(x == y for x, y in zip(c, a, strict=False)) if len(c) <= len(a) else 0)
        for c, a in zip(completions, answer, strict=True)
    ]


REWARDS = {
    "exact": as_reward(is_right),
    "graded": 5.0 * as_reward(right_letters) - 15.0,
    "hopeless": as_reward(is_right),
}


def warm_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> LlamaForCausalLM:
    """Supervised training on noisy demonstrations of both ciphers, and on random words."""
    model = copy.deepcopy(model).train()

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(seed * 10_000 + step)
        counts = {"exact": 72, "graded": 72, "hopeless": 8}
        batch = [make_example(task, rng, noisy=True) for task, count in counts.items() for _ in range(count)]
        return -answer_log_probs(model, tokenizer, batch).mean()

    return fit(model, loss, steps)


def train(
    method: str,
    examples: list[Example],
    rollouts: int,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    options: Options,
) -> tuple[LlamaForCausalLM, float]:
    """The model once it is trained, and CPU seconds."""
    tasks = list(dict.fromkeys(example.skill for example in examples))
    args = AdaptiveGRPOConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=options.rows,
        num_generations=8,
        max_completion_length=MAX_COMPLETION,
        max_steps=rollouts // options.rows,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **METHODS[method],
    )
    trainer = AdaptiveGRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=by_task({task: REWARDS[task] for task in tasks}),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": e.prompt, "answer": e.answer, "task": e.skill} for e in examples]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return trainer.model, time.process_time() - start


def make_table(results: list[dict[str, str]]) -> str:
    """Markdown, a row per pool and method: medians and ranges over the seeds."""
    lines = ["| pool | method | `exact` | `graded` | mean of both |", "| --- " * 5 + "|"]
    for pool, method in dict.fromkeys((r["pool"], r["method"]) for r in results):
        rows = [r for r in results if (r["pool"], r["method"]) == (pool, method)]
        exact, graded = ([float(r[task]) for r in rows] for task in SHIFTS)
        both = [(one + other) / 2 for one, other in zip(exact, graded, strict=True)]
        lines.append(f"| {pool} | {method} | " + " | ".join(spread(v, 3) for v in (exact, graded, both)) + " |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").unlink(missing_ok=True)
    tokenizer = make_tokenizer()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        model = warm_start(tiny_model(tokenizer, seed), tokenizer, seed, options.warm_start)
        held_out = {task: make_examples(task, options.held_out, 1_000_000 + seed) for task in SHIFTS}
        exclude = frozenset(example.prompt for examples in held_out.values() for example in examples)
        examples = {task: make_examples(task, options.prompts, seed, exclude) for task in MARKS}
        look = {task: functools.partial(accuracy, tokenizer=tokenizer, examples=held_out[task]) for task in SHIFTS}
        start = {task: look[task](model) for task in SHIFTS}
        for pool in options.pools:
            append(folder / "results.csv", {"pool": pool, "method": "start", "seed": seed, **start, "seconds": 0.0})
            for method in options.methods:
                parts = [[task] for task in SHIFTS] if method == ALONE else [POOLS[pool]]
                found: dict[str, float] = {}
                seconds = 0.0
                for tasks in parts:
                    pooled = [example for task in tasks for example in examples[task]]
                    budget = len(tasks) * options.rollouts
                    trained, spent = train(method, pooled, budget, model, tokenizer, seed, options)
                    found |= {task: look[task](trained) for task in tasks if task in SHIFTS}
                    seconds += spent
                row = {"pool": pool, "method": method, "seed": seed, **found, "seconds": seconds}
                append(folder / "results.csv", row)
                told = ", ".join(f"{task} {start[task]:.3f} to {found[task]:.3f}" for task in SHIFTS)
                print(f"{pool}, {method}, seed {seed}: {told}, {seconds:.0f} s", flush=True)
    table = make_table(read(folder / "results.csv"))
    (folder / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
