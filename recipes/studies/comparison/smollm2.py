"""SmolLM2-135M with LoRA: the shipped questions, for similarity and clean words; or the tasks of recipes."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.host.sources import resolve_model
from trl_grpo_ext.recipe.datasets import load_prompts
from trl_grpo_ext.rewards import Length, Profanity, Relevance, Reward, as_reward

from .cells import write_whole
from .sampling import ask, entropy, mean_scores, sample

RECIPES = Path(__file__).parents[2]


def harmlessness(**call: Any) -> list[float]:
    """1 - P(profane): what the published comparison was measured with."""
    return [1.0 - value for value in Profanity().score(**call)]


class SmolTask:
    """The same for every seed, which sets the order of the prompts and the sampling."""

    max_completion_length = 36
    temperature = 1.0

    def __init__(self) -> None:
        self.peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.helpfulness: Reward = Relevance("reference").named("helpfulness")
        self.reward = 1.0 * self.helpfulness + 0.5 * as_reward(harmlessness) - 0.001 * Length()

    @functools.cached_property
    def path(self) -> str:
        return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").path

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path)

    def dataset(self, pool: str) -> Dataset:
        return load_prompts(pool)["train"]

    def policy(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def look(self, model: PreTrainedModel) -> tuple[float, float]:
        """Held-out helpfulness and reward on the way: not measured, which would cost as much as the training."""
        return float("nan"), float("nan")

    def held_out(self) -> Dataset:
        return load_prompts("helpful")["test"]

    def greedy(self, model: PreTrainedModel) -> list[list[int]]:
        """Token ids of a greedy answer to each held-out prompt."""
        prompts = list(self.held_out()["prompt"])
        return sample(model, self.tokenizer, prompts, self.max_completion_length, do_sample=False, batch_size=48)

    def final(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean scores of greedy answers to the held-out prompts."""
        return mean_scores(self.reward, self.held_out(), self.greedy(model), self.tokenizer)


class RecipeTask(SmolTask):
    """The prompts of a recipe. Greedy answers say enough on the way."""

    splits: dict[str, Dataset]

    def dataset(self, pool: str) -> Dataset:
        return self.splits["train"]

    def held_out(self) -> Dataset:
        return self.splits["test"]


class HelpfulTask(RecipeTask):
    """The prompts and the reward of `recipes/helpful.py`. On the way, the held-out reward is measured."""

    max_completion_length = 48
    temperature = 0.8
    system_prompt = "Answer in one short sentence. If a request would hurt someone, say that you can't help with it."

    def __init__(self) -> None:
        super().__init__()
        recipe = _load("helpful")
        arguments = recipe.HelpfulArguments(system_prompt=self.system_prompt)
        self.splits = recipe.load(arguments, ("reference",), AdaptiveGRPOConfig(output_dir="", use_cpu=True))
        self.reward = recipe.reward_of(arguments, self.max_completion_length)
        self.helpfulness = self.reward  # so levels and learning rates are those of the reward

    def look(self, model: PreTrainedModel) -> tuple[float, float]:
        return self.final(model)["reward"], float("nan")


class AnswerTask(RecipeTask):
    """
    A recipe whose answers are right or wrong, such as `recipes/arithmetic.py`, with its reward.

    What is measured on the way is the share of held-out prompts whose greedy answer is right, and the reward. At the
    end, 16 samples to each say how much of that was there before: `pass@1`, `pass@16`, the share of prompts of which no
    sample of the untrained model was right, the share of those of which one is right by now, and the entropy of a
    token.
    """

    max_completion_length = 16
    num_samples = 16

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self.recipe = _load(name)
        if name == "arithmetic":
            self.splits = self.recipe.make_sums()
            right: Callable[..., list[Any]] = self.recipe.correct
            self.reward = self.recipe.reward_of(self.recipe.ArithmeticArguments(), self.max_completion_length)
        else:
            arguments = self.recipe.ReasoningArguments()
            self.splits = self.recipe.make_questions(arguments)
            right = self.recipe.solved_fully
            self.reward = self.recipe.reward_of(arguments, self.max_completion_length)
        self.helpfulness = as_reward(right).named("helpfulness")
        rows = self.held_out()
        # Of another task, of other questions, or with answers of another length, it would be another file.
        self.before = folder / f"before_{name}_{len(rows)}_{self.max_completion_length}_{self.num_samples}.pt"
        self.repeated = rows.select([i for i in range(len(rows)) for _ in range(self.num_samples)])

    def look(self, model: PreTrainedModel) -> tuple[float, float]:
        scores = self._scores(model)
        return scores["helpfulness"], scores["reward"]

    def final(self, model: PreTrainedModel) -> dict[str, float]:
        before = self._before()
        now, ids = self._samples(model)
        never = ~before.any(1)
        return self._scores(model) | {
            "pass@1": now.float().mean().item(),
            "pass@16": now.any(1).float().mean().item(),
            "never right before": never.float().mean().item(),
            "right by now": now[never].any(1).float().mean().item(),
            "entropy": entropy(model, self.tokenizer, list(self.repeated["prompt"]), ids),
        }

    def _before(self) -> torch.Tensor:
        """Whether samples of the untrained model are right: the same for every seed, so drawn once for all."""
        if not self.before.exists():
            is_right, _ = self._samples(self.policy())
            write_whole(self.before, functools.partial(torch.save, is_right))
        kept: torch.Tensor = torch.load(self.before, weights_only=True)
        return kept

    def _samples(self, model: PreTrainedModel) -> tuple[torch.Tensor, list[list[int]]]:
        """Whether each of 16 samples to each held-out prompt is right, and the samples."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prompts = list(self.repeated["prompt"])
            ids = sample(model, self.tokenizer, prompts, self.max_completion_length, batch_size=256)
        is_right = torch.tensor(ask(self.helpfulness, self.repeated, ids, self.tokenizer)) == 1
        return is_right.view(-1, self.num_samples), ids

    def _scores(self, model: PreTrainedModel) -> dict[str, float]:
        rows, ids = self.held_out(), self.greedy(model)
        scores = mean_scores(self.reward, rows, ids, self.tokenizer)
        right = ask(self.helpfulness, rows, ids, self.tokenizer)
        return scores | {"helpfulness": sum(right) / len(right)}


def _load(name: str) -> ModuleType:
    """A recipe, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
