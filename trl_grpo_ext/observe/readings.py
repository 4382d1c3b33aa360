"""What alarms look at: how ill a run looks by one sign, from the current log and a short history. Plain numbers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, TypeGuard

Logs = Mapping[str, Any]

FIRST = 10  # logs that make up the start of a run, for what is compared with the start
RECENT = 20  # logs before the current one, for what is compared with the recent past
MOVES = 6  # values that are kept of a metric's way to where it rests
WINDOW = 7  # logs of each of the three medians that tell whether a metric grows
REST = 5  # logs with one and the same value after which a metric that never had another counts as constant


@dataclass
class History:
    """
    What is remembered of the metrics logged so far.

    Args:
        num_logs (`int`, *optional*, defaults to `0`):
            Number of logs taken in.
        first (`dict[str, list[float]]`, *optional*):
            The first 10 values of each metric.
        recent (`dict[str, list[float]]`, *optional*):
            The last 20 values of each metric.
        moves (`dict[str, list[float]]`, *optional*):
            The last 6 values of each metric that differ from the value before them.
        highest (`dict[str, float]`, *optional*):
            The largest value of each metric.
        counts (`dict[str, int]`, *optional*):
            Number of values of each metric.
        rests (`dict[str, int]`, *optional*):
            Number of values of each metric since its last move, that one included.
    """

    num_logs: int = 0
    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    moves: dict[str, list[float]] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rests: dict[str, int] = field(default_factory=dict)

    def append(self, logs: Logs) -> None:
        """Take in one log. What is missing, NaN or infinite leaves no trace."""
        self.num_logs += 1
        for name, value in logs.items():
            if not is_finite(value):
                continue
            value = float(value)
            first, moves = self.first.setdefault(name, []), self.moves.setdefault(name, [])
            if len(first) < FIRST:
                first.append(value)
            self.recent[name] = [*self.recent.get(name, []), value][-RECENT:]
            self.highest[name] = max(value, self.highest.get(name, value))
            self.counts[name] = self.counts.get(name, 0) + 1
            if moves and is_equal(moves[-1], value):
                self.rests[name] += 1
            else:
                self.moves[name] = [*moves, value][-MOVES:]
                self.rests[name] = 1


@dataclass(frozen=True)
class Reading:
    """How ill a run looks to one alarm: larger is worse. `evidence` says it in words."""

    value: float
    evidence: str


# What measures an illness: the current log and the history before it in, `None` out where there is nothing to tell.
Measure = Callable[[Logs, History], Reading | None]


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def is_equal(one: float, other: float) -> bool:
    """Whether two values of a metric are equal but for rounding."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)


def is_nothing(spread: Any, value: Any) -> bool:
    """
    Whether a standard deviation is zero but for rounding, as TRL computes it of equal rewards.

    Example:

    ```python
    >>> is_nothing(None, 0.1), is_nothing(7.7e-9, 0.1), is_nothing(1e-5, 0.1), is_nothing(1e-5, 100.0)
    (True, True, False, True)

    ```
    """
    return not spread or (is_finite(spread) and spread <= 1e-6 * max(1.0, abs(value) if is_finite(value) else 0.0))


def level(metric: str) -> Measure:
    """The metric itself."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value = logs.get(metric)
        return Reading(value, f"{metric} is {value:.3g}") if is_finite(value) else None

    return measure


def spike(metric: str, floor: float = 0.0, spread_of: str | None = None) -> Measure:
    """
    How many times the metric exceeds its median over the last logs, zeros left out.

    A value up to `floor` is never ill. `spread_of` names the metric whose standard deviation this metric is: then
    rounding counts as zero.
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


