"""The reward algebra: what every reward can do, and the composites that its operators make.

Calling a composite first evaluates its distinct leaves (once each, async ones concurrently), then walks the tree row by
row. Only the first half can be async: hence one sync and one async class of composite, and `compose` chooses. Leaves
are in `leaves.py`, combinators in `ops.py`, names and `repr` in `describe.py`.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import ops
from .describe import describe, weights
from .schedules import Constant, Schedule, training_progress
from .scoring import RewardError

if TYPE_CHECKING:
    from .leaves import Leaf

Value: TypeAlias = float | None
Operand: TypeAlias = "Reward | Schedule"


def is_async(function: Callable) -> bool:
    """Whether calling `function` gives a coroutine, as TRL's `is_async_callable` does (without needing TRL)."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


@dataclass(frozen=True)
class Reward:
    """
    A TRL reward function that composes: `1.0 * Relevance("reference") + 0.5 * Harmlessness() - 0.001 * Length()`.

    Call it as TRL does, with keyword arguments `prompts`, `completions`, `completion_ids` and the dataset columns; it
    returns one `float` or `None` per completion. Rewards are immutable: every operator and method returns a new one.
    Make one from a function, a model or a hub id with [`as_reward`], or use the ready ones of this package.

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import as_reward
    >>> def digits(completions, **kwargs):
    ...     return [float(sum(character.isdigit() for character in text)) for text in completions]
    >>> reward = as_reward(digits).clip(0, 2) + 0.5 * as_reward(digits)
    >>> reward(prompts=["", ""], completions=["4 + 4 = 8", "eight"])
    [3.5, 0.0]
    >>> reward
    as_reward(digits).clip(low=0.0, high=2.0) + 0.5 * as_reward(digits)
    >>> reward.__name__
    'clip(digits)+digits'

    ```
    """

    # Else an array times a reward would be an array of rewards.
    __array_ufunc__ = None

    def __call__(self, prompts: list, completions: list, completion_ids: list | None = None, **kwargs) -> Any:
        """One value per completion: a list, or a coroutine of a list where the tree holds an async reward."""
        raise NotImplementedError

    @staticmethod
    def of(x: Any, name: str | None = None) -> "Reward":
        """[`as_reward`] under another name."""
        from .leaves import as_reward

        return as_reward(x, name)

    def leaves(self) -> list["Leaf"]:
        """The distinct leaves of the tree, from left to right."""
        raise NotImplementedError

    def map_leaves(self, change: Callable[["Leaf"], "Leaf"]) -> "Reward":
        """The same tree with every leaf replaced by `change(leaf)`."""
        raise NotImplementedError

    def named(self, name: str) -> "Reward":
        """The same reward under another name: that of its metrics and of its column in the completions table."""
        if not name:
            raise ValueError(f"named: {name!r} is empty: pass the name that the logs shall show")
        return replace(self, name=name)  # type: ignore[call-arg]

    def cached(self, max_size: int = 10_000) -> "Reward":
        """
        Remember values, for deterministic rewards that are expensive to compute.

        A composite caches each of its leaves, so that schedules keep moving. Values are kept per prompt, completion,
        completion ids and all dataset columns of the row. A cached reward is called with the rows it does not know, and
        without `trainer_state`, `environments`, `log_metric` and `log_extra`: its value must depend on the row alone.
        What is remembered is not pickled.

        Args:
            max_size (`int`, *optional*, defaults to `10_000`):
                Values to keep per leaf; the least recently used ones go first.
        """
        if max_size < 1:
            raise ValueError(f"cached: max_size={max_size} keeps nothing: pass at least 1")
        return self.map_leaves(lambda leaf: replace(leaf, cache_size=max_size))

    def on_error(self, action: Literal["raise", "skip"]) -> "Reward":
        """
        What happens when a leaf raises or returns something that is no finite number.

        Args:
            action (`str`):
                `"raise"` (the default of every reward) stops with a [`RewardError`]. `"skip"` makes the offending rows
                `None` (all rows if it raised), warns, and counts them in the metric `rewards/{name}/errors`.
        """
        if action not in ("raise", "skip"):
            raise ValueError(f'on_error: {action!r} is unknown: choose "raise" or "skip"')
        return self.map_leaves(lambda leaf: replace(leaf, errors=action))

    def clip(self, low: float = -math.inf, high: float = math.inf) -> "Reward":
        """The value, no lower than `low` and no higher than `high`."""
        return compose(ops.Clip(low, high), self)

    def threshold(self, at: float) -> "Reward":
        """1.0 where the value is at least `at`, else 0.0; the same as `reward >= at`."""
        return self >= at

    def where(self, condition: "Reward", otherwise: Any = 0.0) -> "Reward":
        """
        The value where `condition` holds (is not zero), else `otherwise`.

        Args:
            condition ([`Reward`]):
                Usually a comparison, such as `Harmlessness() > 0.5`. Rows where it is `None` become `None`.
            otherwise (`float`, [`Reward`] or schedule, *optional*, defaults to `0.0`):
                What the other rows get.
        """
        if not isinstance(condition, Reward):
            raise TypeError(f"where: condition={condition!r} is not a reward: pass a comparison such as reward > 0.5")
        return compose(ops.Where(), self, condition, otherwise)

    def __add__(self, other):
        # `sum(rewards)` starts from 0, which shall leave no trace in the name.
        return self if isinstance(other, Real) and other == 0 else _infix(ops.Add(), self, other)

    def __radd__(self, other):
        return self if isinstance(other, Real) and other == 0 else _infix(ops.Add(), other, self)

    def __sub__(self, other):
        return _infix(ops.Subtract(), self, other)

    def __rsub__(self, other):
        return _infix(ops.Subtract(), other, self)

    def __mul__(self, other):
        return _infix(ops.Multiply(), self, other)

    def __rmul__(self, other):
        return _infix(ops.Multiply(), other, self)

    def __truediv__(self, other):
        if isinstance(other, Real) and other == 0:
            raise ZeroDivisionError(f"{self!r} / {other}: pass a divisor other than zero")
        return _infix(ops.Divide(), self, other)

    def __rtruediv__(self, other):
        return _infix(ops.Divide(), other, self)

    def __neg__(self):
        return compose(ops.Negate(), self)

    def __gt__(self, other):
        return _infix(ops.Compare(">"), self, other)

    def __ge__(self, other):
        return _infix(ops.Compare(">="), self, other)

    def __lt__(self, other):
        return _infix(ops.Compare("<"), self, other)

    def __le__(self, other):
        return _infix(ops.Compare("<="), self, other)

    def __bool__(self):
        # Python turns `0.2 < reward < 0.8` into `(0.2 < reward) and (reward < 0.8)`, which would drop the first half.
        raise TypeError(
            f"{self!r} has no truth value before it is called: write (a > 0.2) * (a < 0.8) for `and`, maximum(...) for "
            "`or`, `is None` to ask whether there is a reward"
        )


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

    def __post_init__(self):
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

    def __call__(self, prompts: list, completions: list, completion_ids: list | None = None, **kwargs) -> Any:
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
        skip = all(leaf.errors == "skip" for leaf in leaves)
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
            result = self.op(*values)
            finite = result is None or math.isfinite(result)
        except ArithmeticError:
            finite = False
        if not finite:
            remedy = "divide only .where(divisor > 0)" if isinstance(self.op, ops.Divide) else "clip the operands"
            raise RewardError(
                f"reward {self.__name__!r}, row {row}: {self.op.source(*map(str, values))} is not a finite number: "
                f'{remedy}, or leave such rows out with .on_error("skip")'
            )
        return result


