"""The metrics of each task, which the metrics of the whole run hide."""

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..hooks.segments import group_mean_std, total_rewards
from ..plan.tasks import read_tasks, said_instead
from ..rewards.tasks import routes_of

logger = logging.getLogger(__name__)


class TaskCallback(GRPOCallback):
    """
    Log the metrics of each task: `tasks/{name}/reward` and others.

    Looks and does not touch. A dataset is checked when the trainer is built: each row names a task, and each task has a
    reward where [`~trl_grpo_ext.rewards.by_task`] routes by the same column. Rows of a stream that name no task are
    trained on as any others, and counted in `tasks/missing`.

    Args:
        column (`str`):
            Dataset column with the names of the tasks.

    Raises:
        `ValueError`: for a column that is missing or holds something else than tasks, and for routes that do not fit.
    """

    is_unique = True
    reads_dataset = True

    def __init__(self, column: str):
        self.task_column = column

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        column, dataset = str(self.task_column), trainer.train_dataset
        self._trainer = trainer
        if args.remove_unused_columns:
            raise ValueError(
                f"remove_unused_columns=True takes the column {column!r} out of the rows, of which task_column reads "
                "the tasks: set it to False, as TRL does"
            )
        if args.baseline in ("batch", "predicted", "shrunk") and not args.task_advantages:
            logger.warning(
                f"baseline={args.baseline!r} compares rewards of different tasks with each other: set "
                "task_advantages=True, or the task with the smallest rewards may not be learnt"
            )
        if not isinstance(dataset, Dataset):
            return
        tasks = {*read_tasks(dataset, column)}
        for reward in trainer.reward_funcs:
            routes = {name for name, by in routes_of(reward) if by == column}
            unknown = sorted(routes - tasks)
            if unknown:
                raise ValueError(
                    f"by_task has a reward for the task {unknown[0]!r}, unknown to the dataset"
                    f"{said_instead(unknown[0], sorted(tasks))}"
                )
            missing = sorted(tasks - routes)
            if routes and missing and len(trainer.reward_funcs) == 1:
                raise ValueError(
                    f"by_task has no reward for the task {missing[0]!r} of the dataset, so its completions would teach "
                    f"nothing: give it one, or filter its rows out"
                )

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        weights = self._trainer.reward_weights.cpu()
        lengths, is_cut = self._trainer.rollout.endings(batch.tokens)
        batch.metrics |= metrics_of_tasks(batch, total_rewards(batch.raw_rewards_per_func, weights), lengths, is_cut)


def metrics_of_tasks(batch: RolloutBatch, rewards: Tensor, lengths: Tensor, is_cut: Tensor) -> dict[str, float]:
    """
    What is logged of each task of a batch.

    Args:
        batch ([`RolloutBatch`]):
            The finished batch.
        rewards (`torch.Tensor` of shape `(N,)`):
            Raw total rewards, those of TRL's `reward`.
        lengths (`torch.Tensor` of shape `(N,)`):
            Tokens that were written.
        is_cut (`torch.Tensor` of shape `(N,)`):
            Whether the limit cut a completion off.

    Returns:
        `dict[str, float]`
    """
    tasks, names = batch.tasks, batch.task_names
    everywhere = torch.where(tasks < 0, len(names), tasks)  # rows that name no task are a last one
    mean, std, count = group_mean_std(rewards, everywhere, len(names) + 1)
    found: dict[str, float] = {}
    for position, name in enumerate(names):
        own = tasks == position
        values = {
            "share": own.float().mean(),
            "length": lengths[own].float().mean(),
            "truncated": is_cut[own].float().mean(),
            "advantage": batch.mean_advantages[own].abs().mean(),
        }
        if count[position] > 0:
            values |= {"reward": mean[position], "reward_std": std[position]}
        teaches = [~part.flat_completions()[tasks_named(part, name)] for part in batch.parts]
        values["informative"] = torch.cat(teaches).float().mean()
        found |= {f"tasks/{name}/{metric}": value.item() for metric, value in values.items()}
    if (tasks < 0).any():
        found["tasks/missing"] = (tasks < 0).float().mean().item()
    return found


def tasks_named(batch: RolloutBatch, name: str) -> Tensor:
    """Which completions `(N,)` are of a task."""
    return batch.tasks == (batch.task_names.index(name) if name in batch.task_names else -2)