def outburst(metric: str, floor: float, alone: float, margin: float, patience: int = 3) -> Measure:
    """
    How many times the metric exceeds its recent median, where it stays there or is far beyond anything before.

    Heavy tails are no illness: one batch in a hundred may well have ten times the usual gradient. So the smallest of
    the last `patience` values counts, unless a single value is `alone` times the median, `margin` times the largest
    value before, and twice as far from the median as that one on a logarithmic scale. A value up to `floor` is never
    ill.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        value, recent = logs.get(metric), history.recent.get(metric, [])
        before = [v for v in recent if v > 0]
        if not is_finite(value) or not before:
            return None
        usual, most = median(before), history.highest[metric]
        evidence = f"{metric} is {value:.3g}, {value / usual:.1f} times its recent median of {usual:.3g}"
        if value > max(floor, alone * usual, margin * most) and value * usual > most * most:
            return Reading(value / usual, evidence)
        lasting, earlier = min([value, *recent[1 - patience :]]), [v for v in recent[: 1 - patience] if v > 0]
        return Reading(lasting / median(earlier) if earlier and value > floor else 0.0, evidence)

    return measure


def collapse(metric: str, settled: int = 20) -> Measure:
    """
    How many times smaller the metric is than at the start of the run, its median there, once `settled` logs were seen.

    Before that, it may be small because the policy has learnt. So the gradient must have shrunk as much, while the
    spread of rewards is at least half of that at the start: a policy with one answer to everything learns nothing more.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        value, first = logs.get(metric), history.first.get(metric)
        if not is_finite(value) or not first or median(first) <= 0:
            return None
        start = median(first)
        factor = _times_smaller(value, start) if history.num_logs >= settled else 0.0
        reading = Reading(factor, f"{metric} fell to {value:.3g} from {start:.3g} at the start")
        gradient, spread = logs.get("grad_norm"), logs.get("reward_std")
        gradients, spreads = (history.first.get(name, [])[:3] for name in ("grad_norm", "reward_std"))
        if len(gradients) == len(spreads) == 3 and is_finite(gradient) and is_finite(spread):
            usual, highest = median(gradients), max(first[:3])  # a collapse begins with the first updates
            factor = min(_times_smaller(value, highest), _times_smaller(gradient, usual))
            if spread >= median(spreads) / 2 > 0 and factor > reading.value:
                evidence = (
                    f"{metric} fell to {value:.3g} from {highest:.3g} at the start, and grad_norm to {gradient:.3g}"
                )
                return Reading(factor, f"{evidence} from {usual:.3g}, while rewards still differ")
        return reading

    return measure


def _times_smaller(value: float, start: float) -> float:
    return start / value if value > 0 else math.inf


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
    """How many components of the reward are dead: see [`is_dead`]."""
    dead: list[str] = []
    num_components = 0
    for key, value in logs.items():
        if key.startswith("rewards/") and key.endswith("/mean") and is_finite(value):
            num_components += 1
            name = key.removeprefix("rewards/").removesuffix("/mean")
            if is_nothing(logs.get(f"rewards/{name}/std"), value) and is_dead(key, value, history):
                dead.append(f"{name} is always {value:.3g}")
    return Reading(float(len(dead)), ", ".join(dead) or "all rewards vary") if num_components else None


def is_dead(metric: str, value: float, history: History) -> bool:
    """
    Whether a reward has had one value in its first 5 logs or more, or in the last 10, to which no learning led.

    A reward that is met more and more often ends at its best value, and that is success. Three signs tell success from
    illness: the value is 1, the value was seen before the rest began, or the reward moved towards the value and ended
    at the edge of what was seen. A reward that never had another value than, say, 0 has none of them, nor has one that
    jumps to 0 when its service fails.
    """
    moves = history.moves.get(metric, [])
    if not moves or not is_equal(moves[-1], value) or is_equal(value, 1.0):
        return False
    way, rest = moves[:-1], history.rests[metric] + 1
    if not way or rest < 2 * REST:
        return not way and rest >= REST
    seen = [*history.first[metric][: history.counts[metric] - history.rests[metric]], *way]
    if any(is_equal(other, value) for other in seen):
        return False
    is_edge = not min(seen) <= value <= max(seen)
    is_near = min(abs(value - other) for other in way[-3:]) <= abs(value - fmean(seen[:FIRST])) / 2
    return not (is_edge and is_near)


