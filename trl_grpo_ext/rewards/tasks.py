"""Rewards of several tasks in one: which reward a row gets, by the task that it names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..host.calls import is_async
from . import ops
from .algebra import Leaf, Reward, as_reward, composite_of
from .errors import CallError
from .trees import is_composite, rewards_in
from .turns import AsyncViewReward, Row, ViewReward


@dataclass(frozen=True)
class ByTask(ops.Op):
    """`by_task({"math": a, "chat": b})`: the reward of the task of the row; each operand is `None` on other rows."""

    tasks: tuple[str, ...]
    column: str

    strict = False

    def __call__(self, *values: float | None) -> float | None:
        return next((value for value in values if value is not None), None)

    def source(self, *parts: str) -> str:
        routes = ", ".join(f"{task!r}: {part}" for task, part in zip(self.tasks, parts, strict=True))
        return f"by_task({{{routes}}}{'' if self.column == 'task' else f', column={self.column!r}'})"

    def label(self, *parts: str) -> str:
        return f"by_task({','.join(parts)})"


@dataclass(frozen=True, repr=False)
class TaskReward(ViewReward):
    """A leaf that shows another leaf the rows of one task alone. See [`by_task`]."""

    view: str = "by_task"
    task: str = ""
    column: str = "task"

    def see(self, row: Row) -> Row | None:
        if self.column not in row:
            raise CallError(
                f"by_task needs the column {self.column!r}, which the dataset does not have: add it, or name the one "
                "that holds the task in by_task(..., column=...)"
            )
        return row if row[self.column] == self.task else None

    @property
    def default_name(self) -> str:
        return f"{self.leaf.name}_of_{self.task}"

    def _show(self, call: Row, completion_ids: list[list[int]] | None) -> tuple[list[int], Row]:
        positions, shown = super()._show(call, completion_ids)
        log_metric, before, after = call.get("log_metric"), f"rewards/{self.leaf.name}/", f"rewards/{self.name}/"
        if log_metric:  # the same leaf may be asked about other tasks
            shown["log_metric"] = lambda name, value: log_metric(name.replace(before, after, 1), value)
        return positions, shown

    def _constructor(self) -> str:
        return repr(self.leaf)  # what `by_task` is written with


@dataclass(frozen=True, repr=False)
class AsyncTaskReward(TaskReward, AsyncViewReward):
    """Rows of one task for an async leaf."""


def by_task(rewards: Mapping[str, Any], column: str = "task") -> Reward:
    """
    A reward for each task: every row gets that of the task that it names, and no other reward is asked about it.

    A row of another task gets `None`, which means "does not apply" to TRL. `_of_<task>` is added to the name of each
    leaf, so that each keeps its own metrics.

    Args:
        rewards (`Mapping[str, Reward]`, or what [`as_reward`] takes in place of each reward):
            Reward of each task.
        column (`str`, *optional*, defaults to `"task"`):
            Dataset column that names the task of a row.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length, as_reward
    >>> def right(completions, answer, **kwargs):
    ...     return [float(text == gold) for text, gold in zip(completions, answer)]
    >>> reward = by_task({"math": as_reward(right), "chat": 0.1 * Length("characters")})
    >>> rows = {"task": ["math", "chat", "code"], "answer": ["2", None, None]}
    >>> reward(prompts=["1 + 1", "Hi", "def f"], completions=["2", "Hello", "pass"], **rows)
    [1.0, 0.5, None]
    >>> reward
    by_task({'math': as_reward(right), 'chat': 0.1 * Length(unit='characters')})

    ```
    """
    if not isinstance(rewards, Mapping) or not rewards:
        raise ValueError(
            f'by_task({rewards!r:.80}) routes nothing: pass a reward for each task, such as {{"math": reward}}'
        )
    for task in rewards:
        if not isinstance(task, str) or not task:
            raise ValueError(f"by_task: {task!r} is no name of a task: use a text that is not empty, as in the dataset")
    routed = [_of_task(as_reward(reward), task, column) for task, reward in rewards.items()]
    return composite_of(ByTask(tuple(rewards), column), *routed)


def _of_task(reward: Reward, task: str, column: str) -> Reward:
    def shown(leaf: Leaf) -> Leaf:
        return (AsyncTaskReward if is_async(leaf) else TaskReward)(leaf, task=task, column=column)

    return reward.map_leaves(shown)


def routes_of(reward: Any) -> Iterator[tuple[str, str]]:
    """Task and column of each route in a reward; none where it is no reward of the algebra."""
    for node in rewards_in(reward) if isinstance(reward, Reward) else ():
        if is_composite(node) and isinstance(node.op, ByTask):
            yield from ((task, node.op.column) for task in node.op.tasks)
