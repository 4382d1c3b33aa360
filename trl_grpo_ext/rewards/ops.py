"""Operators: what each one computes for a row, how it reads, and the Python operators and methods that apply it.

A value is a `float`, or `None` for "this reward does not apply to this row". A `strict` operator gives `None` as soon
as one operand is `None`; the others say below what they do. With every operator, a row to which none of its *rewards*
applies gets `None`: a constant or a schedule beside them does not change that.

To add an operator, write an [`Op`] and a method of [`Operators`] that applies it, and add a line to the conformance
test.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from .schedules import Schedule

COMPARISON, SUM, PRODUCT, SIGN, ATOM = range(1, 6)  # precedence, loosest first

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Op:
    """
    An operator: a pure function of one row's values.

    `source` writes it as Python and `label` as a metric name; `naming.py` names sums. `precedence` tells how tightly
    the text of `source` binds, and `binds` how tightly each operand must bind to stand without parentheses.
    """

    strict: ClassVar[bool] = True
    precedence: ClassVar[int] = ATOM
    binds: ClassVar[tuple[int, ...]] = ()

    # `Any`: a strict operator gets numbers alone, the others `None` as well.
    def __call__(self, *values: Any) -> float | None:
        raise NotImplementedError

    def of_row(self, operands: Sequence[Any], look: Callable[[Any], float | None]) -> float | None:
        """The value for one row, where `look(operand)` is the value of an operand."""
        values = [look(operand) for operand in operands]
        missing = [
            value is None for value, operand in zip(values, operands, strict=True) if not isinstance(operand, Schedule)
        ]
        return None if all(missing) or (self.strict and any(missing)) else self(*values)

    def source(self, *parts: str) -> str:
        raise NotImplementedError

    def label(self, *parts: str) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Add(Op):
    """`a + b`; a term that is `None` is left out, as TRL does across reward functions."""

    strict = False
    precedence = SUM
    binds = (SUM, PRODUCT)

    def __call__(self, *values: float | None) -> float | None:
        left, right = values
        if left is None or right is None:
            return right if left is None else left
        return left + right

    def source(self, *parts: str) -> str:
        return " + ".join(parts)


@dataclass(frozen=True)
class Subtract(Op):
    """`a - b`, that is `a + (-b)`: a term that is `None` is left out."""

    strict = False
    precedence = SUM
    binds = (SUM, PRODUCT)

    def __call__(self, *values: float | None) -> float | None:
        left, right = values
        if right is None:
            return left
        return -right if left is None else left - right

    def source(self, *parts: str) -> str:
        return " - ".join(parts)


@dataclass(frozen=True)
class Multiply(Op):
    """`a * b`."""

    precedence = PRODUCT
    binds = (PRODUCT, SIGN)

    def __call__(self, *values: float) -> float:
        return values[0] * values[1]

    def source(self, *parts: str) -> str:
        return " * ".join(parts)

    def label(self, *parts: str) -> str:
        return "*".join(parts)


@dataclass(frozen=True)
class Divide(Op):
    """`a / b`; a divisor of zero is an error of its row."""

    precedence = PRODUCT
    binds = (PRODUCT, SIGN)

    def __call__(self, *values: float) -> float:
        return values[0] / values[1]

    def source(self, *parts: str) -> str:
        return " / ".join(parts)

    def label(self, *parts: str) -> str:
        return "_per_".join(parts)  # trackers read a slash as a folder


@dataclass(frozen=True)
class Negate(Op):
    """`-a`."""

    precedence = SIGN
    binds = (SIGN,)

    def __call__(self, *values: float) -> float:
        return -values[0]

    def source(self, *parts: str) -> str:
        return f"-{parts[0]}"

    def label(self, *parts: str) -> str:
        return f"-{parts[0]}"


@dataclass(frozen=True)
class Compare(Op):
    """`a > b`, `a >= b`, `a < b` and `a <= b`: 1.0 where the comparison holds, else 0.0."""

    symbol: str

    precedence = COMPARISON
    binds = (SUM, SUM)

    def __call__(self, *values: float) -> float:
        return float(_COMPARISONS[self.symbol](*values))

    def source(self, *parts: str) -> str:
        return f" {self.symbol} ".join(parts)

    def label(self, *parts: str) -> str:
        return self.symbol.join(parts)


@dataclass(frozen=True)
class Clip(Op):
    """`a.clip(low, high)`."""

    low: float
    high: float

    binds = (ATOM,)

    def __post_init__(self) -> None:
        if math.isnan(self.low) or math.isnan(self.high):
            raise ValueError(f"clip: low={self.low}, high={self.high}: a bound is not a number: pass numbers")
        if self.low > self.high:
            raise ValueError(f"clip: low={self.low} exceeds high={self.high}: swap them")
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def __call__(self, *values: float) -> float:
        return min(max(values[0], self.low), self.high)

    def source(self, *parts: str) -> str:
        bounds = {"low": self.low, "high": self.high}
        given = ", ".join(f"{name}={bound}" for name, bound in bounds.items() if math.isfinite(bound))
        return f"{parts[0]}.clip({given})"

    def label(self, *parts: str) -> str:
        return f"clip({parts[0]})"


@dataclass(frozen=True)
class Where(Op):
    """
    `value.where(condition, otherwise)`: `None` where the condition is `None`, else the branch that the condition takes.

    The other branch is not evaluated, so that `(a / b).where(b > 0)` never divides by zero.
    """

    strict = False
    binds = (ATOM, 0, 0)

    def of_row(self, operands: Sequence[Any], look: Callable[[Any], float | None]) -> float | None:
        value, condition, otherwise = operands
        holds = look(condition)
        return None if holds is None else look(value if holds else otherwise)

    def source(self, *parts: str) -> str:
        value, condition, otherwise = parts
        return f"{value}.where({condition}{'' if otherwise == '0.0' else f', {otherwise}'})"

    def label(self, *parts: str) -> str:
        value, condition, otherwise = parts
        return f"where({value},{condition}{'' if otherwise == '0' else f',{otherwise}'})"


@dataclass(frozen=True)
class Extreme(Op):
    """`minimum(a, b, ...)` and `maximum(a, b, ...)`, over the operands that are not `None`."""

    which: str  # "minimum" or "maximum"

    strict = False

    def __call__(self, *values: float | None) -> float:
        pick = min if self.which == "minimum" else max
        return pick(value for value in values if value is not None)

    def source(self, *parts: str) -> str:
        return f"{self.which}({', '.join(parts)})"

    def label(self, *parts: str) -> str:
        return f"{self.which}({','.join(parts)})"


R = TypeVar("R")  # the kind of reward that the operators return: `Reward`


class Operators(Generic[R]):
    """The arithmetic of rewards. Each operator and method makes one new reward of its operands."""

    # Else an array times a reward would be an array of rewards.
    __array_ufunc__ = None

    def _join(self, op: Op, *operands: Any) -> R:
        """The reward of `op` over `operands`."""
        raise NotImplementedError

    def _infix(self, op: Op, left: Any, right: Any) -> R:
        # `NotImplemented` lets Python ask the other side, and then say which operator does not fit which types.
        return self._join(op, left, right) if is_operand(left) and is_operand(right) else NotImplemented

    def clip(self, low: float = -math.inf, high: float = math.inf) -> R:
        """The value, no lower than `low` and no higher than `high`."""
        return self._join(Clip(low, high), self)

    def threshold(self, at: float) -> R:
        """1.0 where the value is at least `at`, else 0.0; the same as `reward >= at`."""
        return self >= at

    def where(self, condition: Any, otherwise: Any = 0.0) -> R:
        """
        The value where `condition` holds (is not zero), else `otherwise`.

        Args:
            condition ([`Reward`]):
                Usually a comparison, such as `Harmlessness() > 0.5`. Rows where it is `None` become `None`.
            otherwise (`float`, [`Reward`] or schedule, *optional*, defaults to `0.0`):
                What the other rows get.
        """
        if not isinstance(condition, Operators):
            raise TypeError(f"where: condition={condition!r} is not a reward: pass a comparison such as reward > 0.5")
        return self._join(Where(), self, condition, otherwise)

    def __add__(self, other: Any) -> R:
        # `sum(rewards)` starts from 0, which shall leave no trace in the name.
        return self if isinstance(other, Real) and other == 0 else self._infix(Add(), self, other)  # type: ignore[return-value]

    def __radd__(self, other: Any) -> R:
        return self if isinstance(other, Real) and other == 0 else self._infix(Add(), other, self)  # type: ignore[return-value]

    def __sub__(self, other: Any) -> R:
        return self._infix(Subtract(), self, other)

    def __rsub__(self, other: Any) -> R:
        return self._infix(Subtract(), other, self)

    def __mul__(self, other: Any) -> R:
        return self._infix(Multiply(), self, other)

    def __rmul__(self, other: Any) -> R:
        return self._infix(Multiply(), other, self)

    def __truediv__(self, other: Any) -> R:
        if isinstance(other, Real) and other == 0:
            raise ZeroDivisionError(f"{self!r} / {other}: pass a divisor other than zero")
        return self._infix(Divide(), self, other)

    def __rtruediv__(self, other: Any) -> R:
        return self._infix(Divide(), other, self)

    def __neg__(self) -> R:
        return self._join(Negate(), self)

    def __gt__(self, other: Any) -> R:
        return self._infix(Compare(">"), self, other)

    def __ge__(self, other: Any) -> R:
        return self._infix(Compare(">="), self, other)

    def __lt__(self, other: Any) -> R:
        return self._infix(Compare("<"), self, other)

    def __le__(self, other: Any) -> R:
        return self._infix(Compare("<="), self, other)

    def __bool__(self) -> NoReturn:
        # Python turns `0.2 < reward < 0.8` into `(0.2 < reward) and (reward < 0.8)`, which would drop the first half.
        raise TypeError(
            f"{self!r} has no truth value before it is called: write (a > 0.2) * (a < 0.8) for `and`, maximum(...) for "
            "`or`, `is None` to ask whether there is a reward"
        )


def is_operand(x: Any) -> bool:
    """Whether a reward can be joined with `x`: a reward, a schedule, a number, or a TRL reward function."""
    return isinstance(x, Operators | Schedule | Real) or callable(x)
