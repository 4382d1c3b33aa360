"""[`SavingGRPOTrainer`]: TRL's trainer with checkpoints that are complete or do not count, and callbacks in them."""

import math
import os
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
from ..host.state import check_rollouts, check_savable, check_state
from ..plan.planner import Planner
from .lean import LeanGRPOTrainer

logger = get_logger(__name__)

STATE_FILE, STATE_VERSION = "grpo_callbacks.pt", 1
ROLLOUTS_FILE = "grpo_rollouts_{rank}.pt"


def draw_past(sampler: Any, num_epochs: int) -> None:
    """
    Leave a sampler as it is after so many epochs.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]):
            TRL's, which draws one order of the prompts after the other from one generator.
        num_epochs (`int`):
            Epochs that are over.
    """
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(num_epochs):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


class SavingGRPOTrainer(LeanGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that never resumes from half a checkpoint, and keeps the state of its [`GRPOCallback`]s.

    It is the base of [`AdaptiveGRPOTrainer`], which calls them.

    Raises:
        [`~trl_grpo_ext.host.checkpoints.CheckpointError`]: where a checkpoint cannot be written, and when asked to
        resume from one that is not complete, or whose state of the callbacks is not what a save wrote.
    """

    _planner: Planner | None
    _num_rollouts: int
    _is_saving = False
    _sampler: Any = None  # of the prompts, where there is one: a stream has none

    @property
    def grpo_callbacks(self) -> list[GRPOCallback]:
        """The callbacks with hooks, in the order in which they run."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, GRPOCallback)]

    # TRL's seams

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint and os.path.isdir(resume_from_checkpoint):
            checkpoints.check_complete(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)
        if self._is_saving:  # training_args.bin holds the limit now, and old checkpoints are for us to delete
            self.args.save_total_limit = None

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        sampler: Sampler[int] = super()._get_train_sampler(dataset)
        self._sampler = sampler
        return sampler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self._is_saving = self.args.save_total_limit, True
        try:
            if self.args.should_save:
                checkpoints.begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.grpo_callbacks and not self.args.save_only_model:
                self._save_state(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.complete(folder)
        except Exception as error:
            raise checkpoints.save_failed(folder, error) from error
        finally:
            self.args.save_total_limit, self._is_saving = limit, False
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        if self.args.should_save:
            checkpoints.delete_old(folder, limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # but once it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        args = self.args
        is_stock = not (self.grpo_callbacks or args.share_prompts or args.skip_zero_advantage or args.merge_adapter)
        if checkpoint is None or is_stock:
            return
        # TRL's begins with the first epoch again. Up to transformers 5.2, `self.state` is not loaded yet.
        state_file = os.path.join(checkpoint, checkpoints.TRAINER_STATE)
        if getattr(self._sampler, "shuffle", False) and os.path.isfile(state_file):
            draw_past(self._sampler, int(TrainerState.load_from_json(state_file).epoch or 0))
        if self.grpo_callbacks:
            self._load_state(checkpoint)

    # Checkpoints

    def _last_checkpoint(self) -> str | bool:
        """The last complete checkpoint of the run, the same on every process; `True` if there is nothing to look at."""
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
        if name is None:
            return True  # transformers says that there is none
        path = os.path.join(self.args.output_dir, name)
        checkpoints.check_complete(path)  # on this machine too
        return path

    def _save_state(self, folder: str) -> None:
        # Between two generations, the rollouts still to be trained on are part of the state.
        step = self._step % math.lcm(
            self.args.steps_per_generation * self.num_iterations, self.args.gradient_accumulation_steps
        )
        if self.args.should_save:
            kept = [(type(callback).__name__, callback.state_dict()) for callback in self.grpo_callbacks]
            for name, value in kept:
                check_savable(value, f" of {name}")
            state = {
                "version": STATE_VERSION,
                "callbacks": kept,
                "planner": None if self._planner is None else self._planner.state_dict(),
                "num_rollouts": self._num_rollouts,
                "ranks_with_rollouts": self.accelerator.num_processes if step > 0 else 0,
            }
            checkpoints.write_whole(os.path.join(folder, STATE_FILE), lambda file: torch.save(state, file))
        if step > 0:
            os.makedirs(folder, exist_ok=True)
            rollouts = {"step": step, "inputs": self._buffered_inputs}
            path = os.path.join(folder, ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
            checkpoints.write_whole(path, lambda file: torch.save(rollouts, file))

    def _load_state(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            logger.warning(f"{checkpoint} has no {STATE_FILE}: the callbacks start from scratch")
            return
        state = checkpoints.load_tensors(path)
        with checkpoints.blaming(path):
            check_state(state, version=int, callbacks=list, planner=object, num_rollouts=int, ranks_with_rollouts=int)
            if state["version"] != STATE_VERSION:
                raise ValueError(
                    f"'version' is {state['version']}, and this release reads {STATE_VERSION}: resume with the "
                    "release that wrote it"
                )
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
        # With another number of processes, every rank generates anew.
        self._step, self._buffered_inputs = 0, None
        if state["ranks_with_rollouts"] == self.accelerator.num_processes:
            path = os.path.join(checkpoint, ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
            rollouts = checkpoints.load_tensors(path, self.accelerator.device)
            with checkpoints.blaming(path):
                check_rollouts(rollouts, self.args.steps_per_generation)
            self._step, self._buffered_inputs = rollouts["step"], rollouts["inputs"]
