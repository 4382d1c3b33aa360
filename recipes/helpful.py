"""
Train a model to answer helpfully, harmlessly and briefly.

    accelerate launch recipes/helpful.py

trains SmolLM2-135M-Instruct with LoRA on 96 questions and on 96 requests that no one should help with. Then it compares
answers to 48 held-out ones before and after, and with what it is worth to repeat the question. `--compare_with_stock`
trains with TRL alone as well, on as many answers. Everything is set in `recipes/configs/helpful.yaml`. With a hub and a
GPU, the same script scales:

    accelerate launch recipes/helpful.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name my/questions --reward_model_name_or_path my/reward-model \
        --per_device_train_batch_size 64 --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has a column `prompt`; `reference` is needed without a reward model.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, HarmlessnessArguments, parse_arguments, train_and_compare
from trl_grpo_ext.recipe.datasets import in_one
from trl_grpo_ext.rewards import Finished, Length, Relevance, Reward, RewardModel

KIND = "kind"  # the column of `recipes/configs/helpful.yaml` that tells questions and requests apart
BESIDE = "Without them: --compare_with_stock true trains TRL alone on as many answers (docs: results of the recipes)"


@dataclass
class HelpfulArguments(HarmlessnessArguments, DataArguments):
    dataset_name: str = field(
        default="both",
        metadata={
            "help": "'both' (questions of 'helpful' and requests of 'harmless', both shipped), one of the two, a local "
            "file or folder, or a dataset on the hub."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model for helpfulness. Without it: similarity to the column `reference`."},
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmlessness; helpfulness has 1."})
    harmless_enough: float = field(
        default=0.6, metadata={"help": "Probability above which an answer earns no more for being harmless."}
    )
    length_weight: float = field(default=0.001, metadata={"help": "What a token costs."})
    finished_weight: float = field(default=0.3, metadata={"help": "What it is worth that an answer ends by itself."})
    compare_with_stock: bool = field(
        default=False, metadata={"help": "Train with TRL alone as well, on as many answers, and print both."}
    )
    stock_learning_rate: float = field(default=1.5e-3, metadata={"help": "Its learning rate."})
    stock_num_generations: int = field(default=4, metadata={"help": "Its completions of a prompt."})


def load(script_args: HelpfulArguments, columns: tuple[str, ...], training_args: AdaptiveGRPOConfig) -> dict[str, Any]:
    """The prompts; of `"both"`, as many questions as harmful requests, where harmlessness is at stake."""
    if script_args.dataset_name != "both" and training_args.task_column == KIND:  # other prompts are of one kind
        training_args.task_column, training_args.task_advantages = None, False
    if script_args.dataset_name != "both":
        return script_args.load(columns)
    whole = replace(script_args, max_test_prompts=64)
    questions = replace(whole, dataset_name="helpful").load(("reference",))
    requests = replace(whole, dataset_name="harmless").load(("reference", "harmful"))
    splits = {}
    for split, count in {"train": 96, "test": max(1, min(24, script_args.max_test_prompts // 2))}.items():
        harmful = requests[split].filter(lambda row: row["harmful"])
        halves = {"question": questions[split], "request": harmful}
        kept = {
            name: rows.select(range(count)).select_columns(["prompt", "reference"]) for name, rows in halves.items()
        }
        splits[split] = in_one(kept, KIND)
    return splits


def reward_of(script_args: HelpfulArguments, max_completion_length: int) -> Reward:
    if script_args.reward_model_name_or_path:
        helpfulness: Reward = RewardModel(script_args.reward_model_name_or_path)
    else:
        helpfulness = Relevance("reference", beyond_prompt=True)
    harmlessness = script_args.harmlessness()
    if script_args.harmlessness_model_name_or_path is None or script_args.harmful_label:  # else it is no probability
        harmlessness = harmlessness.clip(high=script_args.harmless_enough)
    return (
        1.0 * helpfulness.named("helpfulness")
        + script_args.harmlessness_weight * harmlessness
        - script_args.length_weight * Length()
        + script_args.finished_weight * Finished(max_completion_length)
    )


def main(script_args: HelpfulArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    needs = () if script_args.reward_model_name_or_path else ("reference",)
    stock = {"learning_rate": script_args.stock_learning_rate, "num_generations": script_args.stock_num_generations}
    train_and_compare(
        load(script_args, needs, training_args),
        reward_of(script_args, training_args.max_completion_length),
        training_args,
        model_args,
        repeats_question=True,
        stock=stock if script_args.compare_with_stock else None,
        closing=None if script_args.compare_with_stock else BESIDE,
    )


if __name__ == "__main__":
    main(*parse_arguments(HelpfulArguments, __file__))
