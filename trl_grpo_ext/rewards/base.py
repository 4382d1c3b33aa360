"""The reward algebra: what every reward can do.

Operators and methods build composites (`composites.py`) over leaves (`leaves.py`). Combinators are in `ops.py`, names
and `repr` in `describe.py`, what guards a leaf against slowness and failure in `guards.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from ..host.calls import is_async
from . import ops
from .guards import Guard
from .schedules import Constant, Schedule

if TYPE_CHECKING:
    from .composites import Composite
    from .leaves import Leaf

Value: TypeAlias = float | None
Operand: TypeAlias = "Reward | Schedule"
Term: TypeAlias = "Operand | Real | float | Callable[..., Any]"  # what the operators take


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

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
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
                `"raise"` stops with a [`RewardError`]; the default of a reward, as long as none of `timeout`, `retry`,
                `concurrency` and `in_processes` is called. `"skip"`, their default, makes the offending rows `None`
                (all rows if a reward that is asked about all of them at once raised), warns, and counts them in the
                metric `rewards/{name}/errors`.
        """
        if action not in ("raise", "skip"):
            raise ValueError(f'on_error: {action!r} is unknown: choose "raise" or "skip"')
        return self.map_leaves(lambda leaf: replace(leaf, errors=action))

    def timeout(self, seconds: float) -> "Reward":
        """
        Give an async reward up on a row for which it has not answered in time. It is asked about each row alone.

        Args:
            seconds (`float`):
                For one attempt at one row, from when it is asked. A reward that does not await cannot be stopped: run
                it with [`in_processes`][trl_grpo_ext.rewards.Reward.in_processes].

        Raises:
            `TypeError`: for a sync reward that does not run in processes.
        """
        return self._guarded("timeout", timeout=float(seconds))

    def retry(self, times: int, wait: float = 1.0, max_wait: float = 30.0) -> "Reward":
        """
        Ask again about a row where the reward raised, took too long or returned no number. Each row is asked alone.

        The pause before the `n`-th retry is drawn uniformly from 0 to `min(max_wait, wait * 2 ** (n - 1))` seconds, so
        that rows that failed together do not come back together.

        Args:
            times (`int`):
                Most retries of a row.
            wait (`float`, *optional*, defaults to `1.0`):
                Longest pause before the first retry, in seconds.
            max_wait (`float`, *optional*, defaults to `30.0`):
                Longest pause before any retry, in seconds.
        """
        return self._guarded("retry", retries=times, wait=float(wait), max_wait=float(max_wait))

    def concurrency(self, limit: int) -> "Reward":
        """
        Ask an async reward about each row alone, about at most `limit` of them at once.

        Args:
            limit (`int`):
                Rows at once, for each process of the training. 16 where only `timeout` or `retry` is called.

        Raises:
            `TypeError`: for a sync reward.
        """
        return self._guarded("concurrency", at_once=limit)

    def in_processes(self, count: int, timeout: float = 60.0) -> "Reward":
        """
        Run a sync reward in processes of its own, a row at a time: one that never returns or crashes costs its row.

        The reward must be picklable, so its function has to stand at the top of a module, and a script that uses this
        needs `if __name__ == "__main__":`. It gets the dataset columns, but not `trainer_state`, `environments`,
        `log_metric` and `log_extra`. Processes start at the first call, are kept, and are replaced when they die. They
        contain accidents; they are no sandbox for hostile code.

        Args:
            count (`int`):
                Processes for each process of the training.
            timeout (`float`, *optional*, defaults to `60.0`):
                Seconds for one attempt at one row. Then the process is killed, with all that it started.

        Raises:
            `TypeError`: for an async reward, and for one that cannot be pickled.
        """
        return self._guarded("in_processes", processes=count, timeout=float(timeout))

    def _guarded(self, method: str, **changes: Any) -> "Reward":
        return self.map_leaves(
            lambda leaf: replace(leaf, guard=(leaf.guard or Guard()).changed(leaf, is_async(leaf), method, changes))
        )

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

    def __add__(self, other: "Term") -> "Reward":
        # `sum(rewards)` starts from 0, which shall leave no trace in the name.
        return self if isinstance(other, Real) and other == 0 else _infix(ops.Add(), self, other)

    def __radd__(self, other: "Term") -> "Reward":
        return self if isinstance(other, Real) and other == 0 else _infix(ops.Add(), other, self)

    def __sub__(self, other: "Term") -> "Reward":
        return _infix(ops.Subtract(), self, other)

    def __rsub__(self, other: "Term") -> "Reward":
        return _infix(ops.Subtract(), other, self)

    def __mul__(self, other: "Term") -> "Reward":
        return _infix(ops.Multiply(), self, other)

    def __rmul__(self, other: "Term") -> "Reward":
        return _infix(ops.Multiply(), other, self)

    def __truediv__(self, other: "Term") -> "Reward":
        if isinstance(other, Real) and other == 0:
            raise ZeroDivisionError(f"{self!r} / {other}: pass a divisor other than zero")
        return _infix(ops.Divide(), self, other)

    def __rtruediv__(self, other: "Term") -> "Reward":
        return _infix(ops.Divide(), other, self)

    def __neg__(self) -> "Reward":
        return compose(ops.Negate(), self)

    def __gt__(self, other: "Term") -> "Reward":
        return _infix(ops.Compare(">"), self, other)

    def __ge__(self, other: "Term") -> "Reward":
        return _infix(ops.Compare(">="), self, other)

    def __lt__(self, other: "Term") -> "Reward":
        return _infix(ops.Compare("<"), self, other)

    def __le__(self, other: "Term") -> "Reward":
        return _infix(ops.Compare("<="), self, other)

    def __bool__(self) -> NoReturn:
        # Python turns `0.2 < reward < 0.8` into `(0.2 < reward) and (reward < 0.8)`, which would drop the first half.
        raise TypeError(
            f"{self!r} has no truth value before it is called: write (a > 0.2) * (a < 0.8) for `and`, maximum(...) for "
            "`or`, `is None` to ask whether there is a reward"
        )


def is_operand(x: Any) -> bool:
    """Whether the algebra takes `x`: a reward, a schedule, a number, or a TRL reward function."""
    return isinstance(x, Reward | Schedule | Real) or callable(x)


def compose(op: ops.Op, *operands: Any) -> "Composite":
    """The composite of `op` over rewards, schedules, numbers and TRL reward functions, async where a leaf is."""
    from .composites import AsyncComposite, Composite

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


def _infix(op: ops.Op, left: Term, right: Term) -> Reward:
    # `NotImplemented` lets Python ask the other side, and then say which operator does not fit which types.
    return compose(op, left, right) if is_operand(left) and is_operand(right) else NotImplemented
