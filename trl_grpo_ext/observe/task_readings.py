"""What alarms look at in a run of several tasks: how ill the worst one looks, where the mean over all hides it."""

import math
from statistics import fmean, variance

from .readings import FIRST, History, Logs, Measure, Reading, is_finite

HIDDEN = 0.2  # by how much a share of a task is worse than that of the run, where the mean hides it


def tasks_in(logs: Logs, metric: str) -> list[str]:
    """
    Names of the tasks of which a metric is logged.

    Example:

    ```python
    >>> tasks_in({"tasks/math/reward": 0.5, "tasks/chat/reward": None, "reward": 0.5}, "reward")
    ['math']

    ```
    """
    names = [name.removeprefix("tasks/").rpartition("/") for name in logs if name.startswith("tasks/")]
    return [task for task, _, of in names if of == metric and is_finite(logs[f"tasks/{task}/{metric}"])]


def hidden_level(metric: str, of_all: str, sign: float = 1.0, window: int = 8) -> Measure:
    """
    How high a metric stands for the worst task over its last logs, where the metric of the whole run does not.

    Args:
        metric (`str`):
            Metric of a task, a share from 0 to 1.
        of_all (`str`):
            The same metric of the whole run. Where it is less than 0.2 better than that of the task, nothing is hidden.
        sign (`float`, *optional*, defaults to `1.0`):
            `-1.0` where a small share is bad. Then 1 stands for a share of 0.
        window (`int`, *optional*, defaults to `8`):
            Logs over which the mean is taken; a task with fewer logs is left out.
    """

    def ill(values: list[float]) -> float:
        mean = fmean(values[-window:])
        return mean if sign > 0 else 1 - mean

    def measure(logs: Logs, history: History) -> Reading | None:
        worst: Reading | None = None
        everything = [*history.recent.get(of_all, []), *([logs[of_all]] if is_finite(logs.get(of_all)) else [])]
        for task in tasks_in(logs, metric):
            name = f"tasks/{task}/{metric}"
            values = [*history.recent.get(name, []), logs[name]]
            if len(values) < window or not everything:
                continue
            own, whole = ill(values), ill(everything)
            told = f"{name} is {fmean(values[-window:]):.3g} over {window} logs, where {of_all} is "
            value = own if own - whole >= HIDDEN else 0.0
            if worst is None or value > worst.value:
                worst = Reading(value, f"task {task!r}: {told}{fmean(everything[-window:]):.3g}")
        return worst

    return measure


def falling_task(logs: Logs, history: History) -> Reading | None:
    """
    By how many standard deviations the reward of the worst task fell since the start, while that of the run did not.

    Means of the first 10 logs and of the last 10 are compared, in units of the spread of the task's rewards at the
    start. A fall that is no more than three standard errors of these means does not count.
    """
    worst: Reading | None = None
    reward = [*history.recent.get("reward", []), *([logs["reward"]] if is_finite(logs.get("reward")) else [])]
    for task in tasks_in(logs, "reward"):
        name, spread = f"tasks/{task}/reward", history.first.get(f"tasks/{task}/reward_std", [])
        first, last = history.first.get(name, []), [*history.recent.get(name, []), logs[name]][-FIRST:]
        if history.counts.get(name, 0) < 2 * FIRST or not reward or not spread or not fmean(spread) > 0:
            continue
        error = math.sqrt(sum(_variance_of_mean(values) for values in (first, last)))
        fall = fmean(first) - fmean(last)
        is_hidden = fmean(reward[-FIRST:]) >= fmean(history.first["reward"])
        value = fall / fmean(spread) if is_hidden and fall > 3 * error else 0.0
        if worst is None or value > worst.value:
            told = f"{name} went from {fmean(first):.3g} to {fmean(last):.3g} and reward from "
            worst = Reading(
                value, f"task {task!r}: {told}{fmean(history.first['reward']):.3g} to {fmean(reward[-FIRST:]):.3g}"
            )
    return worst


def _variance_of_mean(values: list[float]) -> float:
    return variance(values) / len(values) if len(values) > 1 else 0.0
