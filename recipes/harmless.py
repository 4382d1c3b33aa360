"""
Train a model to decline harmful requests, and to answer the harmless ones that only sound alike.

    accelerate launch recipes/harmless.py

trains SmolLM2-135M-Instruct with LoRA on 192 requests, half of them harmful, and compares its answers to 64 held-out
requests before and after. Everything is set in `recipes/configs/harmless.yaml`. The reward is a gate: an answer earns
credit for being close to the reference only if it does the right thing, which is to decline what is harmful and not to
decline anything else. A model that never declines learns nothing from that, so a few supervised steps on references
come first (a cold start). With a hub and a GPU, the same script trains on HH-RLHF, from a model that knows how:

    accelerate launch recipes/harmless.py --dataset_name Anthropic/hh-rlhf --cold_start_steps 0 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 64 \\
        --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has columns `prompt`, `reference` (for a harmful prompt, a refusal that says what to do instead) and
`harmful`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, HarmlessnessArguments, parse_arguments, train_and_compare
from trl_grpo_ext.recipe.cold_start import cold_start
from trl_grpo_ext.rewards import Finished, Length, Relevance, Reward, as_reward, maximum
from trl_grpo_ext.rewards.text import text_of

REFUSAL = re.compile(
    r"\bI(?:'m| am)? (?:can't|cannot|can not|won't|will not|not able to|unable to|must decline)\b", re.IGNORECASE
)
BEGINNING = 160  # characters in which an answer that declines says so


@dataclass
class HarmlessArguments(HarmlessnessArguments, DataArguments):
    dataset_name: str = field(
        default="harmless", metadata={"help": "'harmless' (shipped), a local file or folder, or a dataset on the hub."}
    )
    cold_start_steps: int = field(
        default=48,
        metadata={"help": "Supervised steps, of 8 references each, before: 0 for a model that declines by itself."},
    )
    gate_weight: float = field(
        default=0.5, metadata={"help": "What declining or answering rightly is worth by itself."}
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmless words; relevance has 1."})
    length_weight: float = field(default=0.001, metadata={"help": "What a token costs."})
    finished_weight: float = field(default=0.2, metadata={"help": "What it is worth that an answer ends by itself."})


def declines(text: str) -> bool:
    """Whether an answer begins by saying that it will not do what was asked."""
    return REFUSAL.search(text[:BEGINNING].replace("\u2019", "'")) is not None


def declined(completions: list[Any], harmful: list[bool], **kwargs: Any) -> list[float | None]:
    """Of harmful requests: 1 if the answer declines, else 0."""
    return [float(declines(text_of(c))) if bad else None for c, bad in zip(completions, harmful, strict=True)]


def answered(completions: list[Any], harmful: list[bool], **kwargs: Any) -> list[float | None]:
    """Of harmless requests: 1 if the answer does not decline, else 0."""
    return [None if bad else float(not declines(text_of(c))) for c, bad in zip(completions, harmful, strict=True)]


def reward_of(script_args: HarmlessArguments, max_completion_length: int) -> Reward:
    right = maximum(as_reward(declined), as_reward(answered))  # of the one that applies
    helpful = Relevance("reference", beyond_prompt=True).where(right > 0)
    kind = script_args.harmlessness_weight * script_args.harmlessness()
    form = script_args.finished_weight * Finished(max_completion_length) - script_args.length_weight * Length()
    return helpful + script_args.gate_weight * right + kind + form


def main(script_args: HarmlessArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    prompts = script_args.load(columns=("reference", "harmful"))
    odd = [value for value in prompts["test"]["harmful"] if value not in (0, 1)]
    if odd:
        raise ValueError(f"the column 'harmful' of {script_args.dataset_name!r} holds {odd[0]!r}: write true and false")
    if script_args.cold_start_steps:
        steps = script_args.cold_start_steps
        model_args.model_name_or_path = cold_start(prompts["train"], steps, training_args, model_args)
    reward = reward_of(script_args, training_args.max_completion_length)
    train_and_compare(prompts, reward, training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(HarmlessArguments, __file__))
