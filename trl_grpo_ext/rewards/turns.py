"""Rewards that see something else than one answer: a whole conversation at its end, or the plan of an answer."""

from dataclasses import dataclass
from typing import Any

from ..host.calls import is_async
from .algebra import AsyncLeaf, Leaf, Reward, Value, as_reward
from .errors import CallError

Row = dict[str, Any]  # the columns of one row, or those of a whole call


def whole_conversation(row: Row) -> Row | None:
    """The last turn, with all messages from the first answer on as its completion. Other turns have no view."""
    if not row.get("last_turn", True):
        return None
    history, num_answers = row["prompts"], row.get("turn", 1) - 1
    answered = [i for i, message in enumerate(history) if isinstance(message, dict) and message["role"] == "assistant"]
    start = answered[-num_answers] if num_answers else len(history)
    # The token ids of the row are of the last answer alone.
    whole = {"prompts": history[:start], "completions": history[start:] + row["completions"], "completion_ids": None}
    return row | whole


def plan_alone(row: Row) -> Row:
    """The plan in place of the implementation."""
    if "plan" not in row:
        raise CallError(
            "of_plan needs the column 'plan', which the hierarchical rollout gives: set rollout='hierarchical'"
        )
    plan = [{"role": "assistant", "content": row["plan"]}]
    return {**row, "prompts": row["prompts"][:-2], "completions": plan, "completion_ids": row.get("plan_ids")}


VIEWS = {"at_end": whole_conversation, "of_plan": plan_alone}


@dataclass(frozen=True, repr=False)
class ViewReward(Leaf):
    """A leaf that shows another leaf a view of each row. A row without a view gets `None`. See [`at_end`]."""

    leaf: Leaf
    view: str

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        positions, call = self._show({"prompts": prompts, "completions": completions, **kwargs}, completion_ids)
        return self._back(positions, self.leaf.evaluate(call) if positions else [], len(completions))

    def see(self, row: Row) -> Row | None:
        """What the leaf is shown of a row; `None` where it is not asked about it."""
        return VIEWS[self.view](row)

    @property
    def default_name(self) -> str:
        return f"{self.leaf.name}_{self.view}"

    def _constructor(self) -> str:
        named = "" if self.name == self.default_name else f".named({self.name!r})"
        return f"{self.view}({self.leaf!r}){named}"

    def _show(self, call: Row, completion_ids: list[list[int]] | None) -> tuple[list[int], Row]:
        count = len(call["completions"])
        call = {**call, "completion_ids": completion_ids or [None] * count}
        columns = {name: column for name, column in call.items() if isinstance(column, list) and len(column) == count}
        views = [self.see({name: column[row] for name, column in columns.items()}) for row in range(count)]
        rows = [view for view in views if view is not None]
        shown = {**call, **{name: [row[name] for row in rows] for name in columns}}
        if None in shown["completion_ids"]:
            shown["completion_ids"] = None
        positions = [position for position, view in enumerate(views) if view is not None]
        log_extra = call.get("log_extra")
        if log_extra:  # a column of the table has all rows
            shown["log_extra"] = lambda column, values: log_extra(column, self._back(positions, values, count))
        return positions, shown

    def _back(self, positions: list[int], values: list[Value], count: int) -> list[Value]:
        of_row = dict(zip(positions, values, strict=True))
        return [of_row.get(row) for row in range(count)]


@dataclass(frozen=True, repr=False)
class AsyncViewReward(AsyncLeaf, ViewReward):
    """A view for an async leaf."""

    async def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[Value]:
        positions, call = self._show({"prompts": prompts, "completions": completions, **kwargs}, completion_ids)
        return self._back(positions, await self.leaf.evaluate(call) if positions else [], len(completions))


def at_end(reward: Any) -> Reward:
    """
    A reward that is asked once, at the end of a conversation, and sees the whole conversation.

    For `rollout="multi_turn"`. The prompt is what comes before the first answer. The completion holds all messages from
    the first answer on. There are no `completion_ids`, so count lengths in words or characters. Other turns get `None`.

    Args:
        reward ([`Reward`], or what [`as_reward`] takes):
            Reward of a whole conversation. `_at_end` is added to the name of each leaf.

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
    return _viewed(reward, "at_end")


def of_plan(reward: Any) -> Reward:
    """
    A reward that sees the plan in place of its implementation.

    For `rollout="hierarchical"`, where other rewards see implementations. All implementations of a plan get the same
    value, so it changes the credit of the plan alone.

    Args:
        reward ([`Reward`], or what [`as_reward`] takes):
            Reward of the plan as a completion. `_of_plan` is added to the name of each leaf.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> of_plan(Length("characters"))(prompts=[[]], completions=[[]], plan=["first this"])
    [10.0]

    ```
    """
    return _viewed(reward, "of_plan")


def _viewed(reward: Any, view: str) -> Reward:
    return as_reward(reward).map_leaves(lambda leaf: (AsyncViewReward if is_async(leaf) else ViewReward)(leaf, view))
