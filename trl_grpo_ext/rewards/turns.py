"""Rewards that look at more than one answer: a whole conversation at its end, or the plan behind an implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Reward, is_async
from .leaves import Leaf, as_reward, callable_name

Rows = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """A reward function that shows `leaf` another view of the rows, and leaves out rows that have none."""

    leaf: Leaf
    view: Callable[[Rows], Rows | None]

    @property
    def __name__(self) -> str:
        return callable_name(self.view)

    def __call__(self, **call) -> list[float | None]:
        positions, shown = self._show(call)
        return self._back(call, positions, self.leaf.evaluate(shown) if positions else [])

    def _show(self, call: Rows) -> tuple[list[int], Rows]:
        count = len(call["completions"])
        columns = {
            name: value for name, value in call.items() if isinstance(value, list | tuple) and len(value) == count
        }
        views = [self.view({name: column[row] for name, column in columns.items()}) for row in range(count)]
        positions = [row for row, seen in enumerate(views) if seen is not None]
        rows = [seen for seen in views if seen is not None]
        return positions, {**call, **{name: [row[name] for row in rows] for name in columns}}

    def _back(self, call: Rows, positions: list[int], values: list[float | None]) -> list[float | None]:
        of_row = dict(zip(positions, values, strict=True))
        return [of_row.get(row) for row in range(len(call["completions"]))]


@dataclass(frozen=True)
class AsyncSeen(Seen):
    """The same around an async leaf."""

    async def __call__(self, **call) -> list[float | None]:  # type: ignore[override]
        positions, shown = self._show(call)
        return self._back(call, positions, await self.leaf.evaluate(shown) if positions else [])


def whole_conversation(row: Rows) -> Rows | None:
    """The last turn as one completion with all that came after the first answer began; no view of other turns."""
    if not row.get("last_turn", True):
        return None
    history, num_answers = row["prompts"], row.get("turn", 1) - 1
    answered = [i for i, message in enumerate(history) if isinstance(message, dict) and message["role"] == "assistant"]
    start = answered[-num_answers] if num_answers else len(history)
    return {**row, "prompts": history[:start], "completions": history[start:] + row["completions"]}


def plan_alone(row: Rows) -> Rows:
    """The plan in place of the implementation."""
    if "plan" not in row:
        raise KeyError(
            "of_plan needs the column 'plan', which the hierarchical rollout gives: set rollout='hierarchical'"
        )
    plan = [{"role": "assistant", "content": row["plan"]}]
    return {**row, "prompts": row["prompts"][:-2], "completions": plan, "completion_ids": row.get("plan_ids")}


def at_end(reward: Any) -> Reward:
    """
    A reward that is asked once, at the end of a conversation, and sees all of it.

    For `rollout="multi_turn"`. The prompt is what came before the first answer, and the completion holds all messages
    from the first answer on. Other turns get `None`.

    Args:
        reward ([`Reward`], or what [`as_reward`] takes):
            Reward of a whole conversation. Each part of it goes by its name and `_at_end`.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> reward = at_end(Length("characters"))
    >>> say = lambda role, content: {"role": role, "content": content}
    >>> history = [say("user", "Hi"), say("assistant", "Hello"), say("user", "Bye")]
    >>> completions = [[say("assistant", "Hello")], [say("assistant", "See you")]]
    >>> reward(prompts=[history[:1], history], completions=completions, turn=[1, 2], last_turn=[False, True])
    [None, 13.0]

    ```
    """
    return _seen(reward, whole_conversation, "{name}_at_end")


def of_plan(reward: Any) -> Reward:
    """
    A reward of the plan, added to that of each of its implementations.

    For `rollout="hierarchical"`, whose reward functions otherwise see implementations. All implementations of a plan
    get the same, so this moves the plan's credit alone.

    Args:
        reward ([`Reward`], or what [`as_reward`] takes):
            Reward of the plan as a completion. Each part of it goes by its name and `_of_plan`.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> of_plan(Length("characters"))(prompts=[[]], completions=[[]], plan=["first this"])
    [10.0]

    ```
    """
    return _seen(reward, plan_alone, "{name}_of_plan")


def _seen(reward: Any, view: Callable, name: str) -> Reward:
    def wrap(leaf: Leaf) -> Leaf:
        wrapped = as_reward((AsyncSeen if is_async(leaf) else Seen)(leaf, view), name.format(name=leaf.name))
        assert isinstance(wrapped, Leaf)
        return wrapped

    return as_reward(reward).map_leaves(wrap)
