"""
Train a model on sums whose answers can be verified.

    accelerate launch recipes/arithmetic.py

trains SmolLM2-135M-Instruct with LoRA on generated sums, from one-digit ones to those with a carry, and compares its
answers to held-out sums before and after. Everything is set in `recipes/configs/arithmetic.yaml`. An answer is right
if `math-verify` finds it equal to the reference, so `12`, `$12$` and `The answer is 12.` are all right. With a hub and
a GPU, the same script trains on GSM8K:

    accelerate launch recipes/arithmetic.py --dataset_name openai/gsm8k \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 64 \\
        --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has columns `prompt`, `reference` (a number, or anything else that `math-verify` reads) and what the
curriculum needs.
"""

import functools
import random
import threading
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Number
from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, parse_arguments, train_and_compare
from trl_grpo_ext.rewards import Finished, Length, Reward, as_reward
from trl_grpo_ext.rewards.text import text_of

EXTRACTORS = (LatexExtractionConfig(), ExprExtractionConfig())
# Smallest and largest first and second term of each level.
LEVELS = {"easy": (1, 5, 1, 4), "medium": (1, 9, 1, 9), "hard": (10, 49, 1, 9)}


@dataclass
class ArithmeticArguments(DataArguments):
    dataset_name: str = field(
        default="generated", metadata={"help": "'generated', a local file or folder, or a dataset on the hub."}
    )
    brevity_weight: float = field(default=0.01, metadata={"help": "What a token costs; a right answer is worth 1."})
    finished_weight: float = field(default=0.2, metadata={"help": "What it is worth that an answer ends by itself."})


def make_sums(seed: int = 0, held_out_share: float = 0.2) -> dict[str, Dataset]:
    """Distinct sums of three levels, 20 easy ones, 61 medium ones and 81 hard ones; the same for the same seed."""
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    known: set[tuple[int, int]] = set()
    for level, (low, high, low2, high2) in LEVELS.items():
        pairs = [(a, b) for a in range(low, high + 1) for b in range(low2, high2 + 1) if (a, b) not in known]
        known.update(pairs)
        pairs = rng.sample(pairs, min(len(pairs), 81))
        for number, (a, b) in enumerate(pairs):
            prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]
            row = {"prompt": prompt, "reference": str(a + b), "difficulty": level}
            splits["test" if number < held_out_share * len(pairs) else "train"].append(row)
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


@functools.lru_cache(maxsize=10_000)
def read_answer(text: str) -> tuple[Any, ...]:
    """What `math-verify` reads in a text: of an equation the right side, of several numbers the last."""
    return tuple(parse(text, extraction_config=EXTRACTORS, parsing_timeout=time_limit()))


def time_limit() -> int | None:
    # It is kept with a signal, which only the main thread can receive.
    return 5 if threading.current_thread() is threading.main_thread() else None


def correct(completions: list[Any], reference: list[Any], **kwargs: Any) -> list[float | None]:
    """1 for an answer equal to the reference, else 0; `None` where the reference cannot be read."""
    values: list[float | None] = []
    for completion, gold in zip(completions, reference, strict=True):
        expected, found = list(read_answer(str(gold))), list(read_answer(text_of(completion)))
        # To `math-verify`, "7 + 5" equals 12, so repeating the question would be right.
        unsolved = expected and found and isinstance(expected[0], Number) and not isinstance(found[0], Number)
        right = not unsolved and verify(expected, found, timeout_seconds=time_limit())
        values.append(float(right) if expected else None)
    return values


def reward_of(script_args: ArithmeticArguments, max_completion_length: int) -> Reward:
    finished = script_args.finished_weight * Finished(max_completion_length)
    return 1.0 * as_reward(correct) + finished - script_args.brevity_weight * Length()


def main(script_args: ArithmeticArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    generated = script_args.dataset_name == "generated"
    prompts = make_sums() if generated else script_args.load(columns=("reference",))
    readable = [read_answer(str(gold)) for gold in prompts["test"]["reference"]]
    if not any(readable):
        raise ValueError(
            f"math-verify reads none of the references of {script_args.dataset_name!r}, such as "
            f"{prompts['test'][0]['reference']!r:.80}: write numbers or LaTeX, such as '12' or '$\\frac{{1}}{{2}}$'"
        )
    reward = reward_of(script_args, training_args.max_completion_length)
    train_and_compare(prompts, reward, training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(ArithmeticArguments, __file__))
