"""SmolLM2-135M with LoRA on the shipped questions, for similarity to the reference and words that are not profane."""

from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.host.sources import resolve_model
from trl_grpo_ext.recipe.datasets import load_prompts
from trl_grpo_ext.rewards import Length, Profanity, Relevance, Reward, as_reward

from .sampling import mean_scores, sample


def harmlessness(**call: Any) -> list[float]:
    """1 - P(profane): what the published comparison was measured with."""
    return [1.0 - value for value in Profanity().score(**call)]


class SmolTask:
    """The same for every seed, which sets the order of the prompts and the sampling."""

    max_completion_length = 36

    def __init__(self) -> None:
        self.peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.helpfulness: Reward = Relevance("reference").named("helpfulness")
        self.reward = 1.0 * self.helpfulness + 0.5 * as_reward(harmlessness) - 0.001 * Length()

    @cached_property
    def path(self) -> str:
        return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path)

    def dataset(self, pool: str) -> Dataset:
        return load_prompts(pool)["train"]

    def policy(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def measure(self, model: PreTrainedModel) -> float:
        """Not measured on the way, which would cost as much as the training."""
        return float("nan")

    held_out_reward = measure

    def final(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean scores of greedy answers to the held-out questions."""
        rows = load_prompts("helpful")["test"]
        prompts = list(rows["prompt"])
        ids = sample(model, self.tokenizer, prompts, self.max_completion_length, do_sample=False, batch_size=48)
        return mean_scores(self.reward, rows, ids, self.tokenizer)
