"""A live view of a run: a table that updates in place, or one readable line per log where there is no terminal."""

import functools
import logging
import math
import sys
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..hooks.callback import GRPOCallback
from ..rewards.scoring import TALLIES
from .paired import NOISE
from .record import ALARMS, FOLDER, read_alarms
from .report.escaping import one_line
from .report.reader import duration, number
from .report.summary import large, slope
from .task_readings import tasks_in

HISTORY = 24  # logs in a sparkline and in a trend
MAX = 1e100  # of a value in them, so that differences and squares stay finite
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


class LiveView:
    """
    What the table shows: the newest logs, a short history of each metric, and the speed.

    Args:
        max_steps (`int`):
            Optimizer steps in all.
        step (`int`, *optional*, defaults to 0):
            Optimizer steps done.
    """

    def __init__(self, max_steps: int, step: int = 0):
        self.max_steps, self.step = max_steps, step
        self.logs: dict[str, Any] = {}
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.remedies: dict[str, str] = {}
        self.started = time.monotonic()
        self.times: deque[tuple[int, float]] = deque([(step, self.started)], maxlen=HISTORY)

    def step_to(self, step: int) -> None:
        self.step = step
        self.times.append((step, time.monotonic()))

    def log(self, logs: dict[str, Any]) -> None:
        """Take over what was logged; what an evaluation does not log stays."""
        if "loss" in logs:  # a training log has all open alarms
            self.logs = {name: value for name, value in self.logs.items() if not name.startswith("alarms/")}
        self.logs |= logs
        for name, value in logs.items():
            if isinstance(value, int | float) and abs(value) < MAX:  # which NaN is not either
                self.history[name].append(float(value))

    def render(self, width: int, fancy: bool = True) -> RenderableType:
        """The table for a terminal of `width` columns; `fancy` with characters beyond ASCII."""
        rows = fields_of(self.logs, len(FIELDS))
        for name, label in (("rollouts/total", "rollouts"), ("num_tokens", "tokens")):
            if self.logs.get(name) is not None:
                rows.append((label, large(self.logs[name]), ""))
        widest = max(10, width // 3)
        taken = [max((cell_len(row[column]) for row in rows), default=0) for column in (0, 1)]
        room = width - min(taken[0], widest) - taken[1] - 6  # what is left for bars, behind the arrow
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=widest)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True)
        for label, value, name in rows:
            past = list(self.history[name]) if name else []
            bars = f" {sparkline(past[-room:])}" if fancy and room >= 4 and len(past) > 1 else ""
            arrow = trend(past) if fancy else ""
            grid.add_row(Text(label, style="bold" if name == "reward" else ""), value, f"{arrow}{bars}")
        parts: list[RenderableType] = [self._progress(width, fancy), grid]
        for name in open_alarms(self.logs):
            remedy = self.remedies.get(name, "")
            text = f"alarm {one_line(name, 60)}" + (f": {one_line(remedy, 300)}" if remedy else "")
            parts.append(Text(text, style="bold red"))
        return Group(*parts)

    def _progress(self, width: int, fancy: bool) -> RenderableType:
        share = self.step / self.max_steps if self.max_steps > 0 else 0.0
        length = min(20, max(0, width - 60))
        full = round(share * length)
        bar = f"[{'#' * full}{'.' * (length - full)}] " if not fancy else "━" * full + "╌" * (length - full) + " "
        parts = [f"step {self.step}/{self.max_steps}", f"{bar if length else ''}{share:.0%}"]
        (first, began), (last, ended) = self.times[0], self.times[-1]
        if last > first:
            seconds = (ended - began) / (last - first)
            parts.append(f"{number(seconds)} s/step")
            parts.append(f"{duration((self.max_steps - self.step) * seconds)} left")
        parts.append(f"{duration(time.monotonic() - self.started)} so far")
        return Text("  ".join(parts), style="cyan")


class LiveCallback(GRPOCallback):
    """
    Shows a run in the terminal, in place of transformers' `ProgressCallback`; only the main process shows anything.

    On a terminal, a table stays at the bottom and is updated with every step, and what else is printed scrolls by above
    it. Where there is none (CI, Slurm, a pipe, a notebook), and in a trainer of TRL, every log is printed as one line.
    The terminal is left as it was found however training ends.

    Args:
        console (`rich.console.Console`, *optional*):
            Where to; defaults to the standard output.

    Example:

    ```python
    >>> from transformers import ProgressCallback
    >>> trainer.remove_callback(ProgressCallback)  # doctest: +SKIP
    >>> trainer.add_callback(LiveCallback)  # doctest: +SKIP

    ```
    """

    is_unique = True

    def __init__(self, console: Console | None = None):
        self.console = console
        self.view: LiveView | None = None
        self._alarms = Path()  # the record's file, once the training begins
        self._live: Live | None = None

    def on_setup(self, trainer: Any, **kwargs: Any) -> None:
        self.view, self._alarms = None, Path()
        train = trainer.train

        @functools.wraps(train)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self._stop()  # also where an exception or Ctrl-C ends the training

        trainer.train = watched

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        if not state.is_world_process_zero:
            return
        self.view = LiveView(state.max_steps, state.global_step)
        self._alarms = Path(args.output_dir) / FOLDER / ALARMS
        if self.is_attached and self._is_terminal():
            self._start(self.view)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.view is not None:
            self.view.step_to(state.global_step)
            self._refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.view is None or not logs or not ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            return
        self.view.log(logs)
        if {*open_alarms(logs)} - self.view.remedies.keys():  # the file of a long run may be long
            known = read_alarms(self._alarms, self._alarms.parent)[0]
            self.view.remedies |= {alarm["name"]: alarm["remedy"] for alarm in known}
        if self._live is None:
            line = readable(logs, state.global_step, state.max_steps)
            file = sys.stdout if self.console is None else self.console.file
            # A character that the output cannot write must not end the training.
            encoding = getattr(file, "encoding", None) or "utf-8"
            print(line.encode(encoding, "replace").decode(encoding), file=file, flush=True)
        self._refresh()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        self.view = None

    def _is_terminal(self) -> bool:
        if self.console is not None:
            return self.console.is_terminal and not self.console.is_dumb_terminal
        # Not rich's opinion, which FORCE_COLOR sways: colours in a CI log are welcome, cursor movements are not.
        own = Console()
        return sys.stdout is not None and sys.stdout.isatty() and own.is_terminal and not own.is_dumb_terminal

    def _start(self, view: LiveView) -> None:
        console = self.console or Console()
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=lambda: view.render(console.width, not console.options.ascii_only),
            # What the user sends to a file stays in the file.
            redirect_stdout=console.file is sys.stdout or console.file.isatty(),
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        console.show_cursor(True)  # so that nothing is left to repair when the process is killed
        self._handlers = []
        for handler in _stream_handlers():
            # They keep the stream that they found when they were made, and would write into the table.
            name = streams.get(id(handler.stream))
            if name is not None:
                self._handlers.append((handler, handler.stream))
                handler.stream = getattr(sys, name)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        for handler, stream in self._handlers:
            handler.stream = stream
        live.stop()


def _stream_handlers() -> "list[logging.StreamHandler[Any]]":  # Python 3.10 cannot subscript it
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    handlers = {handler for log in loggers for handler in getattr(log, "handlers", [])}
    # That of last resort looks its stream up each time.
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)]
