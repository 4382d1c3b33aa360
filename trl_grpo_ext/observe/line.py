"""What is shown of a log: one readable line, or the cells of a table with the trend of each metric."""

import math
from collections import defaultdict
from typing import Any

from ..rewards.scoring import TALLIES
from .paired import NOISE
from .report.escaping import one_line
from .report.reader import number
from .report.summary import slope
from .task_readings import tasks_in

BARS = "▁▂▃▄▅▆▇█"
# Metric -> (label, format). The first few are in every line, the table has room for the others too.
FIELDS = {
    "kl": ("kl", "{:.3g}"),
    "beta": ("β", "{:.3g}"),
    "grad_norm": ("grad", "{:.2f}"),
    "rollouts/informative": ("informative", "{:.0%}"),
    "advantage/abs_mean": ("|advantage|", "{:.2f}"),  # of groups of one, where no spread of a group says how much
    "reuse/skipped": ("updates left out", "{:.0%}"),
    "reward_clip/frac": ("clipped", "{:.0%}"),
    "curriculum/position": ("curriculum", "{:.0%}"),
    "curriculum/difficulty": ("difficulty", "{:.2f}"),
    "baseline/explained_variance": ("foreseen", "{:.0%}"),
    "curriculum/explained_variance": ("foreseen by text", "{:.0%}"),
    "baseline/residual_std": ("beyond baseline", "± {:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "learning_rate": ("learning rate", "{:.2e}"),
    "completions/mean_length": ("length (tokens)", "{:.0f}"),
    "completions/clipped_ratio": ("truncated", "{:.0%}"),
}
IN_LINE = 11
TROUBLES = (*TALLIES, "errors")  # how asking a reward may go wrong, as rewards log it
MAX_TASKS = 6


def reward_parts(logs: dict[str, Any]) -> dict[str, float]:
    """Name and mean of what the reward consists of: its components, and reward functions if there are several."""
    means = [name for name in logs if name.startswith("rewards/") and name.endswith("/mean") and logs[name] is not None]
    names = [name.removeprefix("rewards/").removesuffix("/mean") for name in means]
    functions = [name for name in names if f"rewards/{name}/std" in logs]
    whole = functions[0] if len(functions) == 1 and len(names) > 1 else None  # TRL's name for the whole
    labels = {
        name: name.removeprefix(f"{whole}/").replace("/turn_", " turn ").replace("turn_", "turn ") for name in names
    }
    return {labels[name]: float(logs[f"rewards/{name}/mean"]) for name in names if name != whole}


def readable(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """
    One line for the metrics of a training step or an evaluation.

    Args:
        logs (`dict[str, float]`):
            What the trainer logs.
        step (`int`):
            Optimizer steps done.
        max_steps (`int`):
            Optimizer steps in all.

    Returns:
        `str`:
            The line.

    Example:

    ```python
    >>> readable({"reward": 0.5, "rewards/length/mean": 31.0, "group_size/min": 2, "group_size/max": 8}, 3, 16)
    'step  3/16 · reward 0.500 · length 31 · groups 2-8'

    ```
    """
    head = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    told = [f"{label} {value}" for label, value, _ in fields_of(logs, IN_LINE)]
    return " · ".join([head, *told, *(f"alarm {one_line(name, 40)}" for name in open_alarms(logs))])


def fields_of(logs: dict[str, Any], count: int) -> list[tuple[str, str, str]]:
    """Label, value and metric of what is shown of a log, with the first `count` of [`FIELDS`]."""
    logs = {name: value for name, value in logs.items() if value is not None}
    found = []
    for name, label in (("reward", "reward"), ("eval_reward", "held-out reward")):
        if name in logs and f"{name}/gain" not in logs:
            spread = f" ± {logs[f'{name}_std']:.3f}" if count > IN_LINE and f"{name}_std" in logs else ""
            found.append((label, f"{logs[name]:.3f}{spread}", name))
    found += held_out_fields(logs)
    for name, value in reward_parts(logs).items():
        found.append((one_line(name, 40), short(value), f"rewards/{name}/mean"))
    found += trouble_fields(logs, is_joined=count <= IN_LINE)
    for task in tasks_in(logs, "reward")[:MAX_TASKS]:
        name = f"tasks/{task}/reward"
        share = logs.get(f"tasks/{task}/informative")
        teaches = f" ({share:.0%} teach)" if count > IN_LINE and share is not None else ""
        found.append((one_line(task, 40), f"{short(logs[name])}{teaches}", name))
    smallest, largest = (logs.get(f"group_size/{end}") for end in ("min", "max"))
    unseen = () if smallest == 1 else ("advantage/abs_mean",)
    for name, (label, form) in list(FIELDS.items())[:count]:
        if name in logs and name not in unseen:
            found.append((label, form.format(float(logs[name])), name))
    if smallest is not None and largest is not None:
        sizes = f"{smallest:.0f}" + (f"-{largest:.0f}" if largest != smallest else "")
        found.append(("groups", sizes, "group_size/mean"))
    if logs.get("dynamic_sampling/discarded"):
        found.append(("replaced", f"{logs['dynamic_sampling/discarded']:.0f} rows", "dynamic_sampling/discarded"))
    return found


def trouble_fields(logs: dict[str, Any], is_joined: bool) -> list[tuple[str, str, str]]:
    """
    Label, count and metric of what went wrong when rewards were asked, such as a judge that does not answer.

    Args:
        logs (`dict[str, float]`):
            What the trainer logs. Counts are means over calls and processes.
        is_joined (`bool`):
            Whether all counts of a reward make one field.

    Example:

    ```python
    >>> logs = {"rewards/judge/failures": 4.0, "rewards/judge/timeouts": 0.0, "rewards/judge/retries": 3.5}
    >>> trouble_fields(logs, is_joined=True)
    [('judge', 'failures 4, retries 3.5', 'rewards/judge/failures')]
    >>> trouble_fields(logs, is_joined=False)
    [('failures of judge', '4', 'rewards/judge/failures'), ('retries of judge', '3.5', 'rewards/judge/retries')]

    ```
    """
    counts: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in logs.items():
        part, _, kind = name.rpartition("/")
        if part.startswith(("rewards/", "eval_rewards/")) and kind in TROUBLES and value:
            counts[part][kind] = float(value)
    found = []
    for part, kinds in counts.items():
        name = part.removeprefix("eval_").removeprefix("rewards/")
        label = f"{'held-out ' if part.startswith('eval_') else ''}{one_line(name, 40)}"
        told = {kind: f"{kinds[kind]:.3g}" for kind in TROUBLES if kind in kinds}
        if is_joined:
            joined = ", ".join(f"{kind} {value}" for kind, value in told.items())
            found.append((label, joined, f"{part}/{next(iter(told))}"))
        else:
            found += [(f"{kind} of {label}", value, f"{part}/{kind}") for kind, value in told.items()]
    return found


def held_out_fields(logs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """
    Label, value with its gain since the start, and metric of what [`HeldOutCallback`] measures.

    Example:

    ```python
    >>> held_out_fields({"eval_reward": 0.5, "eval_reward/gain": 0.2, "eval_reward/gain_low": 0.1})
    [('held-out reward', '0.500 (+0.200 ± 0.100)', 'eval_reward')]

    ```
    """
    found = []
    for metric in [name.removesuffix("/gain") for name in logs if name.endswith("/gain") and name.startswith("eval_")]:
        if metric in logs:
            gain, low = logs[f"{metric}/gain"], logs.get(f"{metric}/gain_low")
            noise = "" if low is None else f" ± {gain - low:.3f}"
            label = f"held-out {one_line(metric.removeprefix('eval_'), 40)}"
            found.append((label, f"{short(logs[metric])} ({gain:+.3f}{noise})", metric))
    return found


def short(value: float) -> str:
    """
    The mean of a reward: three decimals of a score, none of a length.

    Example:

    ```python
    >>> short(0.5), short(31.4), short(1e300)
    ('0.500', '31', '1.00e+300')

    ```
    """
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}" if abs(value) < 1e6 else number(value)


def open_alarms(logs: dict[str, Any]) -> list[str]:
    """Names of the alarms that [`MonitorCallback`] logs as raised."""
    return [name.removeprefix("alarms/") for name, value in logs.items() if name.startswith("alarms/") and value]


def sparkline(values: list[float]) -> str:
    """
    Values as bars, from the smallest to the largest of them.

    Example:

    ```python
    >>> sparkline([0.0, 1.0, 2.0, 7.0])
    '▁▂▃█'

    ```
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low
    # A share first: one over a span of nearly nothing is infinite, and so is a span of nearly everything.
    shares = [(value - low) / span if 0 < span < math.inf else 0.0 for value in values]
    return "".join(BARS[round(share * (len(BARS) - 1))] for share in shares)


def trend(values: list[float]) -> str:
    """`"↑"` or `"↓"` if the values rise or fall by more than their noise, `"→"` if not, nothing for too few."""
    if len(values) < 5:
        return ""
    rise, error = slope(values)
    if not abs(rise) > max(NOISE * error, 1e-12):
        return "→"
    return "↑" if rise > 0 else "↓"
