"""
Train a model on conversations, every turn with credit of its own.

    accelerate launch recipes/multi_turn.py

trains SmolLM2-135M-Instruct with LoRA on 47 scripted conversations of two or three turns, and compares its answers in
16 held-out conversations before and after, turn by turn. Everything is set in `recipes/configs/multi_turn.yaml`.
`--history independent` compares whole conversations instead of answers to one history.

A dataset has a column `prompt` with what the user says first, `turns` with what the user says after each answer, and
`reference` with one good answer for each turn.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, HarmlessnessArguments, parse_arguments, train_and_compare
from trl_grpo_ext.rewards import Finished, Length, Relevance, at_end


@dataclass
class MultiTurnArguments(HarmlessnessArguments, DataArguments):
    dataset_name: str = field(
        default="multi_turn",
        metadata={"help": "'multi_turn' (shipped), a local file or folder, or a dataset on the hub."},
    )
    harmlessness_weight: float = field(
        default=0.5, metadata={"help": "Weight of the harmlessness of a whole conversation; relevance has 1 a turn."}
    )
    length_weight: float = field(default=0.002, metadata={"help": "What a token costs."})
    finished_weight: float = field(default=0.25, metadata={"help": "What it is worth that an answer ends by itself."})


def main(script_args: MultiTurnArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    conversations = script_args.load(columns=("reference",))
    kindness = script_args.harmlessness_weight * at_end(script_args.harmlessness())
    finished = script_args.finished_weight * Finished(training_args.max_completion_length)
    brevity = finished - script_args.length_weight * Length()
    reward = 1.0 * Relevance("reference", beyond_prompt=True) + kindness + brevity
    train_and_compare(conversations, reward, training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(MultiTurnArguments, __file__))
