"""Composites: what the operators of a reward make, and `minimum` and `maximum`.

Calling a composite first evaluates its distinct leaves (once each, async ones concurrently), then walks the tree row by
row. Only the first half can be async: hence one sync and one async class, between which `compose` chooses.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..host.calls import is_async
from . import ops
from .base import Operand, Reward, Value, compose
from .describe import describe, weights
from .schedules import Constant, Schedule, training_progress
from .scoring import RewardError, number_or_problem

if TYPE_CHECKING:
    from .leaves import Leaf


@dataclass(frozen=True, repr=False)
class Composite(Reward):
    """
    A combinator over rewards, schedules and constants; made by the operators and methods of [`Reward`].

    Where TRL's `log_metric` and `log_extra` are among the keyword arguments, each distinct leaf logs its raw mean as
    `rewards/{leaf}/mean` and its raw values as a column of the completions table, and each scheduled weight logs
    `reward_weights/{what it weighs}`.
    """

    op: ops.Op
    children: tuple[Operand, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        names = [leaf.name for leaf in self.leaves()]
        if not names:
            raise TypeError(
                f"{self!r} holds no reward: pass one at least, for numbers alone Python has its own functions"
            )
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f'two different rewards are called {name!r}: tell them apart with .named("another name")'
                )
        if self.__name__ in names:
            raise ValueError(
                f"{self.__name__!r} is the name of a reward inside it, and their metrics would mix: choose another one"
            )

    @property
    def __name__(self) -> str:
        return describe(self, naming=True)

    def __repr__(self) -> str:
        return describe(self, naming=False)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **kwargs}
        return self._combine(call, [leaf.evaluate(call) for leaf in self.leaves()])

    def nodes(self) -> Iterator[Reward]:
        """This node and all rewards below it, as often as they occur."""
        yield self
        for child in self.children:
            if isinstance(child, Composite):
                yield from child.nodes()
            elif isinstance(child, Reward):
                yield child

    def leaves(self) -> list["Leaf"]:
        distinct: list[Leaf] = []
        for node in self.nodes():
            if not isinstance(node, Composite):
                distinct += [leaf for leaf in node.leaves() if leaf not in distinct]
        return distinct

    def map_leaves(self, change: Callable[["Leaf"], "Leaf"]) -> "Composite":
        children = (child.map_leaves(change) if isinstance(child, Reward) else child for child in self.children)
        return replace(self, children=tuple(children))

    def _combine(self, call: dict[str, Any], columns: list[list[Value]]) -> list[Value]:
        """Log the leaves' values, then walk the tree once per row."""
        leaves, progress = self.leaves(), training_progress(call.get("trainer_state"))
        log_metric, log_extra = call.get("log_metric"), call.get("log_extra")
        for leaf, values in zip(leaves, columns, strict=True):
            present = [value for value in values if value is not None]
            if log_metric and present:
                log_metric(f"rewards/{leaf.name}/mean", sum(present) / len(present))
            if log_extra:
                log_extra(leaf.name, values)
        if log_metric:
            for node in self.nodes():
                for weight, weighed in weights(node):
                    if not isinstance(weight, Constant):
                        log_metric(f"reward_weights/{weighed.__name__}", weight(progress))
        # By identity, since comparing leaves for every row and occurrence would be slow.
        of_leaf = {id(leaf): columns[leaves.index(leaf)] for node in self.nodes() for leaf in node.leaves()}
        skip = all(leaf.skips for leaf in leaves)
        results: list[Value] = []
        errors = 0
        for row in range(len(call["completions"])):
            try:
                results.append(self._value(row, of_leaf, progress))
            except RewardError:
                if not skip:
                    raise
                results.append(None)
                errors += 1
        if skip and log_metric:
            log_metric(f"rewards/{self.__name__}/errors", float(errors))
        return results

    def _value(self, row: int, of_leaf: dict[int, list[Value]], progress: float) -> Value:
        def look(operand: Operand) -> Value:
            if isinstance(operand, Schedule):
                return operand(progress)
            return (
                operand._value(row, of_leaf, progress) if isinstance(operand, Composite) else of_leaf[id(operand)][row]
            )

        if isinstance(self.op, ops.Where):
            value, condition, otherwise = self.children
            holds = look(condition)
            return None if holds is None else look(value if holds else otherwise)
        values = [look(child) for child in self.children]
        none = [value is None for value, child in zip(values, self.children, strict=True) if isinstance(child, Reward)]
        if all(none) or (self.op.strict and any(none)):
            return None
        try:
            result, problem = number_or_problem(self.op(*values))
        except ArithmeticError:
            result, problem = None, "is not a finite number"
        if problem is not None:
            remedy = "divide only .where(divisor > 0)" if isinstance(self.op, ops.Divide) else "clip the operands"
            raise RewardError(
                f"reward {self.__name__!r}, row {row}: {self.op.source(*map(str, values))} {problem}: "
                f'{remedy}, or leave such rows out with .on_error("skip")'
            )
        return result


@dataclass(frozen=True, repr=False)
class AsyncComposite(Composite):
    """A composite with an async leaf. Async leaves run concurrently, and beside them one thread runs the others."""

    async def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[Value]:
        call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **kwargs}
        leaves = self.leaves()
        blocking = [leaf for leaf in leaves if not is_async(leaf)]
        waiting = [leaf for leaf in leaves if is_async(leaf)]
        ready, *awaited = await asyncio.gather(
            asyncio.to_thread(lambda: [leaf.evaluate(call) for leaf in blocking]),
            *(leaf.evaluate(call) for leaf in waiting),
            return_exceptions=True,  # so that no coroutine is left running when another one fails
        )
        for result in (ready, *awaited):
            if isinstance(result, BaseException):
                raise result
        columns = {id(leaf): values for leaf, values in zip(blocking + waiting, [*ready, *awaited], strict=True)}
        return self._combine(call, [columns[id(leaf)] for leaf in leaves])


def minimum(*operands: Any) -> Composite:
    """
    The smallest operand, per row, over those that are not `None`; `None` where no reward among them applies.

    Args:
        operands ([`Reward`], `float`, schedule or TRL reward function):
            At least one of them a reward.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> minimum(Length("characters"), 3)(prompts=["", ""], completions=["ab", "abcde"])
    [2.0, 3.0]

    ```
    """
    return compose(ops.Extreme("minimum"), *operands)


def maximum(*operands: Any) -> Composite:
    """
    The largest operand, per row, over those that are not `None`; `None` where no reward among them applies.

    Args:
        operands ([`Reward`], `float`, schedule or TRL reward function):
            At least one of them a reward.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> maximum(Length("characters"), 3)(prompts=["", ""], completions=["ab", "abcde"])
    [3.0, 5.0]

    ```
    """
    return compose(ops.Extreme("maximum"), *operands)
