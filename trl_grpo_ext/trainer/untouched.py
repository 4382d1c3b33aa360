"""[`untouched`]: whatever a trainer is put through, it is as before afterwards."""

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..host.sampling import keep_random_numbers
from .adaptive import AdaptiveGRPOTrainer


def check_whole(trainer: AdaptiveGRPOTrainer) -> None:
    """Raise `ValueError` where weights are split over processes, which happens only when training begins."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{kind} splits the weights when training begins, and a trial comes before that: try the same "
            "configuration on one process, or on several without it"
        )


@contextmanager
def untouched(trainer: AdaptiveGRPOTrainer) -> Iterator[None]:
    """
    Whatever is sampled and trained while this is open, the trainer is as before at its end, and so are all generators.

    Weights, gradients, optimizer, metrics, logs and the states of the callbacks come back. What a reward function or
    the engine of vLLM keeps does not.
    """
    check_whole(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    tensors = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    weights = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    optimizer = trainer.optimizer
    optimizer_state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    # Callbacks first: their states are read before anything runs, and given back after their attributes are.
    states = [(callback, copy.deepcopy(callback.state_dict())) for callback in trainer.grpo_callbacks]
    owners = [trainer, trainer.state, trainer.control, trainer.rollout, trainer._shared_prefill]
    kept = [(owner, _kept(vars(owner))) for owner in [*owners, *trainer.grpo_callbacks]]
    put_generators_back = keep_random_numbers()
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpoints = trainer.args.gradient_checkpointing and not is_on
    if checkpoints:  # as the trainer does when it begins
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        if checkpoints:
            model.gradient_checkpointing_disable()
        with torch.no_grad():
            for tensor, value, gradient in weights:
                tensor.copy_(value)
                tensor.grad = gradient
        for module, mode in modes:
            module.training = mode
        for owner, attributes in kept:
            _put_back(vars(owner), attributes)
        for callback, state in states:
            if state:
                callback.load_state_dict(state)
        if optimizer is not None:
            optimizer.load_state_dict(optimizer_state)
        put_generators_back()


def _kept(value: Any) -> Any:
    """What is in a container, and in the dictionaries in it; a copy of a tensor. Nothing of anything else."""
    if type(value) in (dict, defaultdict):
        return {name: (item, _kept(item)) for name, item in value.items()}
    if type(value) in (list, deque, set):
        return copy.copy(value)
    return value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else None


def _put_back(value: Any, kept: Any) -> None:
    """Fill a container, in place, with what [`_kept`] found in it."""
    if type(value) in (dict, defaultdict):
        for item, inside in kept.values():
            if inside is not None:
                _put_back(item, inside)
        value.clear()
        value.update({name: item for name, (item, _) in kept.items()})
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(kept)
    else:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(kept)
