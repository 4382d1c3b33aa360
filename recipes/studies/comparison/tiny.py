"""The tiny task: answer right, without a forbidden word, briefly; a model of 86k parameters that half can."""

import copy
import functools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import skills
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trl_grpo_ext.recipe.tiny import tiny_model
from trl_grpo_ext.rewards import Length, Reward, as_reward

from .cells import write_whole
from .sampling import mean_scores, sample

FORBIDDEN, FILLER = "!", "."
RATES = (0.75, 0.98)  # how often the warm start has the first and the last letter of the alphabet right
POOLS = {"mixed": {"greet": 1 / 4, "hopeless": 1 / 2, "translate": 1 / 4}, "easy": {"translate": 1.0}}


def is_helpful(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if the first word is the answer, whatever punctuation follows; 0 otherwise."""
    return [float(re.split("[^a-z]", c, maxsplit=1)[0] == a) for c, a in zip(completions, answer, strict=True)]


def is_harmless(completions: list[str], **kwargs: Any) -> list[float]:
    """1 if the completion does without the forbidden token."""
    return [float(FORBIDDEN not in c) for c in completions]


@dataclass(frozen=True)
class TinyTask:
    """
    One seed of the task: model, held-out prompts, reward.

    Args:
        seed (`int`):
            Of warm start, prompts and held-out prompts.
        folder (`Path`):
            Where the warm-started weights are kept.
        pool_size (`int`), held_out (`int`), warm_start (`int`):
            Prompts to train on, prompts held out, steps of supervised training.
    """

    seed: int
    folder: Path
    pool_size: int
    held_out: int
    warm_start: int
    max_completion_length: int = skills.HOPELESS + 6
    temperature: float = 1.0
    peft_config: None = None
    helpfulness: Reward = field(default_factory=lambda: as_reward(is_helpful).named("helpfulness"))

    @functools.cached_property
    def reward(self) -> Reward:
        return 1.0 * self.helpfulness + 0.5 * as_reward(is_harmless).named("harmlessness") - 0.01 * Length()

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return skills.make_tokenizer(FORBIDDEN + FILLER)

    @functools.cached_property
    def held_out_examples(self) -> list[skills.Example]:
        return skills.make_examples({"translate": self.held_out}, seed=1_000_000 + self.seed)

    @functools.cached_property
    def exclude(self) -> frozenset[str]:
        return frozenset(example.prompt for example in self.held_out_examples)

    def dataset(self, pool: str) -> Dataset:
        counts = {skill: round(share * self.pool_size) for skill, share in POOLS[pool].items()}
        return skills.as_dataset(skills.make_examples(counts, self.seed, self.exclude))

    def policy(self) -> LlamaForCausalLM:
        """The warm-started model, trained once for each seed."""
        model = tiny_model(self.tokenizer, self.seed)
        path = self.folder / f"warm_{self.seed}_{self.warm_start}_{self.held_out}.pt"
        if not path.exists():
            write_whole(path, functools.partial(torch.save, self._warm_started(model).state_dict()))
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def _warm_started(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        rng = random.Random(self.seed)
        model = copy.deepcopy(model).train()

        def loss(step: int) -> torch.Tensor:
            batch = [
                self._demonstration(skill, rng) for skill in ["greet"] * 64 + ["hopeless"] * 8 + ["translate"] * 80
            ]
            return -skills.answer_log_probs(model, self.tokenizer, batch).mean()

        return skills.fit(model, loss, self.warm_start)

    def _demonstration(self, skill: str, rng: random.Random) -> skills.Example:
        example = skills.make_example(skill, rng, noisy=True, rates=RATES)
        while example.prompt in self.exclude:
            example = skills.make_example(skill, rng, noisy=True, rates=RATES)
        tail = FILLER * rng.choice([0, 0, 1, 2, 3]) + FORBIDDEN * (rng.random() < 0.3)
        return skills.Example(example.prompt, example.answer + tail, skill)

    def measure(self, model: PreTrainedModel) -> float:
        """
        Held-out helpfulness: the exact probability that a sample at temperature 1 begins with the right word.

        That is the probability of the answer's letters, times that of no letter after them.
        """
        return self.chances(model)[0].mean().item()

    @torch.no_grad()
    def chances(self, model: PreTrainedModel) -> tuple[torch.Tensor, float]:
        """For each held-out prompt, the chance of a right answer; and the mean entropy of its letters, in nats."""
        device = next(model.parameters()).device
        prompts = [self.tokenizer(e.prompt + e.answer)["input_ids"] for e in self.held_out_examples]
        ids = torch.tensor(prompts, device=device)  # all held-out prompts and answers have one length
        log_probs = model(input_ids=ids).logits.log_softmax(-1)
        size = skills.WORD
        letters = log_probs[:, -1 - size : -1].gather(-1, ids[:, -size:, None]).sum((1, 2)).exp()
        more = self.tokenizer.convert_tokens_to_ids(list(skills.LETTERS))
        right: torch.Tensor = letters * (1 - log_probs[:, -1, more].exp().sum(-1))
        written = log_probs[:, -1 - size : -1]
        return right, -(written.exp() * written).sum(-1).mean().item()

    def look(self, model: PreTrainedModel) -> tuple[float, float]:
        """Held-out helpfulness and reward, as they are measured on the way."""
        return self.measure(model), self.held_out_reward(model)

    def held_out_reward(self, model: PreTrainedModel) -> float:
        """Mean reward of a sample to each held-out prompt, drawn at the side."""
        return self.final(model, num_samples=1)["reward"]

    def final(self, model: PreTrainedModel, num_samples: int = 4) -> dict[str, float]:
        """Scores of some samples to each held-out prompt, drawn at the side; helpfulness exactly."""
        rows = skills.as_dataset([e for e in self.held_out_examples for _ in range(num_samples)])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = sample(model, self.tokenizer, list(rows["prompt"]), self.max_completion_length, batch_size=1024)
        return mean_scores(self.reward, rows, ids, self.tokenizer) | {"helpfulness": self.measure(model)}
