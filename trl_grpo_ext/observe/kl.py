"""Adaptive KL: move β so that the policy keeps a chosen distance to the reference model."""

import math
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaptiveGRPOConfig, check_kl
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..host.state import check_state

MAX_ERROR = 0.2  # the relative error is clipped to this (arXiv 1909.08593, section 2.2)
BETA_RANGE = 1e4  # β stays within this factor of its start: 0 is a fixed point, and TRL stops measuring the KL there


def adapt_beta(beta: float, kl: float, target: float, num_rollouts: float, horizon: float) -> float:
    """
    One step of the proportional controller of Ziegler et al. (arXiv 1909.08593).

    `beta * (1 + clip(kl / target - 1, -0.2, 0.2) * num_rollouts / horizon)`: while the KL is off by more than 20 %, β
    changes by a factor of e within about `5 * horizon` rollouts.

    Args:
        beta (`float`):
            Weight of the KL term in the loss.
        kl (`float`):
            KL between policy and reference, in nats per token. NaN leaves β as it is.
        target (`float`):
            KL to hold, in the same unit.
        num_rollouts (`float`):
            Completions that went into the update.
        horizon (`float`):
            Time constant, in completions.

    Returns:
        `float`:
            The new β.

    Example:

    ```python
    >>> round(adapt_beta(0.1, kl=1.0, target=0.5, num_rollouts=100, horizon=1000), 6)  # too far: the error is clipped
    0.102
    >>> round(adapt_beta(0.1, kl=0.45, target=0.5, num_rollouts=100, horizon=1000), 6)  # 10 % too near
    0.099

    ```
    """
    if math.isnan(kl):
        return beta
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return beta * (1 + error * num_rollouts / horizon)


class AdaptiveKLCallback(GRPOCallback):
    """
    Adapt `beta` after every optimizer step so that the KL to the reference model stays near a target.

    Reads the KL that TRL gathers from all processes, so every rank moves β alike. β starts at `beta` of the
    configuration, which must be above 0, stays within a factor of 10 000 of it, is logged as `beta`, and is part of the
    checkpoint. See [`~trl_grpo_ext.observe.kl.adapt_beta`] for the rule.

    Args:
        kl_target (`float`):
            KL to hold, in nats per token, as logged under `kl`.
        kl_horizon (`float`, *optional*, defaults to `10000.0`):
            Time constant in completions. Smaller values react faster and overshoot more.

    Raises:
        `ValueError`: for a target or horizon that is not positive, `beta=0`, and a horizon shorter than one step.
    """

    is_unique = True

    def __init__(self, kl_target: float, kl_horizon: float = 10_000.0):
        check_kl(kl_target, kl_horizon)
        self.kl_target = kl_target
        self.kl_horizon = kl_horizon

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        check_kl(self.kl_target, self.kl_horizon, args.beta)
        # Of a generation batch that serves several steps, each step counts its share.
        steps_per_batch = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        self.num_rollouts = args.generation_batch_size / steps_per_batch
        if self.num_rollouts > self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} is shorter than one step of {self.num_rollouts:g} rollouts, so β could "
                f"move by more than {MAX_ERROR:.0%} at once: raise it, for example to {20 * self.num_rollouts:g}"
            )
        self.trainer = trainer
        self.bounds = (args.beta / BETA_RANGE, args.beta * BETA_RANGE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_attached:
            return
        self.trainer.log_metric("beta", self.trainer.beta)
        self.trainer.log_metric("kl_target", self.kl_target)
        valid = [value for value in self.trainer.metrics_of_step("kl") if not math.isnan(value)]
        kl = sum(valid) / len(valid) if valid else math.nan
        beta = adapt_beta(self.trainer.beta, kl, self.kl_target, self.num_rollouts, self.kl_horizon)
        self.trainer.beta = min(max(beta, self.bounds[0]), self.bounds[1])

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.trainer.beta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, beta=float)
        if not state_dict["beta"] > 0:
            raise ValueError(f"'beta' is {state_dict['beta']}: not above 0")
        self.trainer.beta = state_dict["beta"]
