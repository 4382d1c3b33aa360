"""A live view of a run: a table that updates in place, or one readable line per log where there is no terminal."""

import functools
import logging
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
from .line import FIELDS, fields_of, open_alarms, readable, sparkline, trend
from .record import ALARMS, FOLDER, read_alarms
from .report.escaping import one_line
from .report.reader import duration, number
from .report.summary import large

HISTORY = 24  # logs in a sparkline and in a trend
MAX = 1e100  # of a value in them, so that differences and squares stay finite


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
