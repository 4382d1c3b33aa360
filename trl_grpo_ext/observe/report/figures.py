"""Which plots a report has, as plain data that the page and the PNG files are drawn from."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .escaping import file_name, one_line
from .reader import Run, average, number
from .tasks import task_names, task_specs

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008); the total is drawn in black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("solid", "dashed", "dotted")  # for the seventh line and beyond
MAX_POINTS = 400  # per line; longer runs are averaged
MAX_LINES = 12
GAPS = ("completions/mean_terminated_length",)  # 0 where no completion ended, so that there is no mean

# (title, unit, lines as metric -> label, metrics of a band around the first line, values that the axis must show)
Spec: TypeAlias = tuple[str, str, dict[str, str], tuple[str, str] | None, tuple[float, ...] | None]
STATIC: tuple[Spec, ...] = (
    (
        "Spread of the rewards",
        "standard deviation (reward)",
        {"reward_std": "over the batch", "baseline/residual_std": "of what the baseline leaves"},
        None,
        None,
    ),
    (
        "Group size",
        "completions per prompt",
        {"group_size/mean": "mean"},
        ("group_size/min", "group_size/max"),
        (0,),
    ),
    (
        "Informative share",
        "share (0 to 1)",
        {
            "rollouts/informative": "rollouts that teach",
            "advantage/nonzero": "advantages that are not zero",
        },
        None,
        (0, 1),
    ),
    (
        "Flat groups",
        "share (0 to 1)",
        {
            "frac_reward_zero_std": "groups with equal rewards",
            "rollouts/flat_high": "rollouts in those with high rewards",
            "rollouts/flat_low": "rollouts in those with low rewards",
        },
        None,
        (0, 1),
    ),
    ("Advantages", "advantage", {"advantage/mean": "mean", "advantage/abs_mean": "mean of |A|"}, None, (-0.05, 0.05)),
    ("KL to the reference", "KL per token (nats)", {"kl": "KL", "kl_target": "target"}, None, None),
    ("KL coefficient β", "β (weight of the KL term)", {"beta": "β"}, None, None),
    ("Gradient norm", "norm before clipping", {"grad_norm": "gradient norm"}, None, None),
    ("Loss", "loss", {"loss": "loss", "policy_loss": "policy loss"}, None, None),
    ("Entropy", "entropy per token (nats)", {"entropy": "entropy"}, None, None),
    ("Curriculum position", "0 easy to 1 hard", {"curriculum/position": "position"}, None, (0, 1)),
    ("Difficulty of the prompts", "difficulty", {"curriculum/difficulty": "mean of the prompts drawn"}, None, None),
    (
        "Rewards foreseen",
        "share of their variance",
        {"baseline/explained_variance": "by the baseline", "curriculum/explained_variance": "by the curriculum"},
        None,
        (0, 1),
    ),
    ("Drift in further passes", "mean squared log-ratio", {"reuse/drift": "drift"}, None, (0,)),
    (
        "Completion length",
        "tokens",
        {"completions/mean_length": "mean", "completions/mean_terminated_length": "mean of those that end"},
        ("completions/min_length", "completions/max_length"),
        (0,),
    ),
    (
        "Truncation and clipping",
        "share (0 to 1)",
        {
            "completions/clipped_ratio": "truncated completions",
            "reward_clip/frac": "clipped rewards",
            "clip_ratio/region_mean": "tokens with a clipped ratio",
        },
        None,
        (0, 0.1),
    ),
    (
        "Replaced rollouts (dynamic sampling)",
        "rollouts per batch",
        {"dynamic_sampling/discarded": "discarded"},
        None,
        None,
    ),
    ("Learning rate", "learning rate", {"learning_rate": "learning rate"}, None, None),
)


@dataclass
class Line:
    """One line: a label, the run it belongs to, its values, and a band around it where there is one."""

    label: str
    run: int
    color: int  # -1: black (white on a dark page)
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@dataclass
class Panel:
    """One plot."""

    title: str
    unit: str
    lines: list[Line]
    limits: tuple[float, ...] | None = None
    log: bool = False
    band: str = "smallest to largest"  # what a band around a line means
    is_extra: bool = False  # a metric without a plot of its own: folded away on the page, and no file

    @property
    def constant(self) -> str | None:
        """A line of text that says all, where no line of the plot ever moves."""
        told = []
        for line in self.lines:
            values = {
                value for band in (line.y, line.low or [], line.high or []) for value in band if value is not None
            }
            if len(values) != 1 or len([value for value in line.y if value is not None]) < 2:
                return None
            told.append((line.label, number(values.pop())))
        if len(told) == 1 or len({value for _, value in told}) == 1:
            return f"{self.title}: {told[0][1]}"
        return f"{self.title}: " + ", ".join(f"{label} {value}" for label, value in told)

    @property
    def file(self) -> str:
        return f"{file_name(self.title)}.png"


@dataclass
class Axis:
    """What the lines of a run are drawn against, and where its alarms were raised."""

    name: str
    x: dict[str, list[float | None]]
    averaged: int
    alarms: list[dict[str, Any]] = field(default_factory=list)


def axes_of(runs: list[Run]) -> list[Axis]:
    """Steps, rollouts and hours of each run, as far as it logs them, and its alarms (the newest 200)."""
    found = []
    for run, name in zip(runs, run_names(runs), strict=True):
        size = bucket_size(run)
        rollouts: list[float | None] = []
        for total in run.column("rollouts/total"):
            # A step that trains on rollouts sampled before logs no new total, and before the first step there is none.
            rollouts.append(total if total is not None else rollouts[-1] if rollouts else 0.0)
        x: dict[str, list[float | None]] = {"step": run.column("step")}
        x |= {"rollouts": rollouts} if any(rollouts) else {}
        times = run.column("time")
        start = next((value for value in times if value is not None), 0.0)
        x["hours"] = [None if value is None else (value - start) / 3600 for value in times]
        kept = {key: _buckets(values, size)[0] for key, values in x.items() if any(v is not None for v in values)}
        alarms = [{"name": alarm["name"], "step": alarm["step"]} for alarm in run.alarms[-200:]]
        found.append(Axis(name, kept or {"step": []}, size, alarms))
    return found


def run_names(runs: list[Run]) -> list[str]:
    """Names of the folders, with the parent where two are called alike."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def panels_of(runs: list[Run]) -> list[Panel]:
    """
    The plots of one run, or those of several in the same axes: then a plot for each line, coloured by the run.

    Args:
        runs (`list[Run]`):
            The runs.

    Returns:
        `list[Panel]`:
            Only plots with a line. Metrics that belong to none come last, as `is_extra`. A plot in which nothing moves
            says so in [`Panel.constant`].
    """
    specs = [*_reward_specs(runs), *task_specs(runs), *STATIC, *_time_specs(runs)]
    used = {name for _, _, lines, band, _ in specs for name in (*lines, *(band or ()))} | {"reward", "rollouts/total"}
    used |= {name for run in runs for name in _told_by_held_out(run)}
    used |= {name for run in runs for task in task_names(run) for name in (f"tasks/{task}/reward_std",)}
    names = list(dict.fromkeys(name for run in runs for name in run.metric_names))
    extras = [name for name in names if name not in used and not name.startswith(("alarms/", "train_", "total_flos"))]
    found = []
    for spec in specs:
        title, unit, lines, band, limits = spec
        if len(runs) > 1 and (len(lines) > 1 or spec not in STATIC):
            found += [_panel(runs, f"{title}: {label}", unit, {m: label}, None, limits) for m, label in lines.items()]
        else:
            found.append(_panel(runs, title, unit, lines, band, limits))
    found[1:1] = held_out_panels(runs)
    for name in extras[:60]:
        panel = _panel(runs, one_line(name, 60), "value", {name: name}, None, None)
        panel.is_extra = True
        found.append(panel)
    return [panel for panel in found if panel.lines]


