"""Combinators of the reward algebra: pure functions of one row's values, as frozen dataclasses.

A value is a `float`, or `None` for "this reward does not apply to this row". `strict` combinators give `None` as soon
as one operand is `None`; the others say below what they do. Whatever the combinator, a row to which none of its
*rewards* applies is `None`: a constant or a schedule beside them does not bring it back. [`~.base.Composite`] sees to
both.

`source` writes a combinator as Python, `label` as a metric name (`describe.py` names sums); `binds` holds, per operand,
how tightly an operand must bind to go without parentheses.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

COMPARISON, SUM, PRODUCT, SIGN, ATOM = range(1, 6)  # precedence, loosest first

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Op:
    """What all combinators have. `precedence` is that of the expression `source` writes."""

    strict: ClassVar[bool] = True
    precedence: ClassVar[int] = ATOM
    binds: ClassVar[tuple[int, ...]] = ()

    # `Any`: a strict combinator gets numbers alone, the others `None` as well.
    def __call__(self, *values: Any) -> float | None:
        raise NotImplementedError

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
    """`a / b`; a zero divisor is an error of the row."""

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
    """`a > b` and its kin: 1.0 where it holds, else 0.0."""

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
    `value.where(condition, otherwise)`: `None` where the condition is `None`, and else the branch that was taken. The
    composite looks at no other branch, so that `(a / b).where(b > 0)` never divides by zero.
    """

    strict = False
    binds = (ATOM, 0, 0)

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
