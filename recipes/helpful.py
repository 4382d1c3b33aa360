"""
Train a model to answer helpfully, harmlessly and briefly.

    accelerate launch recipes/helpful.py

trains SmolLM2-135M-Instruct with LoRA on 192 questions, with adaptive group size, reward clipping and an easy-to-hard
curriculum, and compares its answers to 48 held-out questions before and after, and to what it is worth to repeat the
question. `--compare_with_stock` trains with TRL alone as well, on as many answers. Everything is set in
`recipes/configs/helpful.yaml`. With a hub and a GPU, the same script scales:

    accelerate launch recipes/helpful.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name my/questions --reward_model_name_or_path my/reward-model \
        --per_device_train_batch_size 64 --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has a column `prompt`; `reference` is needed without a reward model, and `difficulty` by the curriculum
(`--curriculum online` needs none).
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, HarmlessnessArguments, parse_arguments, train_and_compare
from trl_grpo_ext.rewards import Finished, Length, Relevance, RewardModel


@dataclass
class HelpfulArguments(HarmlessnessArguments, DataArguments):
    dataset_name: str = field(
        default="helpful", metadata={"help": "'helpful' (shipped), a local file or folder, or a dataset on the hub."}
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model for helpfulness. Without it: similarity to the column `reference`."},
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmlessness; helpfulness has 1."})
    length_weight: float = field(default=0.002, metadata={"help": "What a token costs."})
    finished_weight: float = field(default=0.25, metadata={"help": "What it is worth that an answer ends by itself."})
    compare_with_stock: bool = field(
        default=False, metadata={"help": "Train with TRL alone as well, on as many answers, and print both."}
    )
    stock_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate, tuned for this task."})
    stock_num_generations: int = field(default=4, metadata={"help": "Its completions of a prompt."})


def main(script_args: HelpfulArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    needs: tuple[str, ...] = ()
    if script_args.reward_model_name_or_path:
        helpfulness = RewardModel(script_args.reward_model_name_or_path).named("helpfulness")
    else:
        helpfulness, needs = Relevance("reference", beyond_prompt=True).named("helpfulness"), ("reference",)
    finished = Finished(training_args.max_completion_length)
    reward = (
        1.0 * helpfulness
        + script_args.harmlessness_weight * script_args.harmlessness()
        - script_args.length_weight * Length()
        + script_args.finished_weight * finished
    )
    stock = {"learning_rate": script_args.stock_learning_rate, "num_generations": script_args.stock_num_generations}
    train_and_compare(
        script_args.load(needs),
        reward,
        training_args,
        model_args,
        repeats_question=True,
        stock=stock if script_args.compare_with_stock else None,
    )


if __name__ == "__main__":
    main(*parse_arguments(HelpfulArguments, __file__))
