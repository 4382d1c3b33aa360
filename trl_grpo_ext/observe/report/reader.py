"""Reads a run folder: what the monitor wrote, or else what transformers and TRL wrote."""

import functools
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..record import ALARMS, FOLDER, MAX_STEP, METRICS, RUN, is_number, is_own_file, read_alarms, read_lines, read_whole
from .entry import Entry, Places
from .escaping import one_line
from .held_out import HeldOutRun, read_held_out

MAX_TIME = 1e11  # seconds since 1970: the year 5138


class NotARunError(ValueError):
    """A folder holds nothing that a training run writes."""


@dataclass
class Run:
    """
    What is known about a run.

    Args:
        folder (`Path`):
            `output_dir` of the run.
        info (`dict`):
            `monitor/run.json`; without a monitor only what `trainer_state.json` knows (`max_steps`).
        metrics (`list[Mapping]`):
            One entry per logged step, in ascending order: `step` and the metrics. Values are finite or `None`.
        alarms (`list[dict]`):
            One per alarm, in the order in which they were raised, with `step`, `cleared` (`None` while it is open),
            `name`, `evidence`, `cause`, `remedy` and `action`.
        notes (`list[str]`):
            What is missing or could not be read, in words for the reader of the report.
        last_write (`float`, *optional*):
            When something was logged last, in seconds since 1970.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    last_write: float | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def max_steps(self) -> int | None:
        value = self.info.get("max_steps")
        return value if isinstance(value, int) and 0 < value < MAX_STEP else None

    @functools.cached_property
    def held_out(self) -> HeldOutRun:
        """The held-out evaluations, as far as answers were recorded."""
        return read_held_out(self.folder)

    @functools.cached_property
    def metric_names(self) -> list[str]:
        """Every metric that has a value somewhere, in the order in which they appear."""
        names: dict[str, None] = {}
        for entry in self.metrics:
            if len(entry.keys() - names.keys()) > 0:  # which is so for few of them
                names.update(dict.fromkeys(key for key, value in entry.items() if value is not None))
        return [name for name in names if name not in ("step", "epoch", "time")]

    def column(self, name: str) -> list[float | None]:
        """The values of a metric, one per logged step."""
        return [entry.get(name) for entry in self.metrics]

    @property
    def function_names(self) -> list[str]:
        """Names of TRL's reward functions, which alone have a standard deviation in the logs."""
        given = self.info.get("reward_names")
        if isinstance(given, list) and given:
            return [str(name) for name in given]
        names = {*self.metric_names}
        return [name for name in self.reward_names if f"rewards/{name}/std" in names]

    @property
    def reward_names(self) -> list[str]:
        """Names of everything logged as `rewards/<name>/mean`: reward functions and components of composed ones."""
        names = (name for name in self.metric_names if name.startswith("rewards/") and name.endswith("/mean"))
        return [name.removeprefix("rewards/").removesuffix("/mean") for name in names]

    @property
    def reward_weights(self) -> list[float] | None:
        """Weights of the reward functions, `None` where the run did not say."""
        given = self.info.get("reward_weights")
        if not isinstance(given, list) or len(given) != len(self.function_names):
            return None
        return [float(value) for value in given] if all(is_number(value) for value in given) else None

    @property
    def open_alarms(self) -> list[dict[str, Any]]:
        return [alarm for alarm in self.alarms if alarm["cleared"] is None]


