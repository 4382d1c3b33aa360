"""
A task that no setting was chosen on: write a word without its vowels.

It differs from the tiny task in all that the methods might be fitted to: answers have many lengths, no letter is harder
than another, half of a right answer earns something, and whole words, not letters, decide whether an answer is right.
"""

import difflib
import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import skills
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trl_grpo_ext.rewards import Length, Reward, as_reward

from .tiny import TinyTask

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
SIZE = 6  # letters of a word
DROPPED, KEPT = 0.65, 0.95  # how often a demonstration leaves out a vowel, and keeps a consonant


def is_near(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """How much of two strings is the same, from 0 to 1."""
    return [difflib.SequenceMatcher(None, c, a).ratio() for c, a in zip(completions, answer, strict=True)]


def make_example(rng: random.Random, noisy: bool = False) -> skills.Example:
    """
    A word of two vowels among six letters, and the word without them.

    ```python
    >>> make_example(random.Random(0))
    Example(prompt='D ounlhl=', answer='nlhl', skill='drop')

    ```
    """
    letters = rng.choices(VOWELS, k=2) + rng.choices(CONSONANTS, k=SIZE - 2)
    rng.shuffle(letters)
    answer = []
    for letter in letters:
        is_vowel = letter in VOWELS
        is_slip = noisy and rng.random() > (DROPPED if is_vowel else KEPT)
        if is_vowel == is_slip:
            answer.append(letter)
    return skills.Example(f"D {''.join(letters)}=", "".join(answer), "drop")


def make_examples(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[skills.Example]:
    """Distinct examples whose prompts are not in `exclude`."""
    rng = random.Random(seed)
    found: dict[str, skills.Example] = {}
    skills.collect(found, count, lambda: make_example(rng), exclude)
    return list(found.values())


@dataclass(frozen=True)
class DropTask(TinyTask):
    """One seed of the task."""

    max_completion_length: int = SIZE + 3
    helpfulness: Reward = field(default_factory=lambda: as_reward(skills.is_right).named("helpfulness"))

    @cached_property
    def reward(self) -> Reward:
        return 1.0 * self.helpfulness + 0.3 * as_reward(is_near) - 0.01 * Length()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return skills.make_tokenizer("D")

    @cached_property
    def held_out_examples(self) -> list[skills.Example]:
        return make_examples(self.held_out, seed=1_000_000 + self.seed)

    def dataset(self, pool: str) -> Dataset:
        return skills.as_dataset(make_examples(self.pool_size, self.seed, self.exclude))

    def _warm_started(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        rng = random.Random(self.seed)

        def demonstration() -> skills.Example:
            example = make_example(rng, noisy=True)
            return demonstration() if example.prompt in self.exclude else example

        def loss(step: int) -> torch.Tensor:
            batch = [demonstration() for _ in range(128)]
            return -skills.answer_log_probs(model, self.tokenizer, batch).mean()

        return skills.fit(model.train(), loss, self.warm_start)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> float:
        """The exact chance that a sample at temperature 1 is the answer, over the held-out prompts."""
        return skills.answer_log_probs(model, self.tokenizer, self.held_out_examples).exp().mean().item()
