"""What a trained model is held against: the question repeated, and stock TRL with as many answers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig

from ..config import AdaptiveGRPOConfig
from ..hooks.records import Answer
from ..observe.evaluation import HeldOutCallback
from ..observe.held_out import HeldOut, as_one_reward, score_answers
from ..observe.line import open_alarms
from ..rewards.text import question_of
from ..trainer.adaptive import AdaptiveGRPOTrainer

REPEATED = "repeat the question"
STOCK = "stock TRL"


def repeat_question(trainer: AdaptiveGRPOTrainer, dataset: Dataset, reward: Any) -> HeldOut:
    """
    What it is worth to repeat the question: a policy that knows nothing, which a trained one should beat.

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            Whose tokenizer counts the tokens.
        dataset ([`~datasets.Dataset`]), reward ([`~trl_grpo_ext.rewards.Reward`], or what TRL takes):
            As in [`~trl_grpo_ext.observe.held_out.evaluate_held_out`].
    """
    reward, rows = as_one_reward(reward, trainer.args.reward_weights), list(dataset)
    texts, end = [question_of(row["prompt"]) for row in rows], [trainer.processing_class.eos_token_id]
    ids = [trainer.processing_class(text=text, add_special_tokens=False)["input_ids"] + end for text in texts]
    answers = [[Answer(row["prompt"], own, text)] for row, own, text in zip(rows, ids, texts, strict=True)]
    scores, _ = score_answers(trainer, reward, rows, answers)
    return HeldOut(questions=texts, answers=texts, scores=scores)


def stock_args(args: AdaptiveGRPOConfig, logs: list[dict[str, Any]], **overrides: Any) -> AdaptiveGRPOConfig:
    """
    Arguments with which stock TRL samples as many answers in steps of as many rows, with none of our options.

    Args:
        args ([`AdaptiveGRPOConfig`]):
            Of the run to hold it against.
        logs (`list[dict[str, Any]]`):
            Its `trainer.state.log_history`, which knows how many answers it sampled.
        overrides:
            Other options of [`~trl.GRPOConfig`], such as a learning rate that was tuned for it.
    """
    num_answers = [log["rollouts/total"] for log in logs if "rollouts/total" in log][-1]
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(GRPOConfig) if field.init}
    options = {
        **shared,
        "output_dir": str(Path(args.output_dir) / "stock"),
        "max_steps": max(1, round(num_answers / rows_of_step(args))),
        "generation_batch_size": None,  # which is that of steps_per_generation
        "num_iterations": 1,
        "scale_rewards": "group",
        "report_to": "none",
        "log_completions": False,
        "resume_from_checkpoint": None,
        "save_strategy": "no",
        "push_to_hub": False,
        **overrides,
    }
    return AdaptiveGRPOConfig(**options)


def rows_of_step(args: GRPOConfig) -> int:
    """Answers that an optimizer step trains on, over all processes."""
    return int(args.generation_batch_size // args.steps_per_generation * args.gradient_accumulation_steps)


def train_stock(trainer: AdaptiveGRPOTrainer) -> HeldOut:
    """
    Train with nothing of ours switched on, which is bit for bit TRL.

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            With the arguments of [`stock_args`] and a [`~trl_grpo_ext.observe.evaluation.HeldOutCallback`].

    Returns:
        [`~trl_grpo_ext.observe.held_out.HeldOut`]: the answers to the held-out prompts at the end.
    """
    args = trainer.args
    trainer.accelerator.print(
        f"{STOCK}: {args.max_steps} steps of {rows_of_step(args)} answers, "
        f"{args.num_generations} a prompt, learning rate {args.learning_rate:g}"
    )
    trainer.train()
    return next(callback for callback in trainer.grpo_callbacks if isinstance(callback, HeldOutCallback)).after


def print_rivals(policies: Mapping[str, HeldOut]) -> None:
    """Print the mean of each score, a row for each policy."""
    console = Console(width=None if Console().is_terminal else 110)
    names = list(next(iter(policies.values())).scores)
    table = Table(title="Beside others, on the same prompts", title_justify="left")
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for policy, held_out in policies.items():
        table.add_row(
            policy, *(f"{held_out.mean(name):.{1 if abs(held_out.mean(name)) >= 10 else 3}f}" for name in names)
        )
    console.print(table)


def what_features_did(args: AdaptiveGRPOConfig, logs: list[dict[str, Any]]) -> str:
    """
    One line: how many answers were used, in groups of what size, of prompts drawn how, and which alarms are open.

    Args:
        args ([`AdaptiveGRPOConfig`]):
            Of the run.
        logs (`list[dict[str, Any]]`):
            `trainer.state.log_history`.

    Example:

    ```python
    >>> args = AdaptiveGRPOConfig(num_generations=4, bf16=False)
    >>> what_features_did(args, [{"rollouts/total": 8.0, "group_size/min": 1.0, "group_size/max": 1.0}])
    'Features: 8 answers, groups of 1'
    >>> what_features_did(args, [{"rollouts/total": 8.0}])
    'Features: 8 answers, groups of 4'

    ```
    """
    steps = [log for log in logs if "rollouts/total" in log]
    if not steps:
        return "Features: no answer was sampled"
    is_tree = args.rollout == "hierarchical"
    told = [f"{steps[-1]['rollouts/total']:.0f} answers" + (" and plans" if is_tree else "")]

    def values(name: str) -> list[float]:
        return [log[name] for log in steps if name in log]

    fixed = args.num_generations  # whose sizes are not logged
    low, high = min(values("group_size/min"), default=fixed), max(values("group_size/max"), default=fixed)
    if is_tree:
        told.append(f"{args.num_plans} plans a question with {args.num_implementations} answers each")
    else:
        told.append(f"groups of {low:.0f}" if low == high else f"groups of {low:.0f} to {high:.0f}")
    if prompts := values("curriculum/effective_prompts"):
        told.append(f"the {args.curriculum} curriculum spread over {prompts[0]:.0f}, then {prompts[-1]:.0f} prompts")
    if position := values("curriculum/position"):
        told.append(
            f"the {args.curriculum} curriculum went from {position[0]:.0%} to {position[-1]:.0%} of the difficulty"
        )
    if clipped := values("reward_clip/frac"):
        told.append(f"{sum(clipped) / len(clipped):.0%} of the rewards clipped")
    if skipped := [log["reuse/skipped"] for log in logs if "reuse/skipped" in log]:  # also of the further updates
        told.append(f"{1 - sum(skipped) / len(skipped):.0%} of {len(skipped)} updates made")
    if foreseen := values("baseline/explained_variance"):
        share = median(foreseen)  # of few prompts, one batch says little
        told.append(f"the guess foresaw {f'{share:.0%}' if share > 0 else 'nothing'} of what prompts earn")
    if args.task_advantages:
        told.append("each task on a scale of its own")
    if informative := values("rollouts/informative"):
        told.append(f"{sum(informative) / len(informative):.0%} of the answers taught something")
    if args.monitor:
        told.append(f"alarms open at the end: {', '.join(open_alarms(steps[-1])) or 'none'}")
    return "Features: " + ", ".join(told)
