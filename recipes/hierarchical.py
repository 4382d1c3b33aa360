"""
Train a model to plan before it answers, with credit of their own for plans and answers.

    accelerate launch recipes/hierarchical.py

trains SmolLM2-135M-Instruct with LoRA on 192 questions: it writes four plans for each, and answers twice by each plan.
Then it compares greedy answers to 48 held-out questions, each after a plan, before and after. Everything is set in
`recipes/configs/hierarchical.yaml`. With a hub and a GPU, the same script trains on data of your own:

    accelerate launch recipes/hierarchical.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name my/questions --prompt_column question --reference_column answer \\
        --per_device_train_batch_size 60 --num_plans 4 --num_implementations 4 --num_generations 4 \\
        --max_completion_length 256 --max_steps 500

A dataset has columns `prompt` and `reference`. The rows of a step are a multiple of
`num_plans * (1 + num_implementations)`, which is what one question takes.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, HarmlessnessArguments, parse_arguments, train_and_compare
from trl_grpo_ext.rewards import Finished, Length, Relevance, of_plan
from trl_grpo_ext.rewards.text import question_of


@dataclass
class HierarchicalArguments(HarmlessnessArguments, DataArguments):
    dataset_name: str = field(
        default="helpful", metadata={"help": "'helpful' (shipped), a local file or folder, or a dataset on the hub."}
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmlessness; relevance has 1."})
    length_weight: float = field(default=0.001, metadata={"help": "What a token of the answer costs."})
    finished_weight: float = field(default=0.25, metadata={"help": "What it is worth that an answer ends by itself."})
    plan_length_weight: float = field(default=0.001, metadata={"help": "What a token of the plan costs."})


def main(script_args: HierarchicalArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    prompts = script_args.load(columns=("reference",))
    # The prompt of an answer ends with "Now answer", so the question is a column of its own.
    prompts = {split: rows.map(lambda row: {"question": question_of(row["prompt"])}) for split, rows in prompts.items()}
    relevance = Relevance("reference", beyond_prompt="question")
    answer = 1.0 * relevance + script_args.harmlessness_weight * script_args.harmlessness()
    finished = Finished(training_args.max_completion_length)
    brevity = script_args.length_weight * Length() + script_args.plan_length_weight * of_plan(Length())
    train_and_compare(
        prompts,
        answer + script_args.finished_weight * finished - brevity,
        training_args,
        model_args,
    )


if __name__ == "__main__":
    main(*parse_arguments(HierarchicalArguments, __file__))
