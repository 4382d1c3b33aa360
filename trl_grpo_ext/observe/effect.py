"""Whether updates change weights. A run with a frozen adapter looks like any other, up to its end."""

import torch
from torch import Tensor, nn

from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch

PIECE = 2**24  # elements that are added up at a time, which bounds what the sum takes on top of the weights
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size


def check_trainable(model: nn.Module) -> None:
    """Raise `ValueError` for a model of which no parameter can be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True, so training would leave it as it is: "
            "load an adapter with PeftModel.from_pretrained(..., is_trainable=True), pass peft_config, or set "
            "requires_grad of what is to be trained"
        )


def fingerprint(parameter: Tensor) -> int:
    """
    A number that changes when the parameter does: the sum of its bits, read as integers. Exact in any precision.

    Of a parameter that is spread over processes, it is that of this process's part.

    Example:

    ```python
    >>> one = torch.ones(3)
    >>> fingerprint(one) == fingerprint(torch.ones(3)), fingerprint(one) == fingerprint(one + 1e-6)
    (True, False)

    ```
    """
    part = own_part(parameter).reshape(-1)
    if part.is_meta or part.numel() == 0:
        return 0
    pieces = part.view(WHOLE[part.element_size()]).split(PIECE)
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that may be spread over processes."""
    part = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed
    part = getattr(part, "_local_tensor", part)  # FSDP
    return part.detach()


def has_finite_weights(model: nn.Module) -> bool:
    """Whether all that this process trains is finite."""
    parts = (own_part(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return all(bool(part.isfinite().all()) for part in parts if not part.is_meta)


class UpdateCheck:
    """
    Counts updates that should have changed a weight and changed none.

    An update should change something if its batch has a completion with an advantage and the learning rate is not 0.
    Looks at the weights until one has changed, which usually is after the first update, and never again.

    Args:
        trainer ([`HookedTrainer`]):
            Trainer, before its training begins.
    """

    def __init__(self, trainer: HookedTrainer):
        args = trainer.args
        self.trainer = trainer
        self.num_updates = 0  # without effect
        self.updates_per_batch = max(1.0, args.steps_per_generation / args.gradient_accumulation_steps)
        self._teaches = self._has_rate = False
        self._before: list[int] | None = [fingerprint(parameter) for parameter in self._trained()]

    @property
    def num_batches(self) -> float:
        """How many generation batches were trained on without effect."""
        return float(self.num_updates / self.updates_per_batch)

    def sample(self, batch: RolloutBatch) -> None:
        """Take note of what the coming updates are made of."""
        self._teaches = bool((batch.teaches & (batch.completion_lengths > 0)).any())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Take note of the learning rate of an update."""
        self._has_rate = any(group["lr"] > 0 for group in optimizer.param_groups)

    def end(self) -> None:
        """Look at the weights after an update. Every process calls this."""
        accelerator = self.trainer.accelerator
        is_due = self._teaches and self._has_rate and not accelerator.optimizer_step_was_skipped
        if self._before is None or not is_due:
            return
        changed = any(fingerprint(p) != before for p, before in zip(self._trained(), self._before, strict=True))
        if accelerator.num_processes > 1:
            counted = accelerator.reduce(torch.tensor(float(changed), device=accelerator.device), "sum")
            changed = bool(counted > 0)
        self.num_updates = 0 if changed else self.num_updates + 1
        if changed:
            self._before = None

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
