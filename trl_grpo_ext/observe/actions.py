"""What an alarm can do: adapt β, cool the learning rate, cap the group size, save and stop."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..host.state import check_state
from ..plan.sizes import fit_group_sizes, num_groups_that_fit

BETA_FACTOR = 2.0  # β is multiplied by this each time
BETA_MAX_SCALE = 8.0  # and never goes above this multiple of `beta`
BETA_HALF_LIFE = 10  # steps in which it halves again once the alarm is over
LR_FACTOR = 0.5  # of the learning rate
LR_STEPS = 20  # optimizer steps for which it is cooled


class Action(GRPOCallback):
    """
    Something that an alarm does to a run. Logged, reversible, resumable, and the same on every rank.

    The monitor calls [`fire`] when an alarm is raised and [`release`] when none of the alarms behind the action is
    raised any more, on every rank. What follows from that happens in the hooks, like those of any callback.
    """

    is_unique = True

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer

    def fire(self, alarm: str, control: TrainerControl) -> str:
        """Act. Returns what was done, in words."""
        raise NotImplementedError

    def release(self) -> None:
        """The illness is over."""

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.trainer.log_metric(name, value)


class AdaptBeta(Action):
    """
    Double the weight of the KL term, up to 8 times `beta`; once the alarm is over, let it fall back.

    After the alarm, it halves every 10 steps until it is `beta` again. Logs `beta` and `actions/beta_scale`.
    """

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        message = "on_alarm asks for 'adapt_beta', and kl_target moves beta already: leave one of them out"
        return (Conflict("AdaptiveKLCallback", message),)

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        super().on_setup(args, trainer)
        if args.beta == 0:
            raise ValueError(
                "on_alarm asks for 'adapt_beta', and with beta=0 there is no KL term and no reference model: set beta, "
                "for example to 0.04, or use 'cool_lr'"
            )
        self.start, self.scale, self.is_held = args.beta, 1.0, False

    def fire(self, alarm: str, control: TrainerControl) -> str:
        before = self.trainer.beta
        self.is_held = True
        self._set(min(BETA_FACTOR * self.scale, BETA_MAX_SCALE))
        return f"adapt_beta: beta from {before:.3g} to {self.trainer.beta:.3g} until the alarm is over"

    def release(self) -> None:
        self.is_held = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log({"beta": self.trainer.beta, "actions/beta_scale": self.scale})
        if self.scale > 1 and not self.is_held:
            self._set(max(1.0, self.scale * 0.5 ** (1 / BETA_HALF_LIFE)))

    def _set(self, scale: float) -> None:
        self.scale = scale
        self.trainer.beta = self.start * scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "is_held": self.is_held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, scale=float, is_held=bool)
        if not 1 <= state_dict["scale"] <= BETA_MAX_SCALE:
            raise ValueError(f"'scale' is {state_dict['scale']}: not between 1 and {BETA_MAX_SCALE:g}")
        self.is_held = state_dict["is_held"]
        self._set(state_dict["scale"])


class CoolLearningRate(Action):
    """
    Halve the learning rate for 20 optimizer steps.

    The factor is applied right before the optimizer steps and taken back right after, so no scheduler ever sees it and
    any scheduler works. `learning_rate` in the logs is the scheduler's; the factor is logged as `actions/lr_scale`.
    """

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        message = (
            "on_alarm asks for 'cool_lr', and DeepSpeed steps its optimizer inside of the backward pass, where a "
            "callback cannot reach the learning rate: use 'save_and_stop'"
        )
        return (Conflict("DeepSpeed", message),)

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        super().on_setup(args, trainer)
        self.num_left = 0
        self._rates: list[float] = []

    def fire(self, alarm: str, control: TrainerControl) -> str:
        self.num_left = LR_STEPS
        return f"cool_lr: learning rate times {LR_FACTOR:g} for {LR_STEPS} steps"

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if self.num_left > 0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * LR_FACTOR

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log({"actions/lr_scale": LR_FACTOR if self.num_left > 0 else 1.0})
        self.num_left = max(self.num_left - 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"num_left": self.num_left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, num_left=int)
        self.num_left = state_dict["num_left"]


class CapGroupSize(Action):
    """
    Halve `max_group_size`, though not below `num_generations`, until the alarm is over.

    The number of rows stays as it is, so that what large groups lose goes to smaller ones or to more prompts. Logs
    `actions/max_group_size`.
    """

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        super().on_setup(args, trainer)
        others = [callback for callback in trainer.grpo_callbacks if callback is not self]
        if not any(callback.overrides("on_group_sizes") for callback in others):
            raise ValueError(
                f"on_alarm asks for 'cap_group_size', and group_size={args.group_size!r} gives every prompt "
                "num_generations: set group_size='variance' or 'threshold', or use 'cool_lr'"
            )
        self.is_capped = False
        self.smallest, self.largest = args.group_size_bounds
        self.cap = max(args.num_generations, self.largest // 2)
        if self.cap >= self.largest:
            raise ValueError(
                f"on_alarm asks for 'cap_group_size', and max_group_size={self.largest} cannot be lowered "
                f"without going below num_generations={args.num_generations}: raise max_group_size, or use 'cool_lr'"
            )

    def fire(self, alarm: str, control: TrainerControl) -> str:
        self.is_capped = True
        return f"cap_group_size: groups of at most {self.cap} until the alarm is over"

    def release(self) -> None:
        self.is_capped = False

    def on_group_sizes(
        self, args: AdaptiveGRPOConfig, prompt_index: Tensor, num_rows: int, sizes: Tensor, **kwargs: Any
    ) -> Tensor | None:
        if self.is_capped:
            if sizes.numel() * self.cap < num_rows:  # fewer and larger groups were asked for: let in more prompts
                more = prompt_index.numel() - sizes.numel()
                sizes = torch.cat([sizes.float(), torch.full((more,), float(args.num_generations))])
            num_groups = num_groups_that_fit(sizes, num_rows, self.smallest, self.cap)
            return fit_group_sizes(sizes[:num_groups], num_rows, self.smallest, self.cap)
        return None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log({"actions/max_group_size": float(self.cap if self.is_capped else self.largest)})

    def state_dict(self) -> dict[str, Any]:
        return {"is_capped": self.is_capped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, is_capped=bool)
        self.is_capped = state_dict["is_capped"]


class SaveAndStop(Action):
    """
    Write a checkpoint and end the training after this step.

    For `nan_loss` it stops without saving and evaluating: the weights may hold NaN by then, and a checkpoint of them
    could push a good one out of `save_total_limit`.
    """

    is_pending = False  # the checkpoint is still to be written
    is_broken = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        self.is_pending = self.is_broken = False

    def fire(self, alarm: str, control: TrainerControl) -> str:
        control.should_training_stop = True
        self.is_broken = self.is_broken or alarm == "nan_loss"
        self.is_pending = not self.is_broken
        self._ask(control)
        return "save_and_stop: " + ("stopped without saving" if self.is_broken else "saved and stopped")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_pending = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An alarm shall be heard before weights that it says are broken are saved, or generate for an evaluation.
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)
        # Where training was left, transformers may ask for more (`save_strategy="epoch"`) or have changed its mind
        # about the step (`save_strategy="best"`).
        self._ask(control)

    def _ask(self, control: TrainerControl) -> None:
        if self.is_pending:
            control.should_save = True
        elif self.is_broken:
            control.should_save = control.should_evaluate = False


# Keys: `ACTIONS` of the configuration.
CLASSES: dict[str, type[Action]] = {
    "adapt_beta": AdaptBeta,
    "cool_lr": CoolLearningRate,
    "cap_group_size": CapGroupSize,
    "save_and_stop": SaveAndStop,
}
