"""
Train a model on two tasks at once whose rewards differ in kind, level and scale.

    accelerate launch recipes/two_tasks.py

trains SmolLM2-135M-Instruct with LoRA on sums, where a right answer earns 1 and a wrong one nothing, and on questions,
where an answer earns up to 10 for what it says beyond the question, and 1 if it ends by itself. In both, each token
costs. Each task has its own reward, its own scale of advantages, its own metrics and alarms, and gets the larger share
of the prompts where more can be learnt of it. Everything is set in `recipes/configs/two_tasks.yaml`. To see what a task
would reach alone, with as many steps as its share of the prompts:

    accelerate launch recipes/two_tasks.py --tasks math --max_steps 8

With data of your own, a dataset needs columns `prompt`, `reference` and `task`.
"""

from dataclasses import dataclass, field

from arithmetic import correct, make_sums
from datasets import Dataset
from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, load_prompts, parse_arguments, train_and_compare
from trl_grpo_ext.recipe.datasets import in_one
from trl_grpo_ext.rewards import Finished, Length, Relevance, as_reward, by_task


@dataclass
class TwoTasksArguments(DataArguments):
    dataset_name: str = field(
        default="both", metadata={"help": "'both', or a local file, a folder or a dataset on the hub with `task`."}
    )
    tasks: list[str] = field(default_factory=lambda: ["math", "chat"], metadata={"help": "Which tasks are trained."})
    chat_scale: float = field(default=10.0, metadata={"help": "What a perfect answer to a question earns."})
    finished_weight: float = field(
        default=1.0, metadata={"help": "What it is worth there that an answer ends by itself."}
    )
    token_cost: float = field(default=0.02, metadata={"help": "What a token costs, in both tasks."})


def both(split: str, system_prompt: str | None = None) -> Dataset:
    """Sums and questions in one dataset, with the column `task`."""
    said_first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    sums = make_sums()[split].map(lambda row: {"prompt": said_first + row["prompt"]})
    parts = {"math": sums, "chat": load_prompts("helpful", system_prompt=system_prompt, columns=("reference",))[split]}
    return in_one({task: rows.select_columns(["prompt", "reference"]) for task, rows in parts.items()}, "task")


def main(script_args: TwoTasksArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    if script_args.dataset_name == "both":
        prompts = {split: both(split, script_args.system_prompt) for split in ("train", "test")}
    else:
        prompts = script_args.load(columns=("reference", "task"))
    prompts = {split: rows.filter(lambda row: row["task"] in script_args.tasks) for split, rows in prompts.items()}
    relevance = script_args.chat_scale * Relevance("reference", beyond_prompt=True)
    finished = script_args.finished_weight * Finished(training_args.max_completion_length)
    rewards = {
        "math": 1.0 * as_reward(correct) - script_args.token_cost * Length(),
        "chat": relevance + finished - script_args.token_cost * Length(),
    }
    reward = by_task({task: rewards[task] for task in script_args.tasks}).named("reward_of_task")
    train_and_compare(prompts, reward, training_args, model_args)


if __name__ == "__main__":
    main(*parse_arguments(TwoTasksArguments, __file__))