def read_run(folder: str | Path) -> Run:
    """
    Read a run: finished, in progress or interrupted, with or without a monitor.

    Args:
        folder (`str` or `Path`):
            `output_dir` of the run.

    Returns:
        [`Run`]:
            What is known about it. Whatever is missing or broken is said in `notes`.

    Raises:
        [`NotARunError`]: when the folder holds nothing that a run writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotARunError(f"{folder} is no folder: pass the output_dir of a training run")
    monitor = folder / FOLDER
    run = Run(folder)
    if (monitor / RUN).exists() or (monitor / METRICS).exists():
        _read_monitor(run, monitor)
    elif not _read_trainer_state(run) and not any((folder / "completions").glob("completions_*.parquet")):
        raise NotARunError(
            f"{folder} is no run: it has no {FOLDER}/{METRICS} (written by MonitorCallback), no trainer_state.json, "
            "no checkpoint-*/trainer_state.json and no completions/: pass the output_dir of a training run"
        )
    if not run.metrics:
        run.notes.append("Nothing is logged yet: a run logs its first metrics after logging_steps steps.")
    return run


def is_run(folder: Path) -> bool:
    """Whether a folder holds something that a run writes."""
    patterns = (f"{FOLDER}/{RUN}", f"{FOLDER}/{METRICS}", "trainer_state.json", "checkpoint-*/trainer_state.json")
    return any(next(folder.glob(pattern), None) for pattern in (*patterns, "completions/completions_*.parquet"))


def runs_in(folder: Path) -> list[Path]:
    """The runs right below a folder, and those below its subfolders that are none, by name."""
    if not folder.is_dir() or is_run(folder):
        return []
    found: list[Path] = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        below = [path] if is_run(path) else [p for p in path.iterdir() if p.is_dir() and not p.is_symlink()]
        found += sorted(run for run in below if is_run(run))
    return found


def _read_monitor(run: Run, monitor: Path) -> None:
    for name in (RUN, METRICS, ALARMS):
        if (monitor / name).exists() and not is_own_file(run.folder, monitor / name):
            run.notes.append(f"{FOLDER}/{name} is no file of this folder and is left out.")
    try:
        info = read_whole(run.folder, monitor / RUN)
        run.info = info if isinstance(info, dict) else {}
    except (OSError, ValueError):
        run.notes.append(f"{FOLDER}/{RUN} is missing or broken, so the configuration is unknown.")
    run.metrics, broken = _merge(read_lines(monitor / METRICS, run.folder))
    if broken:
        run.notes.append(f"{broken} lines of {FOLDER}/{METRICS} could not be read and are left out.")
    if run.info.get("resumed_at_steps"):
        run.notes.append(f"The run was resumed at steps {one_line(run.info['resumed_at_steps'], 1000)}.")
    run.alarms, broken = read_alarms(monitor / ALARMS, run.folder)
    if broken:
        run.notes.append(f"{broken} lines of {FOLDER}/{ALARMS} could not be read and are left out.")
    times = [entry["time"] for entry in run.metrics if entry.get("time") is not None]
    run.last_write = times[-1] if times else None


def _read_trainer_state(run: Run) -> bool:
    """Take the logs from the newest `trainer_state.json`; whether there was one."""
    paths = [*run.folder.glob("trainer_state.json"), *run.folder.glob("checkpoint-*/trainer_state.json")]
    states = []
    for path in paths:
        try:
            state = read_whole(run.folder, path)
            history, step = list(state["log_history"]), int(state["global_step"])
            states.append((step, path.stat().st_mtime, path, history, state))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            run.notes.append(f"{path.relative_to(run.folder)} is broken and is left out.")
    if not states:
        return bool(paths)
    _, run.last_write, path, history, state = max(states, key=lambda found: found[:2])
    run.metrics, _ = _merge(entry for entry in history if isinstance(entry, dict))
    run.info = {"max_steps": state.get("max_steps")}
    run.notes.append(
        f"There is no {FOLDER}/, so metrics come from {path.relative_to(run.folder)}, as of step "
        f"{state['global_step']}; alarms, configuration and versions are unknown. Add MonitorCallback to have them."
    )
    return True


def _merge(lines: Iterable[dict[str, Any] | None]) -> tuple[list[Entry], int]:
    """
    One entry per step: a training log, an evaluation and the closing summary of one step are joined. And how many lines
    are broken.
    """
    entries: dict[int, Entry] = {}
    places: Places = {}
    broken = 0
    for line in lines:
        if line is None:
            broken += 1
            continue
        step = line.get("step")
        if not is_number(step) or not 0 <= step < MAX_STEP:
            continue
        values = {str(key): value if is_number(value) else None for key, value in line.items()}
        if not 0 <= (values.get("time") or 0) <= MAX_TIME:
            values["time"] = None
        before: Mapping[str, Any] = entries.get(int(step), {})
        joined = {**before, **{key: value for key, value in values.items() if value is not None or key not in before}}
        entries[int(step)] = Entry({**joined, "step": int(step)}, places)
    return [entries[step] for step in sorted(entries)], broken


def average(values: Sequence[float]) -> float:
    """
    The mean of finite numbers, of any size: never infinite, and never outside of what it is the mean of.

    Example:

    ```python
    >>> average([1.0, 2.0, 6.0]), average([1.7e308, 1.7e308])
    (3.0, 1.7e+308)

    ```
    """
    count = len(values)
    mean = sum(values) / count
    if not math.isfinite(mean):  # the sum is beyond what a float can hold
        mean = sum(value / count for value in values)
    return min(max(mean, min(values)), max(values))


def state_of(run: Run, now: float | None = None) -> tuple[str, str]:
    """
    Whether the run is still going.

    Args:
        run ([`Run`]):
            The run.
        now (`float`, *optional*):
            Seconds since 1970; defaults to the clock.

    Returns:
        `tuple[str, str]`:
            `"finished"`, `"running"`, `"silent"` (it should have logged again by now) or `"unknown"`, and a sentence.
    """
    now = time.time() if now is None else now
    if run.info.get("status") == "finished" or (run.max_steps and run.last_step >= run.max_steps):
        return "finished", f"finished at step {run.last_step}"
    if run.info.get("status") != "running":
        if run.last_write is None:
            return "unknown", "not known to have finished"
        return "unknown", f"not known to have finished; last written {duration(now - run.last_write)} ago"
    since = run.last_write if run.last_write is not None else _started(run)
    if since is None:
        return "running", "running, nothing logged yet"
    age = f"last log {duration(now - since)} ago" if run.metrics else f"started {duration(now - since)} ago"
    between = seconds_between_logs(run)
    # A log takes as long as its steps; ten times that, and ten minutes at least for the first, is no mere delay.
    if now - since > max(600.0, 10 * (between or 0.0)):
        often = f", where one came every {duration(between)}" if between else ""
        return "silent", f"probably interrupted: {age}{often}"
    return "running", f"running, {age}"


def _started(run: Run) -> float | None:
    try:
        return datetime.fromisoformat(str(run.info.get("started"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def seconds_between_logs(run: Run) -> float | None:
    """Median time between two logs, over the last 50 of them."""
    times = [entry["time"] for entry in run.metrics[-50:] if entry.get("time") is not None]
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    return gaps[len(gaps) // 2] if gaps else None


def number(value: float) -> str:
    """
    Three significant digits, without exponents where that stays short.

    Example:

    ```python
    >>> number(0.01234), number(1234.5), number(0.5), number(-3e-7), number(0.0)
    ('0.0123', '1234', '0.500', '-3.00e-07', '0')

    ```
    """
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def duration(seconds: float) -> str:
    """
    A time span in two units at most.

    Example:

    ```python
    >>> duration(42), duration(754), duration(9000), duration(200_000)
    ('42 s', '12 min 34 s', '2 h 30 min', '2 d 7 h')

    ```
    """
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
