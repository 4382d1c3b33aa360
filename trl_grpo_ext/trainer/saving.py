"""[`SavingGRPOTrainer`]: TRL's trainer with checkpoints that are complete or do not count, and callbacks in them."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..hooks.callback import GRPOCallback
from ..host import checkpoints
from ..host.processes import OtherProcessError, gather_values, together
from ..host.seams import logged_since_log, loss_since_log, restore_logged, restore_loss
from ..host.state import check_logged, check_readable, check_rollouts, check_savable, check_state
from ..observe.evaluation import HeldOutCallback
from ..plan.planner import Planner
from . import card
from .lean import LeanGRPOTrainer

logger = get_logger(__name__)

STATE_FILE, STATE_VERSION = "grpo_callbacks.pt", 2
ROLLOUTS_FILE = "grpo_rollouts_{rank}.pt"


def draw_past(sampler: Any, num_epochs: int) -> None:
    """
    Bring a fresh sampler to where it stands after some epochs.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]):
            Sampler of TRL, which draws the order of the prompts of each epoch from one generator.
        num_epochs (`int`):
            Epochs that are over.
    """
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(num_epochs):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


class SavingGRPOTrainer(LeanGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that never resumes from half a checkpoint, and keeps the state of its [`GRPOCallback`]s.

    It is the base of [`AdaptiveGRPOTrainer`], which calls these callbacks. All processes write a checkpoint or none
    does: what fails on one of them, in any file, is an error on all of them, and the checkpoint does not count.

    Raises:
        [`~trl_grpo_ext.host.checkpoints.CheckpointError`]: where a checkpoint cannot be written. Also when asked to
        resume from a checkpoint that is not complete, or from a state of the callbacks that no save wrote.
    """

    _planner: Planner | None
    _num_rollouts: int
    _is_saving = False
    _save_error: Exception | None = None  # the first one on this process, of the save that runs
    _carried_loss: tuple[float, int] | None = None  # from the checkpoint, until training begins
    _sampler: Any = None  # of the prompts, where there is one: a stream has none

    @property
    def grpo_callbacks(self) -> list[GRPOCallback]:
        """The callbacks with hooks, in the order in which they run."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, GRPOCallback)]

    @property
    def _is_stock(self) -> bool:
        """Whether nothing of this package is switched on, so that checkpoints hold and do what they do in TRL."""
        args = self.args
        return not (self.grpo_callbacks or args.share_prompts or args.skip_zero_advantage or args.merge_adapter)

    # TRL's seams: the save

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self._is_saving, self._save_error = self.args.save_total_limit, True, None
        try:
            with together():
                if self.args.should_save:
                    checkpoints.begin(folder)
            losses = gather_values(loss_since_log(self))
            with together():
                super()._save_checkpoint(model, trial)
                if self._save_error is not None:
                    raise self._save_error
                if not self._is_stock and not self.args.save_only_model:
                    self._save_state(folder, losses)
            with together():
                if self.args.should_save:
                    checkpoints.complete(folder)
        except Exception as error:
            raise self._save_failed(folder, error) from error
        finally:
            self.args.save_total_limit, self._is_saving, self._save_error = limit, False, None
        with together():
            if self.args.push_to_hub:
                self._push_from_checkpoint(folder)
            if self.args.should_save:
                checkpoints.delete_old(folder, limit, self.state.best_model_checkpoint)

    def _save_failed(self, folder: str, error: Exception) -> checkpoints.CheckpointError:
        """The same error for every process, once what is there of the checkpoint is deleted."""
        try:
            if self.args.should_save:
                checkpoints.discard(folder)
            last, _ = checkpoints.last_complete(os.path.dirname(folder))
            remedy = "there is no complete checkpoint" if last is None else f"the last complete checkpoint is {last}"
        except OSError as unreadable:  # every process must come to the gather
            remedy = f"no complete checkpoint was found, since the folder of the run cannot be read: {unreadable}"
        own = None if isinstance(error, OtherProcessError) else checkpoints.reason_of(folder, error)
        found = gather_values((own, remedy))
        rank, reason = next((rank, reason) for rank, (reason, _) in enumerate(found) if reason is not None)
        where = f"process {rank}: " if len(found) > 1 else ""
        return checkpoints.CheckpointError(f"{folder} could not be written ({where}{reason}): {found[0][1]}")

    def _write_part(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Write a part of a checkpoint. An error waits for the end, since the parts behind it may be collective."""
        try:
            write(*args, **kwargs)
        except Exception as error:
            if not self._is_saving:
                raise
            self._save_error = self._save_error or error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            self._write_part(checkpoints.drop_links, self.args.output_dir, "README.md")
        self._write_part(super().create_model_card, *args, **kwargs)
        if self.args.should_save:
            self._write_part(self._complete_card)

    def _complete_card(self) -> None:
        """Add to TRL's card what the run knows of itself."""
        path = Path(self.args.output_dir, "README.md")
        if not path.exists():
            return
        evaluations = [c for c in self.grpo_callbacks if isinstance(c, HeldOutCallback) and c.starts]
        before, after = (evaluations[0].before, evaluations[0].after) if evaluations else (None, None)
        sections = {
            "Reward": card.reward_section(self.reward_funcs, self.reward_func_names, self.reward_weights.tolist()),
            "Held-out results": card.held_out_section(before, after),
            "Options that differ from the defaults": card.options_section(self.args),
            "Adapter": card.adapter_section(self._adapter()),
            "Command": card.command_section(sys.argv),
        }
        # Not at each checkpoint: a picture would hold it up, and reading a row may draw random numbers of the training.
        is_last = after is not None and not self._is_saving
        if is_last and card.draw(self.state.log_history, path.with_name(card.PICTURE)):
            sections["Held-out results"] += f"\n\n![Reward over completions]({card.PICTURE})"
        system = card.system_of(self.eval_dataset) if is_last else None
        name = self.hub_model_id or Path(self.args.output_dir).name
        asked = None if after is None or not after.questions else after.questions[0]
        text = path.read_text(encoding="utf-8")
        text = card.completed(text, sections, name, asked, self.args.max_completion_length, system)
        path.write_text(text, encoding="utf-8")

    def _adapter(self) -> Any:
        configs = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})
        return next(iter(configs.values()), None)

    def _without_folders(self, path: Path) -> None:
        """What peft has just written of the base model, without a folder that only this machine has."""
        if path.exists():
            path.write_text(card.without_folders(path.read_text(encoding="utf-8")), encoding="utf-8")

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            self._write_part(checkpoints.drop_links, output_dir or self.args.output_dir, *checkpoints.SAVED)
        self._write_part(super().save_model, output_dir, *args, **kwargs)
        if self.args.should_save:
            self._write_part(self._without_folders, Path(output_dir or self.args.output_dir, "README.md"))
        if self._is_saving:  # training_args.bin holds the limit now, and old checkpoints are for us to delete
            self.args.save_total_limit = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._write_part(super()._save_optimizer_and_scheduler, output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        self._write_part(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._write_part(super()._save_rng_state, output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # but once it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def log(self, *args: Any, **kwargs: Any) -> None:
        if self.log_completions and self.args.should_save:
            table = f"completions_{self.state.global_step:05d}.parquet"
            checkpoints.drop_links(os.path.join(self.args.output_dir, "completions"), table)
        super().log(*args, **kwargs)

    # TRL's seams: the way back

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        if resume_from_checkpoint and resume_from_checkpoint is not True:
            with together():  # each process looks at the files of its machine
                if os.path.isdir(resume_from_checkpoint):
                    checkpoints.check_complete(resume_from_checkpoint)
        self._carried_loss = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        sampler: Sampler[int] = super()._get_train_sampler(dataset)
        self._sampler = sampler
        return sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._is_stock:
            return
        # TRL's begins with the first epoch again. Up to transformers 5.2, `self.state` is not loaded yet.
        state_file = os.path.join(checkpoint, checkpoints.TRAINER_STATE)
        if getattr(self._sampler, "shuffle", False) and os.path.isfile(state_file):
            draw_past(self._sampler, int(TrainerState.load_from_json(state_file).epoch or 0))
        with together():
            self._load_state(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._carried_loss is not None:  # only now, since transformers sets the sum to 0 in between
            restore_loss(self, *self._carried_loss)
            self._carried_loss = None

    # Checkpoints

    def _last_checkpoint(self) -> str | bool:
        """The last complete checkpoint of the run, the same on every process; `True` if there is nothing to look at."""
        with together():
            found, skipped = checkpoints.last_complete(self.args.output_dir)
        chosen = [(None if found is None else found.name, skipped)]
        if self.accelerator.num_processes > 1:  # the main process decides
            broadcast_object_list(chosen)
        name, skipped = chosen[0]
        if skipped and name is None:
            raise checkpoints.CheckpointError(
                f"No checkpoint in {self.args.output_dir} is complete ({'; '.join(skipped)}): start the run anew, "
                "without resume_from_checkpoint"
            )
        if skipped:
            logger.warning(f"Resuming from {name}: {'; '.join(skipped)}")
        return True if name is None else os.path.join(self.args.output_dir, name)  # True: transformers says so

    def _save_state(self, folder: str, losses: list[float]) -> None:
        # Between two generations, the rollouts still to be trained on are part of the state.
        step = self._step % math.lcm(
            self.args.steps_per_generation * self.num_iterations, self.args.gradient_accumulation_steps
        )
        if self.args.should_save:
            state = {
                "version": STATE_VERSION,
                "callbacks": [(type(callback).__name__, self._state_of(callback)) for callback in self.grpo_callbacks],
                "planner": None if self._planner is None else self._state_of(self._planner),
                "num_rollouts": self._num_rollouts,
                "ranks_with_rollouts": self.accelerator.num_processes if step > 0 else 0,
                "logged": self._logged(losses),
            }
            checkpoints.write_whole(os.path.join(folder, STATE_FILE), lambda file: torch.save(state, file))
        if step > 0:
            os.makedirs(folder, exist_ok=True)
            rollouts = {"step": step, "inputs": self._buffered_inputs}
            check_savable(rollouts, " of the rollouts")
            with checkpoints.blaming("rollouts that are still to be trained on"):
                check_rollouts(rollouts, self.args.steps_per_generation)
            path = os.path.join(folder, ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
            checkpoints.write_whole(path, lambda file: torch.save(rollouts, file))

    def _state_of(self, writer: GRPOCallback | Planner) -> dict[str, Any]:
        """State that can be read back."""
        name = type(writer).__name__
        state = writer.state_dict()
        check_savable(state, f" of {name}")
        with checkpoints.blaming(f"state_dict() of {name} could not be read back"):
            check_readable(writer, state)
        return state

    def _logged(self, losses: list[float]) -> dict[str, Any]:
        """What was measured since the last log, on all processes."""
        logged = {"losses": losses, **logged_since_log(self, with_table=self.log_completions)}
        try:
            check_savable(logged["table"])
        except ValueError as error:  # of a column that a reward function logs as it likes
            self._say_once(f"The table of completions is not part of the checkpoints: {error}")
            logged["table"] = {}
        return logged

    def _load_state(self, checkpoint: str) -> None:
        # What a run before this one sampled and logged is not part of this run.
        self._step, self._buffered_inputs = 0, None
        restore_logged(self, {}, {})
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            logger.warning(f"{checkpoint} has no {STATE_FILE}: the callbacks start from scratch")
            return
        state = checkpoints.load_tensors(path)
        with checkpoints.blaming(path):
            check_state(state, version=int)
            if state["version"] != STATE_VERSION:
                raise ValueError(
                    f"'version' is {state['version']}, and this release reads {STATE_VERSION}: resume with the "
                    "release that wrote it"
                )
            check_state(state, callbacks=list, planner=object, num_rollouts=int, ranks_with_rollouts=int, logged=dict)
            check_logged(state["logged"])
            found = [(name, entry) for name, entry in state["callbacks"]]
        self._num_rollouts = state["num_rollouts"]
        if self._planner is not None and state["planner"] is not None:
            with checkpoints.blaming(f"{path}, planner"):
                self._planner.load_state_dict(state["planner"])
        for callback in self.grpo_callbacks:
            name = type(callback).__name__
            position = next((i for i, entry in enumerate(found) if entry[0] == name), None)
            if position is not None:
                with checkpoints.blaming(f"{path}, {name}"):
                    callback.load_state_dict(found.pop(position)[1])
            elif callback.state_dict():
                logger.warning(f"{checkpoint} has no state of {name}: it starts from scratch")
        self._load_logged(state["logged"])
        # With another number of processes, every rank generates anew.
        if state["ranks_with_rollouts"] == self.accelerator.num_processes:
            path = os.path.join(checkpoint, ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
            rollouts = checkpoints.load_tensors(path, self.accelerator.device)
            with checkpoints.blaming(path):
                check_rollouts(rollouts, self.args.steps_per_generation)
            self._step, self._buffered_inputs = rollouts["step"], rollouts["inputs"]

    def _load_logged(self, logged: dict[str, Any]) -> None:
        """Go on with what was measured since the last log before the checkpoint."""
        restore_logged(self, logged["metrics"], logged["table"])
        losses = logged["losses"]
        if len(losses) == self.accelerator.num_processes:
            loss = losses[self.accelerator.process_index]
        else:  # which are averaged at the next log anyway
            loss = sum(losses) / len(losses)
        self._carried_loss = (loss, logged["last_log"])
