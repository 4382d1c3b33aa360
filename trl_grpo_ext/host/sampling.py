"""Other sampling for a while: greedy or at another temperature, with random numbers that training does not notice."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import set_seed


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """
    Draw from `seed` on while open. Afterwards, the generators of Python, NumPy and torch stand where they stood.

    Example:

    ```python
    >>> before = random.getstate()
    >>> with own_random_numbers(3):
    ...     _ = random.random()
    >>> random.getstate() == before
    True

    ```
    """
    python, numpy = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = "cuda" if device is None else device.type
    count = 0 if device is None else torch.accelerator.device_count()
    with torch.random.fork_rng(devices=range(count), device_type=kind):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def temperature_set(trainer: Any, temperature: float | None) -> Iterator[None]:
    """
    Let a trainer of TRL generate at another temperature while open.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer.
        temperature (`float`, *optional*):
            0 is greedy. `None` leaves the temperature of the training.
    """
    if temperature is None:
        yield
        return
    owner, name = (trainer.vllm_generation, "temperature") if trainer.use_vllm else (trainer, "generation_config")
    before = getattr(owner, name)
    if trainer.use_vllm:  # to which 0 is greedy, whatever the other options of sampling
        changed: Any = temperature
    else:
        changed = copy.deepcopy(before)
        changed.do_sample = temperature > 0
        changed.temperature = temperature if temperature > 0 else None
        if temperature == 0:
            changed.top_k = changed.top_p = changed.min_p = None
    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def evaluating(trainer: Any, temperature: float | None, seed: int) -> Iterator[None]:
    """While open, the model is in evaluation and answers at this temperature. No random number of the training goes."""
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with own_random_numbers(seed), temperature_set(trainer, temperature):
            yield
    finally:
        trainer.model.train(was_training)
