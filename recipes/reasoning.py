"""
Train a model on procedural tasks of `reasoning-gym`, scored by its own verifiers.

    accelerate launch recipes/reasoning.py

trains SmolLM2-135M-Instruct with LoRA on sums and differences such as `4 - 9`, and compares its answers to held-out
ones before and after. Everything is set in `recipes/configs/reasoning.yaml`. A level turns all knobs that reasoning-gym
has for a task, and is the column `difficulty`, for a curriculum. With a GPU, the same script takes any other of its
tasks that have levels:

    accelerate launch recipes/reasoning.py --tasks spell_backward countdown mini_sudoku --num_levels 5 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 64 --num_generations 8 \\
        --max_completion_length 256 --max_steps 500
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from reasoning_gym.factory import CURRICULA, get_score_answer_fn
from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import parse_arguments, train_and_compare
from trl_grpo_ext.recipe.questions import draw_questions, final_answer
from trl_grpo_ext.rewards import Finished, Reward, as_reward
from trl_grpo_ext.rewards.text import text_of


@dataclass
class ReasoningArguments:
    tasks: list[str] = field(
        default_factory=lambda: ["chain_sum"],
        metadata={"help": "Names of reasoning-gym's tasks."},
    )
    num_levels: int = field(default=1, metadata={"help": "Levels of difficulty, from reasoning-gym's easiest."})
    train_size: int = field(default=128, metadata={"help": "Questions of each task and level to train on."})
    test_size: int = field(default=48, metadata={"help": "Held-out questions of each task and level."})
    num_examples: int = field(
        default=0, metadata={"help": "Solved questions of the task's easiest level, shown before each question."}
    )
    finished_weight: float = field(
        default=0.5, metadata={"help": "What it is worth, beyond its score, that a right answer also ends by itself."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(CURRICULA))
        if unknown or not self.tasks:
            raise ValueError(
                f"tasks={self.tasks}: {unknown} are no tasks with levels; reasoning-gym has {list(CURRICULA)}"
            )
        for name in ("num_levels", "train_size", "test_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing: pass at least 1")
        if self.num_examples < 0:
            raise ValueError(f"num_examples={self.num_examples} must be at least 0, which shows none")


def make_questions(arguments: ReasoningArguments, seed: int = 0) -> dict[str, Dataset]:
    counts = {"test": arguments.test_size, "train": arguments.train_size}
    return draw_questions(arguments.tasks, arguments.num_levels, counts, arguments.num_examples, seed)


@functools.cache
def verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    scores: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(task)
    return scores


def verified(answer: str, task: str, entry: str) -> float:
    scores, question = verifier(task), json.loads(entry)
    try:
        return scores(answer, question)
    except Exception:  # some verifiers fail at an answer that they cannot read, which is then a wrong one
        return 0.0


def score(
    completions: list[Any], task: list[str], entry: list[str], reference: list[str], **kwargs: Any
) -> list[float]:
    """reasoning-gym's score, from 0 to 1, of the final answer."""
    answers = [final_answer(text_of(answer), right) for answer, right in zip(completions, reference, strict=True)]
    return [verified(*row) for row in zip(answers, task, entry, strict=True)]


def solved_fully(completions: list[Any], **columns: Any) -> list[float]:
    return [float(value >= 1) for value in score(completions, **columns)]


def reward_of(script_args: ReasoningArguments, max_completion_length: int) -> Reward:
    # An ending alone pays nothing: the model would learn to stop before it has said anything.
    right_and_finished = as_reward(solved_fully, "right") * Finished(max_completion_length)
    return as_reward(score) + script_args.finished_weight * right_and_finished


def main(script_args: ReasoningArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    reward = reward_of(script_args, training_args.max_completion_length)
    train_and_compare(make_questions(script_args), reward, training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(ReasoningArguments, __file__))
