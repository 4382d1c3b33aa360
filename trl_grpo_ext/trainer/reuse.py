"""Several passes over a batch, as long as the policy stays near the one that sampled it."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer


def squared_log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """
    Sum of the squared log-ratios of the tokens that count, and their number, shape `(2,)`.

    Example:

    ```python
    >>> import torch
    >>> squared_log_ratio(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 5.0]]), torch.tensor([[1, 0]])).tolist()
    [4.0, 1.0]

    ```
    """
    ratio = (logps.detach().double() - old_logps.double()).where(mask > 0, 0.0)
    return torch.stack([ratio.square().sum(), (mask > 0).sum().double()])


class ReuseGuardCallback(GRPOCallback):
    """
    No further update on a batch once the policy has moved too far from the one that sampled it.

    The drift is the mean squared log-ratio over the tokens of an optimizer step, on all processes. Where it exceeds the
    limit, the step is left out: no weight and no moment of the optimizer changes. As nothing moves, the passes that are
    left of the batch are left out, too. Logs `reuse/drift` and `reuse/skipped`, the share of steps left out.

    Args:
        limit (`float`):
            Largest drift with an update. Twice the KL divergence, to second order.
    """

    is_unique = True

    def __init__(self, limit: float):
        if not limit > 0:
            raise ValueError(f"reuse_drift_limit={limit} must be positive: try 0.1")
        self.limit = limit

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        message = (
            "reuse_drift_limit leaves out optimizer steps, and DeepSpeed takes them inside of the backward pass: leave "
            "reuse_drift_limit out"
        )
        return (Conflict("DeepSpeed", message),)

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer
        self.accelerator: Accelerator = trainer.accelerator
        self.moved: Tensor | None = None

    def watch(self, moved: Tensor) -> None:
        """Take in what [`squared_log_ratio`] gives for one micro-batch."""
        self.moved = moved if self.moved is None else self.moved + moved

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        moved = (
            torch.zeros(2, dtype=torch.float64, device=self.accelerator.device) if self.moved is None else self.moved
        )
        self.moved = None
        total, count = self.accelerator.reduce(moved, "sum").tolist()
        drift = total / max(count, 1.0)
        is_skipped = not drift <= self.limit
        self.trainer.log_metric("reuse/drift", drift)
        self.trainer.log_metric("reuse/skipped", float(is_skipped))
        if is_skipped:
            kwargs["optimizer"].zero_grad(set_to_none=True)
