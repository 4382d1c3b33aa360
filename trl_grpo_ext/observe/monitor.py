"""See the run: metrics that TRL does not log, a record on disk, alarms that say what to change and can do it."""

import functools
import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..config import check_on_alarm
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .actions import CLASSES, Action
from .alarms import Alarm, AlarmDetector, Event, make_alarms
from .effect import UpdateCheck, check_trainable
from .record import FOLDER, RunRecord
from .secrets import without_secrets

logger = logging.getLogger(__name__)

# Seam of TRL -> phase that it is counted as. What is left of a step is "update".
PHASES = {"_generate": "generate", "_calculate_rewards": "score"}
WITHOUT_EFFECT = "updates/without_effect"


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
        `ValueError`: for unknown alarms and actions, actions that cannot work with the configuration, and a model of
            which nothing can be trained.
    """

    is_unique = True
    _record: RunRecord | None = None
    _check: UpdateCheck | None = None

    def __init__(self, on_alarm: Mapping[str, str] | None = None, alarms: Sequence[Alarm] | None = None):
        self.alarms = make_alarms() if alarms is None else alarms
        check_on_alarm(on_alarm or {}, [alarm.name for alarm in self.alarms])
        self.on_alarm = dict(on_alarm or {})

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        check_trainable(trainer.model)
        callbacks = trainer.callback_handler.callbacks
        self.trainer = trainer
        self.detector = AlarmDetector(self.alarms)
        self.actions: dict[str, Action] = {name: CLASSES[name]() for name in dict.fromkeys(self.on_alarm.values())}
        self.reward_range = (math.inf, -math.inf)  # of all rewards so far
        self._seconds = dict.fromkeys(PHASES.values(), 0.0)
        self._step_start = 0.0
        self._record = self._check = None
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
        self._check = UpdateCheck(self.trainer) if self.is_attached else None
        if self.is_attached and state.is_world_process_zero:
            self._record = RunRecord(Path(args.output_dir) / FOLDER)  # which must be possible now
            self._record.start(description_of(self.trainer, state), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = dict.fromkeys(PHASES.values(), 0.0)
        self._step_start = time.perf_counter()

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self.reward_range = widened(self.reward_range, batch)
        batch.metrics |= metrics_of(batch, self.reward_range)
        if self._check is not None:
            self._check.sample(batch)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if self._check is not None:
            self._check.watch(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_attached:
            return
        updating = time.perf_counter() - self._step_start - sum(self._seconds.values())
        for phase, seconds in {**self._seconds, "update": updating}.items():
            self.trainer.log_metric(f"time/{phase}", seconds)
        if self._check is not None:
            self._check.end()
            names = {alarm.name for alarm in self.alarms} - {*self.detector.raised}
            if self._check.num_batches > 1 and "nothing_trained" in names:
                control.should_log = True  # the alarm should not wait for the next log

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
            seen[WITHOUT_EFFECT] = self._check.num_batches if self._check is not None else 0.0
            if seen[WITHOUT_EFFECT] > 0:
                logs[WITHOUT_EFFECT] = state.log_history[-1][WITHOUT_EFFECT] = seen[WITHOUT_EFFECT]
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


def widened(reward_range: tuple[float, float], batch: RolloutBatch) -> tuple[float, float]:
    """The range of rewards of a run, once a batch is seen; of what is infinite or missing, none."""
    rewards = torch.cat([part.rewards for part in batch.parts])
    rewards = rewards[rewards.isfinite()]
    if rewards.numel() == 0:
        return reward_range
    return min(reward_range[0], rewards.min().item()), max(reward_range[1], rewards.max().item())


def metrics_of(batch: RolloutBatch, reward_range: tuple[float, float]) -> dict[str, float]:
    """
    What the monitor logs of a batch: which completions teach nothing, at which end of the rewards, and the advantages.

    Args:
        batch ([`RolloutBatch`]):
            The finished batch.
        reward_range (`tuple[float, float]`):
            Smallest and largest reward of the run so far.

    Returns:
        `dict[str, float]`
    """
    low, high = reward_range
    middle = (low + high) / 2 if low < high else 0.0  # of a single value, the sign is all there is to go by
    rewards = torch.cat([part.rewards for part in batch.parts])
    flat = torch.cat([part.flat_completions() for part in batch.parts])
    advantages = batch.token_advantages
    counts = batch.token_mask if batch.advantages.dim() == 2 else torch.ones_like(advantages, dtype=torch.bool)
    num_counted = counts.sum().clamp(min=1)
    return {
        "rollouts/flat_high": (flat & (rewards > middle)).float().mean().item(),
        "rollouts/flat_low": (flat & ~(rewards > middle)).float().mean().item(),
        "advantage/mean": (advantages.sum() / num_counted).item(),
        "advantage/abs_mean": (advantages.abs().sum() / num_counted).item(),
        "advantage/nonzero": batch.teaches.float().mean().item(),
    }


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
