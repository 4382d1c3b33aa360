"""What the tests of this room share: a training that stops after its checkpoint, and weights that are compared."""

import torch
from transformers import TrainerCallback


class Interrupt(TrainerCallback):
    """Stops as a kill after the checkpoint would: the learning rate schedule still expects all steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(one, two) -> bool:
    """Whether two trainers, or two lists of weights, hold the same weights."""
    one, two = (x if isinstance(x, list) else weights(x) for x in (one, two))
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