def held_out_panels(runs: list[Run]) -> list[Panel]:
    """A plot for each measure of the held-out evaluations, with the noise of its gain since the start as a band."""
    found = []
    measures = list(dict.fromkeys(name for run in runs for name in run.held_out.measures))[:MAX_LINES]
    for name in measures:
        lines = []
        for index, run in enumerate(runs):
            held_out = run.held_out
            if len(held_out.steps) < 2 or name not in held_out.measures:
                continue
            columns: list[list[float | None]] = [[], [], []]
            for step in run.column("step"):
                mean = held_out.mean(int(step or 0), name) if step in held_out.values else None
                gain = None if mean is None else held_out.gain(name, int(step or 0))
                noise = None if gain is None or gain.high is None else gain.high - gain.mean
                points = (mean, *(None if mean is None or noise is None else mean + sign * noise for sign in (-1, 1)))
                for column, value in zip(columns, points, strict=True):
                    column.append(value)
            size = bucket_size(run)
            mean_, low, high = (_buckets(column, size)[0] for column in columns)
            label = "held-out" if len(runs) == 1 else run.name
            has_band = any(value is not None for value in low)
            lines.append(Line(label, index, index, mean_, *((low, high) if has_band else ())))
        if lines:
            band = "twice the standard error of the change since the start"
            found.append(Panel(f"Held-out {one_line(name, 60)}", "mean over prompts", lines, band=band))
    return found


