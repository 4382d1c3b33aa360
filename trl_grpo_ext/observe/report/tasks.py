"""What a report says of each task of a run: a table, and the plots in which tasks are lines."""

from ..paired import NOISE, direction_of
from .escaping import one_line
from .reader import Run, number
from .summary import change

MAX_TASKS = 12  # in the table and in a plot
APART = 10.0  # rewards of tasks that are so many times larger than those of others have plots of their own
HEADS = ("Task", "Share", "Reward at first", "Reward now", "Course", "Informative", "Length (tokens)", "Truncated")

# Metric of a task -> title and unit of its plot, and values that the axis must show.
PLOTS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "informative": ("Informative share by task", "share (0 to 1)", (0, 1)),
    "length": ("Completion length by task", "tokens", (0,)),
    "truncated": ("Truncated completions by task", "share (0 to 1)", (0, 0.1)),
    "share": ("Share of the tasks", "share of the completions (0 to 1)", (0, 1)),
    "wanted": ("Share that each task shall get", "share of the prompts (0 to 1)", (0, 1)),
    "advantage": ("Size of the advantages by task", "mean of |A|", (0,)),
    "scale": ("Scale of the advantages by task", "standard deviation (reward)", (0,)),
}


def task_names(run: Run) -> list[str]:
    """Names of the tasks in the order in which they were logged, at most 12."""
    names = (name.removeprefix("tasks/").rpartition("/") for name in run.metric_names if name.startswith("tasks/"))
    return list(dict.fromkeys(task for task, _, metric in names if task and metric == "share"))[:MAX_TASKS]


def task_table(run: Run) -> list[list[str]]:
    """A row for each task, with a cell for each of [`HEADS`]: how its reward went, and what it was like lately."""
    rows = []
    for task in task_names(run):
        rewards = _values(run, task, "reward")
        row = [one_line(task, 60), _shown(_shares(run, task), percent=True)]
        if len(rewards) < 4:
            row += ["-", number(rewards[-1]) if rewards else "-", "too early to say"]
        else:
            first, last, error = change(rewards)
            course = {"up": "risen", "down": "fallen", "flat": "level"}[direction_of(last - first, error)]
            row += [number(first), f"{number(last)} (± {number(NOISE * error)})", course]
        row.append(_lately(run, task, "informative", percent=True))
        row.append(_lately(run, task, "length"))
        row.append(_lately(run, task, "truncated", percent=True))
        rows.append(row)
    return rows


def task_specs(runs: list[Run]) -> list[tuple[str, str, dict[str, str], None, tuple[float, ...] | None]]:
    """The plots in which each task is a line, in the form of `figures.Spec`."""
    names = list(dict.fromkeys(name for run in runs for name in task_names(run)))[:MAX_TASKS]
    largest = {
        name: max((abs(value) for run in runs for value in _values(run, name, "reward")), default=0.0) for name in names
    }
    together: list[list[str]] = []
    for name in sorted(names, key=lambda name: largest[name]):
        if together and largest[name] <= APART * largest[together[-1][0]]:
            together[-1].append(name)
        else:
            together.append([name])
    specs: list[tuple[str, str, dict[str, str], None, tuple[float, ...] | None]] = []
    for group in sorted(together, key=lambda group: names.index(group[0])):
        title = (
            "Reward by task" if len(together) == 1 else f"Reward by task: {', '.join(one_line(n, 30) for n in group)}"
        )
        specs.append((title, "mean reward (raw)", {f"tasks/{name}/reward": name for name in group}, None, None))
    for metric, (title, unit, limits) in PLOTS.items():
        specs.append((title, unit, {f"tasks/{name}/{metric}": name for name in names}, None, limits))
    return specs


def _values(run: Run, task: str, metric: str) -> list[float]:
    return [value for value in run.column(f"tasks/{task}/{metric}") if value is not None]


def _lately(run: Run, task: str, metric: str, percent: bool = False) -> str:
    """Mean over the last tenth of the logs that hold the task."""
    return _shown(_values(run, task, metric), percent)


def _shares(run: Run, task: str) -> list[float]:
    """Its share in each log that holds any task: 0 where it had no completion, since nothing is logged of it then."""
    own = run.column(f"tasks/{task}/share")
    all_of_them = zip(*(run.column(f"tasks/{name}/share") for name in task_names(run)), strict=True)
    rows = zip(own, all_of_them, strict=True)
    return [value or 0.0 for value, row in rows if any(share is not None for share in row)]


def _shown(values: list[float], percent: bool = False) -> str:
    if not values:
        return "-"
    last = change(values)[1]
    return f"{last:.0%}" if percent else f"{last:.0f}"
