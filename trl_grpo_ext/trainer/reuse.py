"""Several passes over a batch, as long as the policy stays near the one that sampled it."""

from collections import deque
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch


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
    limit, the step is left out: no weight and no moment of the optimizer changes. Once a whole pass was left out,
    nothing can move any more: the trainer computes no further pass over this batch, and its logs repeat those of the
    last one. Logs `reuse/drift` and `reuse/skipped`, the share of steps left out.

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
        args, scaler = trainer.args, trainer.accelerator.scaler
        updates, rest = divmod(args.steps_per_generation, args.gradient_accumulation_steps)
        # The scaler of fp16 fails where there is no gradient; and an update that spans two batches is of neither.
        self._updates = updates if rest == 0 and scaler is None else None  # of a pass
        self._left = self._unmoved = 0  # updates left on the batch; the last ones of them that changed nothing
        self._drifts: deque[float] = deque(maxlen=updates or 1)
        self._last_pass: deque[tuple[Tensor, dict[str, list[float]]]] = deque(maxlen=args.steps_per_generation)

    @property
    def is_over(self) -> bool:
        """Whether no pass over this batch can change anything any more. The same on all processes."""
        return self._left > 0 and self._unmoved == self._updates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._left = self._unmoved = 0  # a run before this one may have ended, or failed, within a batch
        self.moved = None

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self._left = (self._updates or 0) * self.trainer.args.num_iterations
        self._unmoved = 0

    def remember(self, loss: Tensor, metrics: dict[str, list[float]]) -> None:
        """Keep what a micro-batch of this pass gave: its loss, and the values that it added to each metric."""
        self._last_pass.append((loss, metrics))

    def recall(self) -> tuple[Tensor, dict[str, list[float]]]:
        """What the micro-batch whose turn it is gave in the last pass."""
        self._last_pass.rotate(-1)
        return self._last_pass[-1]

    def watch(self, moved: Tensor) -> None:
        """Take in what [`squared_log_ratio`] gives for one micro-batch."""
        self.moved = moved if self.moved is None else self.moved + moved

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_over:
            self._drifts.rotate(-1)  # those of the last pass hold
        else:
            moved = self.moved if self.moved is not None else torch.zeros(2, dtype=torch.float64)
            self.moved = None
            total, count = self.accelerator.reduce(moved.to(self.accelerator.device), "sum").tolist()
            self._drifts.append(total / max(count, 1.0))
            self._unmoved = 0 if self._drifts[-1] <= self.limit else self._unmoved + 1
        self._left -= 1
        is_skipped = self._unmoved > 0
        self.trainer.log_metric("reuse/drift", self._drifts[-1])
        self.trainer.log_metric("reuse/skipped", float(is_skipped))
        if is_skipped:
            kwargs["optimizer"].zero_grad(set_to_none=True)
