"""What alarms look at: how ill a run is by one sign, from the current log and a short history. Plain numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, TypeGuard

Logs = Mapping[str, Any]

FIRST = 10  # logs that make up the start of a run, for what is compared with the start
RECENT = 20  # logs before the current one, for what is compared with the recent past


@dataclass
class History:
    """
    What is remembered of the metrics logged so far: the first few values of each and the last few.

    Args:
        num_logs (`int`, *optional*, defaults to `0`):
            Number of logs taken in.
        first (`dict[str, list[float]]`, *optional*):
            The first 10 values of each metric.
        recent (`dict[str, list[float]]`, *optional*):
            The last 20 values of each metric.
    """

    num_logs: int = 0
    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)

    def append(self, logs: Logs) -> None:
        """Take in one log. What is missing, NaN or infinite leaves no trace."""
        self.num_logs += 1
        for name, value in logs.items():
            if is_finite(value):
                first = self.first.setdefault(name, [])
                if len(first) < FIRST:
                    first.append(float(value))
                self.recent[name] = [*self.recent.get(name, []), float(value)][-RECENT:]


@dataclass(frozen=True)
class Reading:
    """How ill a run looks to one alarm: larger is worse. `evidence` says it in words."""

    value: float
    evidence: str


# What measures an illness: the current log and the history before it in, `None` out where there is nothing to tell.
Measure = Callable[[Logs, History], Reading | None]


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def level(metric: str) -> Measure:
    """The metric itself."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value = logs.get(metric)
        return Reading(value, f"{metric} is {value:.3g}") if is_finite(value) else None

    return measure


def is_nothing(spread: Any, value: Any) -> bool:
    """
    Whether a standard deviation is none but for rounding, which is what TRL computes of equal rewards.

    Example:

    ```python
    >>> is_nothing(None, 0.1), is_nothing(7.7e-9, 0.1), is_nothing(1e-5, 0.1), is_nothing(1e-5, 100.0)
    (True, True, False, True)

    ```
    """
    return not spread or (is_finite(spread) and spread <= 1e-6 * max(1.0, abs(value) if is_finite(value) else 0.0))


def spike(metric: str, floor: float = 0.0, spread_of: str | None = None) -> Measure:
    """
    The metric over its median in the last logs, zeros left out. Values up to `floor` are never ill. Of a standard
    deviation, `spread_of` what it is, and rounding counts as zero.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        value = logs.get(metric)
        before = [v for v in history.recent.get(metric, []) if v > 0]
        if spread_of is not None:
            before = [v for v in before if not is_nothing(v, logs.get(spread_of))]
        if not is_finite(value) or not before:
            return None
        usual = median(before)
        evidence = f"{metric} is {value:.3g}, {value / usual:.1f} times its recent median of {usual:.3g}"
        return Reading(value / usual if value > floor else 0.0, evidence)

    return measure


def collapse(metric: str) -> Measure:
    """The metric's median at the start of the run over what it is now."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value, first = logs.get(metric), history.first.get(metric)
        if not is_finite(value) or not first or median(first) <= 0:
            return None
        start = median(first)
        factor = start / value if value > 0 else math.inf
        return Reading(factor, f"{metric} fell to {value:.3g} from {start:.3g} at the start")

    return measure


def not_finite(*metrics: str) -> Measure:
    """How many of the metrics are NaN or infinite, or are gone (as TRL logs a NaN) after having been there."""

    def measure(logs: Logs, history: History) -> Reading | None:
        bad = [
            m for m in metrics if m in logs and not is_finite(logs[m]) and (logs[m] is not None or m in history.first)
        ]
        evidence = " and ".join(f"{m} is {'NaN' if logs[m] is None else logs[m]}" for m in bad)
        return Reading(float(len(bad)), evidence or "all finite")

    return measure


def constant_rewards(logs: Logs, history: History) -> Reading | None:
    """How many reward components gave the same value to every completion for as long as is remembered."""
    dead: list[str] = []
    alive: list[str] = []
    for key, value in logs.items():
        if key.startswith("rewards/") and key.endswith("/mean") and is_finite(value):
            seen = history.recent.get(key, [])
            is_same = len(seen) == RECENT and all(math.isclose(v, value, rel_tol=1e-6) for v in seen)
            name = key.removeprefix("rewards/").removesuffix("/mean")
            is_dead = is_same and is_nothing(logs.get(f"rewards/{name}/std"), value)
            (dead if is_dead else alive).append(f"{name} is always {value:.3g}" if is_dead else name)
    if not dead and not alive:
        return None
    return Reading(float(len(dead)), ", ".join(dead) or "all rewards vary")


def off_centre(mean: str, spread: str) -> Measure:
    """The size of a mean that should be 0, relative to the mean of the absolute values."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value, size = logs.get(mean), logs.get(spread)
        if not is_finite(value) or not is_finite(size) or not size:
            return None
        return Reading(abs(value) / size, f"{mean} is {value:.3g} where {spread} is {size:.3g}")

    return measure


def runaway(watch: Sequence[str]) -> Measure:
    """While the reward is up by half a standard deviation: the largest factor by which a watched metric moved."""

    def measure(logs: Logs, history: History) -> Reading | None:
        def now(metric: str) -> float:
            return fmean([*history.recent[metric][-4:], logs[metric]])

        if any(not is_finite(logs.get(m)) or not history.recent.get(m) for m in ("reward", "reward_std")):
            return None
        start, std = (fmean(history.first[m]) for m in ("reward", "reward_std"))
        gain = now("reward") - start
        worst = Reading(1.0, f"reward went from {start:.3g} to {now('reward'):.3g}")
        for metric in watch:
            if is_finite(logs.get(metric)) and history.first.get(metric) and fmean(history.first[metric]) > 0:
                before, after = fmean(history.first[metric]), now(metric)
                factor = max(after / before, before / after if after > 0 else math.inf)
                if gain > std / 2 and factor > worst.value:
                    evidence = f"reward went from {start:.3g} to {now('reward'):.3g} and {metric} from "
                    worst = Reading(factor, f"{evidence}{before:.3g} to {after:.3g}")
        return worst

    return measure
