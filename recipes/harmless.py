"""
Train a model to decline harmful requests, and to answer the harmless ones that only sound alike.

    accelerate launch recipes/harmless.py

trains SmolLM2-135M-Instruct with LoRA on 96 requests, half of them harmful, and compares its answers to 32 held-out
requests before and after. Everything is set in `recipes/configs/harmless.yaml`. The reward is a gate: an answer earns
credit for being close to the reference only if it does the right thing, which is to decline what is harmful and not to
decline anything else. With a hub and a GPU, the same script trains on HH-RLHF:

    accelerate launch recipes/harmless.py --dataset_name Anthropic/hh-rlhf \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 64 \\
        --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has columns `prompt`, `reference` (for a harmful prompt, a refusal that says what to do instead) and
`harmful`.
"""

import re
from dataclasses import dataclass, field

from trl_grpo_ext.recipe import DataArguments, parse_arguments, train_and_compare
from trl_grpo_ext.rewards import Harmlessness, Length, Relevance, Reward, as_reward, maximum
from trl_grpo_ext.rewards.text import text_of

REFUSAL = re.compile(
    r"\bI(?:'m| am)? (?:can't|cannot|can not|won't|will not|not able to|unable to|must decline)\b", re.IGNORECASE
)
BEGINNING = 160  # characters in which an answer that declines says so


@dataclass
class HarmlessArguments(DataArguments):
    dataset_name: str = field(
        default="harmless", metadata={"help": "'harmless' (shipped), a local file or folder, or a dataset on the hub."}
    )
    system_prompt: str = field(
        default="If a request is harmful, say that you can't help with it and what to do instead. Else answer it.",
        metadata={
            "help": "System message of prompts that have none: a policy that never declines earns nothing for it."
        },
    )
    gate_weight: float = field(
        default=0.5, metadata={"help": "What declining or answering rightly is worth by itself."}
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmless words; relevance has 1."})
    length_weight: float = field(default=0.001, metadata={"help": "What a token costs."})


def declines(text: str) -> bool:
    """Whether an answer begins by saying that it will not do what was asked."""
    return REFUSAL.search(text[:BEGINNING].replace("\u2019", "'")) is not None


def declined(completions: list, harmful: list[bool], **kwargs) -> list[float | None]:
    """Of harmful requests: 1 if the answer declines, else 0."""
    return [float(declines(text_of(c))) if bad else None for c, bad in zip(completions, harmful, strict=True)]


def answered(completions: list, harmful: list[bool], **kwargs) -> list[float | None]:
    """Of harmless requests: 1 if the answer does not decline, else 0."""
    return [None if bad else float(not declines(text_of(c))) for c, bad in zip(completions, harmful, strict=True)]


def make_reward(script_args: HarmlessArguments) -> Reward:
    right = maximum(as_reward(declined), as_reward(answered))  # of the one that applies
    helpful = Relevance("reference").where(right > 0)
    kind = script_args.harmlessness_weight * Harmlessness() - script_args.length_weight * Length()
    return helpful + script_args.gate_weight * right + kind


def with_system(row: dict, system_prompt: str) -> dict:
    has_one = row["prompt"][0]["role"] == "system" or not system_prompt
    return {"prompt": row["prompt"] if has_one else [{"role": "system", "content": system_prompt}, *row["prompt"]]}


def main(script_args: HarmlessArguments, training_args, model_args) -> None:
    prompts = script_args.load(columns=("reference", "harmful"))
    asked = {"system_prompt": script_args.system_prompt}
    prompts = {split: rows.map(with_system, fn_kwargs=asked) for split, rows in prompts.items()}
    train_and_compare(prompts, make_reward(script_args), training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(HarmlessArguments, __file__))