def without_effect(metric: str) -> Measure:
    """How many batches were trained on while every weight stayed as it was."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value = logs.get(metric)
        if not is_finite(value):
            return None
        evidence = f"{value:.3g} batches with advantages left every weight as it was" if value > 0 else "weights change"
        return Reading(value, evidence)

    return measure


def off_centre(mean: str, spread: str) -> Measure:
    """
    The size of a mean that should be 0, relative to the mean of the absolute values.

    A baseline that lies below the rewards by more than a tenth of their spread makes the mean positive on purpose.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        value, size = logs.get(mean), logs.get(spread)
        if not is_finite(value) or not is_finite(size) or not size:
            return None
        baseline, reward, std = (logs.get(name) for name in ("baseline/mean", "reward", "reward_std"))
        if is_finite(baseline) and is_finite(reward) and reward - baseline > 0.1 * (std if is_finite(std) else 0.0):
            return Reading(0.0, f"{mean} is {value:.3g} with a baseline below the rewards")
        return Reading(abs(value) / size, f"{mean} is {value:.3g} where {spread} is {size:.3g}")

    return measure


def away_from(metric: str, expected: float) -> Measure:
    """How far the metric is from the value that it has by construction."""

    def measure(logs: Logs, history: History) -> Reading | None:
        value = logs.get(metric)
        if not is_finite(value):
            return None
        return Reading(abs(value - expected), f"{metric} is {value:.3g} where {expected:.3g} is expected")

    return measure


def growth(metric: str, times: float) -> Measure:
    """
    The recent median of a metric that has grown for 21 logs, `times` its start or more, while weights are trained.

    It grows where the medians of three times seven logs rise, each to between 1.1 and 5 times the one before. So a jump
    is no growth, and noise hardly ever. In a log without a gradient, a metric that grows has another reason.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        value, recent = logs.get(metric), history.recent.get(metric, [])
        if not is_finite(value) or len(recent) < 3 * WINDOW - 1:
            return None
        values = [*recent, value][-3 * WINDOW :]
        early, middle, late = (median(values[start : start + WINDOW]) for start in range(0, 3 * WINDOW, WINDOW))
        start = median(history.first[metric][:3])
        grows = all(1.1 * before < after < 5 * before for before, after in ((early, middle), (middle, late)))
        is_trained = logs.get("grad_norm") != 0 and not logs.get("updates/without_effect")
        if grows and is_trained and late > times * start:
            return Reading(late, f"{metric} grew from {start:.2g} to {late:.2g}, and grows on")
        return Reading(0.0, f"{metric} is {value:.3g} and does not grow")

    return measure


def runaway(limits: Mapping[str, tuple[float, float]]) -> Measure:
    """
    While the reward is up by half a standard deviation: how far a watched metric moved on the way to its limit.

    `limits` gives for each positive metric how many times smaller and how many times larger it may become. 0 stands for
    no move and 1 for the limit, on a logarithmic scale.
    """

    def measure(logs: Logs, history: History) -> Reading | None:
        def now(metric: str) -> float:
            return fmean([*history.recent[metric][-4:], logs[metric]])

        if any(not is_finite(logs.get(m)) or not history.recent.get(m) for m in ("reward", "reward_std")):
            return None
        start, std = (fmean(history.first[m]) for m in ("reward", "reward_std"))
        gain = now("reward") - start
        worst = Reading(0.0, f"reward went from {start:.3g} to {now('reward'):.3g}")
        for metric, (down, up) in limits.items():
            if is_finite(logs.get(metric)) and history.first.get(metric) and fmean(history.first[metric]) > 0:
                before, after = fmean(history.first[metric]), now(metric)
                factor = math.log(after / before) if after > 0 else -math.inf
                share = max(factor / math.log(up), -factor / math.log(down))
                if gain > std / 2 and share > worst.value:
                    evidence = f"reward went from {start:.3g} to {now('reward'):.3g} and {metric} from "
                    worst = Reading(share, f"{evidence}{before:.3g} to {after:.3g}")
        return worst

    return measure
