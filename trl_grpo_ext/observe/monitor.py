"""See the run: metrics that TRL does not log, a record on disk, alarms that say what to change and can do it."""

import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..config import check_on_alarm
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.checkpoints import read_object, write_whole
from ..host.state import check_state
from .actions import CLASSES, Action
from .alarms import Alarm, AlarmDetector, Event, make_alarms

logger = logging.getLogger(__name__)

FOLDER = "monitor"
# Seam of TRL -> phase that it is counted as. What is left of a step is "update".
PHASES = {"_generate": "generate", "_calculate_rewards": "score"}
SECRET = re.compile(
    r"^token$|(hub|auth|access|api|write|read)_token$|api_?key|secret|password|credential", re.IGNORECASE
)


class MonitorCallback(GRPOCallback):
    """
    Log what TRL does not, keep a record of the run in `<output_dir>/monitor`, and raise alarms.

    Looks and does not touch: without `on_alarm`, training is bit for bit what it is without the monitor. Metrics go
    through the trainer's log, so every tracker in `report_to` gets them. The main process writes `run.json` (what was
    run), `metrics.jsonl` (a line per log) and `alarms.jsonl` (a line per alarm that was raised or cleared). An alarm is
    also printed once, as one line with its evidence, likely cause and remedy, and logged as `alarms/<name>` as long as
    it is raised.

    Args:
        on_alarm (`dict[str, str]`, *optional*):
            Alarm to action: `"adapt_beta"`, `"cool_lr"`, `"cap_group_size"` or `"save_and_stop"`.
        alarms (`Sequence[Alarm]`, *optional*):
            Alarms with their thresholds. Defaults to those of [`~trl_grpo_ext.observe.alarms.make_alarms`].

    Raises:
        `ValueError`: for unknown alarms and actions, and for actions that cannot work with the configuration.
    """

    is_unique = True
    _record: "RunRecord | None" = None

    def __init__(self, on_alarm: Mapping[str, str] | None = None, alarms: Sequence[Alarm] | None = None):
        self.alarms = make_alarms() if alarms is None else alarms
        check_on_alarm(on_alarm or {}, [alarm.name for alarm in self.alarms])
        self.on_alarm = dict(on_alarm or {})

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        callbacks = trainer.callback_handler.callbacks
        self.trainer = trainer
        self.detector = AlarmDetector(self.alarms)
        self.actions: dict[str, Action] = {name: CLASSES[name]() for name in dict.fromkeys(self.on_alarm.values())}
        self.reward_range = (math.inf, -math.inf)  # of all rewards so far
        self._seconds = dict.fromkeys(PHASES.values(), 0.0)
        self._step_start = 0.0
        self._record = None
        # First in line, so that the trackers behind it get the alarms with the log that raised them.
        callbacks.remove(self)
        callbacks.insert(0, self)
        for action in self.actions.values():
            trainer.add_callback(action)
        for seam, phase in PHASES.items():
            setattr(trainer, seam, self._timed(getattr(trainer, seam), phase))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        if self.is_attached and state.is_world_process_zero:
            self._record = RunRecord(Path(args.output_dir) / FOLDER)  # which must be possible now
            self._record.start(description_of(self.trainer, state), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._step_start = time.perf_counter()

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        parts = batch.parts
        finite = torch.cat([part.rewards for part in parts])
        finite = finite[finite.isfinite()]
        if finite.numel() > 0:
            self.reward_range = (
                min(self.reward_range[0], finite.min().item()),
                max(self.reward_range[1], finite.max().item()),
            )
        high, low = (sum(counts) for counts in zip(*(self._count_flat(part) for part in parts), strict=True))
        num_rows = sum(part.group_ids.numel() for part in parts)
        batch.metrics["rollouts/flat_high"] = high / num_rows
        batch.metrics["rollouts/flat_low"] = low / num_rows
        advantages = batch.token_advantages
        counts = batch.token_mask if batch.advantages.dim() == 2 else torch.ones_like(advantages, dtype=torch.bool)
        num_counted = counts.sum().clamp(min=1)
        batch.metrics["advantage/mean"] = (advantages.sum() / num_counted).item()
        batch.metrics["advantage/abs_mean"] = (advantages.abs().sum() / num_counted).item()
        batch.metrics["advantage/nonzero"] = (advantages != 0).any(1).float().mean().item()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_attached:
            return
        updating = time.perf_counter() - self._step_start - sum(self._seconds.values())
        for phase, seconds in {**self._seconds, "update": updating}.items():
            self.trainer.log_metric(f"time/{phase}", seconds)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.is_attached or logs is None:
            return
        events: list[tuple[Event, str | None]] = []
        if "loss" in logs:
            seen = dict(logs)
            if self.trainer.accelerator.optimizer_step_was_skipped:
                # The search of fp16 for a scale of the loss: the gradient overflowed, and the weights are as before.
                seen.pop("grad_norm", None)
            events = [(event, self._act(event, control)) for event in self.detector.update(self._agreed(seen))]
            for name in self.detector.raised:
                # The trackers read `logs`, and log_history got a copy of it.
                logs[f"alarms/{name}"] = state.log_history[-1][f"alarms/{name}"] = 1.0
        if self._record is not None:
            self._record.log(state.global_step, logs, events)
            # The progress bar is put aside, so that the line does not end up in the middle of it.
            with tqdm.external_write_mode():
                for event, action in events:
                    logger.warning(f"Step {state.global_step}: {event.line}" + (f" [{action}]" if action else ""))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._record is not None:
            self._record.update(status="finished")

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds[phase] += time.perf_counter() - start

        return timed

    def _count_flat(self, batch: RolloutBatch) -> tuple[int, int]:
        """Rows in flat groups in the upper half of the rewards of this run so far, and in the lower half."""
        flat = batch.flat_groups()[batch.group_ids]
        is_alone = (batch.group_sizes == 1)[batch.group_ids]
        if is_alone.any():  # which teaches all the same where a critic stands in for the others
            flat = flat & ~(is_alone & (batch.advantages.reshape(len(flat), -1) != 0).any(1))
        low, high = self.reward_range
        # As long as all rewards are the same, their sign is all there is to go by.
        is_high = batch.rewards > ((low + high) / 2 if low < high else 0.0)
        return int((flat & is_high).sum()), int((flat & ~is_high).sum())

    def _agreed(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs of the main process. TRL gathers its metrics, yet nobody can promise that for every one of them."""
        if not self.actions or self.trainer.accelerator.num_processes == 1:
            return logs
        shared = [logs]
        broadcast_object_list(shared)
        return shared[0]

    def _act(self, event: Event, control: TrainerControl) -> str | None:
        """Do what the alarm is to do, on every rank; says what was done."""
        name = self.on_alarm.get(event.alarm.name)
        if name is None:
            return None
        if event.state == "raised":
            return self.actions[name].fire(event.alarm.name, control)
        if not any(self.on_alarm.get(alarm) == name for alarm in self.detector.raised):
            self.actions[name].release()
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"detector": self.detector.state_dict(), "reward_range": list(self.reward_range)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, detector=dict, reward_range=list)
        self.detector.load_state_dict(state_dict["detector"])
        low, high = map(float, state_dict["reward_range"])  # infinite as long as there was no reward
        self.reward_range = (low, high)


class RunRecord:
    """
    The record of a run: `run.json`, `metrics.jsonl` and `alarms.jsonl` in one folder.

    Args:
        folder (`Path`):
            Where the files go.
    """

    def __init__(self, folder: Path):
        self.run, self.metrics, self.alarms = (folder / name for name in ("run.json", "metrics.jsonl", "alarms.jsonl"))
        self._cut: set[Path] = set()  # files whose last line may be half written
        self._has_warned = False

    def start(self, description: dict[str, Any], step: int) -> None:
        """Start anew at step 0. At a later one, go on with the record that is there, as it was at that step."""
        self.run.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics, self.alarms):
            kept = (entry for entry in read_lines(path) if entry["step"] <= step) if step > 0 else ()
            lines = (f"{json.dumps(entry)}\n".encode() for entry in kept)
            write_whole(path, functools.partial(_write_lines, lines))
        started: dict[str, Any] = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if step > 0:
            before = read_object(self.run)
            resumed = before.get("resumed_at_steps")
            started["started"] = before.get("started", started["started"])
            started["resumed_at_steps"] = [*(resumed if isinstance(resumed, list) else []), step]
        _replace(self.run, json.dumps({**started, **description, "status": "running"}, indent=2) + "\n")

    def update(self, **changes: Any) -> None:
        with self._going_on(self.run):
            _replace(self.run, json.dumps({**read_object(self.run), **changes}, indent=2) + "\n")

    def log(self, step: int, logs: dict[str, Any], events: list[tuple[Event, str | None]]) -> None:
        """Append the metrics of a training step or an evaluation, and the alarms that came with them."""
        now = time.time()
        if "loss" in logs or any(name.startswith("eval_") for name in logs):
            numbers = {name: _finite(value) for name, value in logs.items() if isinstance(value, int | float | None)}
            self._append(self.metrics, {"step": step, "epoch": logs.get("epoch"), "time": now} | numbers)
        for event, action in events:
            entry = {"step": step, "time": now, "name": event.alarm.name, "state": event.state}
            entry |= {"evidence": event.evidence, "cause": event.alarm.cause, "remedy": event.alarm.remedy}
            self._append(self.alarms, entry | {"action": action})

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False) + "\n"
        with self._going_on(path):
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}" if path in self._cut else line)
            self._cut.discard(path)

    @contextlib.contextmanager
    def _going_on(self, path: Path) -> Iterator[None]:
        """A disk that is full, or a file system that is gone for a while, costs lines of the record and not the run."""
        try:
            yield
        except OSError as error:
            self._cut.add(path)
            if not self._has_warned:
                self._has_warned = True
                logger.warning(f"{path} could not be written ({error}): training goes on, and the record has a gap")


def description_of(trainer: Any, state: Any) -> dict[str, Any]:
    """What is being run, safe to write as JSON and without secrets."""
    packages = {name: name for name in ("transformers", "trl", "accelerate", "peft", "datasets")}
    versions = {name: _version(package) for name, package in (packages | {"trl_grpo_ext": "trl-grpo-ext"}).items()}
    return {
        "config": without_secrets(trainer.args.to_dict()),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **versions},
        "num_processes": trainer.accelerator.num_processes,
        "model": get_config_model_id(trainer.model.config),
        "reward_names": list(trainer.reward_func_names),
        "reward_weights": trainer.reward_weights.tolist(),
        "max_steps": state.max_steps,
    }


def without_secrets(value: Any) -> Any:
    """
    Options as plain JSON: tokens, passwords and the like left out, other objects as text, NaN and infinity as `None`.

    ```python
    >>> without_secrets({"hub_token": "hf_x", "eos_token": "<eos>", "lr": float("inf"), "kwargs": {"password": "x"}})
    {'eos_token': '<eos>', 'lr': None, 'kwargs': {}}
    >>> without_secrets({"url": "http://me:secret@host:8000/v1"})
    {'url': 'http://host:8000/v1'}

    ```
    """
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v) for k, v in value.items() if not SECRET.search(str(k))}
    if isinstance(value, list | tuple | set):
        return [without_secrets(v) for v in value]
    if isinstance(value, int | float | None):
        return _finite(value)
    return re.sub(r"//[^/@\s]+@", "//", str(value))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, one at a time, without one that a killed run left half written."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry


def _finite(value: float | None) -> float | None:
    try:
        return value if value is None or math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _write_lines(lines: Iterable[bytes], file: IO[bytes]) -> None:
    file.writelines(lines)


def _replace(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