def _told_by_held_out(run: Run) -> list[str]:
    """Metrics that the plots of the held-out evaluations, or the table of them, show already."""
    if len(run.held_out.steps) < 2:
        return []
    shown = {f"eval_{name}" for name in run.held_out.measures}
    shown |= {f"eval_rewards/{name}/mean" for name in run.held_out.measures}
    ends = ("/gain", "/gain_low", "/gain_high")
    return [name for name in run.metric_names if name in shown or (name.startswith("eval_") and name.endswith(ends))]


def _reward_specs(runs: list[Run]) -> list[Spec]:
    """The total and its components; components of another magnitude (a length, say) in a plot of their own."""
    names = list(dict.fromkeys(name for run in runs for name in run.reward_names))
    # A single reward function is the total.
    names = [name for name in names if not any([name] == run.function_names for run in runs)][:MAX_LINES]
    largest = {name: max((_largest(run, f"rewards/{name}/mean") for run in runs), default=0.0) for name in names}
    reach = 3 * max([1.0, *(_largest(run, "reward") for run in runs)])
    near = {f"rewards/{name}/mean": name for name in names if largest[name] <= reach}
    far = {f"rewards/{name}/mean": name for name in names if largest[name] > reach}
    held_out = {"eval_reward": "held-out total"}
    total = {"reward": "total"}
    return [
        ("Reward", "mean reward (raw)", {**total, **held_out, **near}, None, None),
        ("Large reward components", "mean (raw)", far, None, None),
    ]


def _time_specs(runs: list[Run]) -> list[Spec]:
    names = dict.fromkeys(name for run in runs for name in run.metric_names if name.startswith("time/"))
    lines = {name: name.removeprefix("time/") for name in list(names)[:MAX_LINES]}
    return [("Time per phase", "seconds", {**lines, "step_time": "whole step"}, None, (0,))]


def _largest(run: Run, name: str) -> float:
    return max((abs(value) for value in run.column(name) if value is not None), default=0.0)


def _panel(
    runs: list[Run],
    title: str,
    unit: str,
    metrics: dict[str, str],
    band: tuple[str, str] | None,
    limits: tuple[float, ...] | None,
) -> Panel:
    lines = []
    color = 0
    for metric, label in metrics.items():
        for index, run in enumerate(runs):
            values = run.column(metric)
            if metric in GAPS:
                values = [value or None for value in values]
            if all(value is None for value in values):
                continue
            shade = index if len(runs) > 1 else -1 if metric == "reward" else color
            line = _line(run, index, label, shade, values, band if metric == next(iter(metrics)) else None)
            color += shade >= 0
            lines.append(line)
    return Panel(title, unit, lines, limits, log=limits is None and _needs_log(lines))


def _line(
    run: Run, index: int, label: str, color: int, values: list[float | None], band: tuple[str, str] | None
) -> Line:
    size = bucket_size(run)
    mean, low, high = _buckets(values, size)
    if band is not None:
        low, high = _buckets(run.column(band[0]), size)[1], _buckets(run.column(band[1]), size)[2]
    if (band is None and size == 1) or all(value is None for value in [*low, *high]):
        return Line(label, index, color, mean)
    return Line(label, index, color, mean, low, high)


def bucket_size(run: Run) -> int:
    """How many logs are averaged into one point."""
    return -(-len(run.metrics) // MAX_POINTS) or 1


def _buckets(
    values: list[float | None], size: int
) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Mean, smallest and largest value of every `size` values."""
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for start in range(0, len(values), size):
        present = [value for value in values[start : start + size] if value is not None]
        mean.append(average(present) if present else None)
        low.append(min(present, default=None))
        high.append(max(present, default=None))
    return mean, low, high


def _needs_log(lines: list[Line]) -> bool:
    """Whether a few values would press the others flat: all are positive, and the largest is 50 times the median."""
    values = sorted(v for line in lines for v in [*line.y, *(line.high or []), *(line.low or [])] if v is not None)
    return bool(values) and values[0] > 0 and values[-1] > 50 * values[len(values) // 2]
