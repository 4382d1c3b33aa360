"""Schedules: a reward weight that follows the training progress.

A schedule is a frozen dataclass that maps progress, a float in [0, 1], to a value. It goes wherever the reward algebra
takes a number: `linear(0, 1) * Length()`, `Length() < linear(200, 50)`.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def training_progress(trainer_state: Any) -> float:
    """
    Share of the training that is done: `global_step / max_steps`, in [0, 1].

    Args:
        trainer_state ([`~transformers.TrainerState`] or `None`):
            The `trainer_state` that TRL hands to reward functions.

    Returns:
        `float`:
            Progress in [0, 1]; `0.0` without a state, and while `max_steps` is not known.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> training_progress(SimpleNamespace(global_step=30, max_steps=120))
    0.25
    >>> training_progress(None)
    0.0

    ```
    """
    if trainer_state is None or trainer_state.max_steps <= 0:
        return 0.0
    share: float = trainer_state.global_step / trainer_state.max_steps
    return min(1.0, share)


def _finite(schedule: str, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{schedule}: {name}={value} is not a finite number: pass a finite one")


@dataclass(frozen=True)
class Schedule:
    """A number that changes with the training progress: a call with the progress returns the value."""

    def __call__(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """
    The same value from start to end. A plain number in a reward expression is this schedule.

    Args:
        value (`float`):
            The value.

    Example:
    ```python
    >>> constant(0.5)(0.9)
    0.5

    ```
    """

    value: float

    def __post_init__(self) -> None:
        _finite("constant", value=self.value)
        object.__setattr__(self, "value", float(self.value))

    def __call__(self, progress: float) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"constant({self.value!r})"


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        _finite(name, start=self.start, end=self.end)
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise ValueError(
                f"{name}: begin={self.begin}, finish={self.finish} is no part of the training: "
                "choose 0 <= begin < finish <= 1"
            )

    def _shape(self, share: float) -> float:
        raise NotImplementedError

    def __call__(self, progress: float) -> float:
        share = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        # Weighted mean, not start + (end - start) * share: exact at both ends.
        blend = self._shape(share)
        return (1.0 - blend) * self.start + blend * self.end

    def __repr__(self) -> str:
        window = "" if (self.begin, self.finish) == (0.0, 1.0) else f", begin={self.begin}, finish={self.finish}"
        return f"{type(self).__name__.lower()}({self.start}, {self.end}{window})"


@dataclass(frozen=True, repr=False)
class Linear(_Ramp):
    """
    Straight line from `start` to `end`.

    Args:
        start (`float`):
            Value up to `begin`.
        end (`float`):
            Value from `finish` on.
        begin (`float`, *optional*, defaults to `0.0`):
            Progress at which the ramp begins.
        finish (`float`, *optional*, defaults to `1.0`):
            Progress at which the ramp is done.

    Example:
    ```python
    >>> ramp = linear(0, 1, begin=0.25, finish=0.75)
    >>> [ramp(progress) for progress in (0.0, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 1.0]

    ```
    """

    def _shape(self, share: float) -> float:
        return share


@dataclass(frozen=True, repr=False)
class Cosine(_Ramp):
    """
    Half a cosine wave from `start` to `end`: flat at both ends, steepest in the middle.

    Args:
        start (`float`):
            Value up to `begin`.
        end (`float`):
            Value from `finish` on.
        begin (`float`, *optional*, defaults to `0.0`):
            Progress at which the ramp begins.
        finish (`float`, *optional*, defaults to `1.0`):
            Progress at which the ramp is done.

    Example:
    ```python
    >>> [round(cosine(1, 0)(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.854, 0.5, 0.0]

    ```
    """

    def _shape(self, share: float) -> float:
        return (1.0 - math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True)
class Piecewise(Schedule):
    """
    Straight lines through `(progress, value)` points, level before the first and after the last.

    Two points at the same progress make a jump, and the later one holds there.

    Args:
        points (`Sequence[tuple[float, float]]`):
            Points in order of progress, each progress in [0, 1].

    Example:
    ```python
    >>> warm_up_then_drop = piecewise([(0.0, 0.0), (0.2, 1.0), (0.8, 1.0), (0.8, 0.1)])
    >>> [warm_up_then_drop(progress) for progress in (0.1, 0.5, 0.8, 1.0)]
    [0.5, 1.0, 0.1, 0.1]

    ```
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        points = tuple((float(progress), float(value)) for progress, value in self.points)
        if not points:
            raise ValueError("piecewise: no points: pass at least one (progress, value) pair")
        steps = [progress for progress, _ in points]
        if steps != sorted(steps) or not all(0.0 <= step <= 1.0 for step in steps):
            raise ValueError(f"piecewise: progress {steps} must rise within [0, 1]: sort the points, use shares of 1")
        for _, value in points:
            _finite("piecewise", value=value)
        object.__setattr__(self, "points", points)

    def __call__(self, progress: float) -> float:
        after = bisect.bisect_right(self.points, progress, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (left, low), (right, high) = self.points[after - 1], self.points[after]
        blend = (progress - left) / (right - left)
        return (1.0 - blend) * low + blend * high

    def __repr__(self) -> str:
        return f"piecewise({list(self.points)})"


constant = Constant
linear = Linear
cosine = Cosine
piecewise = Piecewise