@dataclass(frozen=True, repr=False)
class AsyncComposite(Composite):
    """A composite with an async leaf. Async leaves run concurrently, and beside them one thread runs the others."""

    async def __call__(self, prompts, completions, completion_ids=None, **kwargs) -> list[Value]:
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


def is_operand(x: Any) -> bool:
    """Whether the algebra takes `x`: a reward, a schedule, a number, or a TRL reward function."""
    return isinstance(x, Reward | Schedule | Real) or callable(x)


def compose(op: ops.Op, *operands: Any) -> Composite:
    """The composite of `op` over rewards, schedules, numbers and TRL reward functions, async where a leaf is."""
    children: list[Operand] = []
    for operand in operands:
        if not is_operand(operand):
            raise TypeError(f"{operand!r} is no reward, reward function, schedule or number: pass one of these")
        if isinstance(operand, Reward | Schedule):
            children.append(operand)
        else:
            children.append(Constant(operand) if isinstance(operand, Real) else Reward.of(operand))  # type: ignore[arg-type]
    leaves = [leaf for child in children if isinstance(child, Reward) for leaf in child.leaves()]
    return (AsyncComposite if any(map(is_async, leaves)) else Composite)(op, tuple(children))


def _infix(op: ops.Op, left: Any, right: Any) -> Any:
    # `NotImplemented` lets Python ask the other side, and then say which operator does not fit which types.
    return compose(op, left, right) if is_operand(left) and is_operand(right) else NotImplemented


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
