"""Other sampling for a while: greedy or at another temperature, with random numbers that training does not notice."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import set_seed


def keep_random_numbers() -> Callable[[], None]:
    """
    Note where the generators of Python, NumPy and torch stand, on all devices. What is returned puts them back there.

    Example:

    ```python
    >>> put_back = keep_random_numbers()
    >>> drawn = random.random()
    >>> put_back()
    >>> random.random() == drawn
    True

    ```
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices: list[tuple[int, torch.Tensor]] = []
    if torch.accelerator.is_available():
        module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
        devices = [(index, module.get_rng_state(index)) for index in range(torch.accelerator.device_count())]

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for index, state in devices:
            module.set_rng_state(state, index)

    return put_back


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
    put_back = keep_random_numbers()
    try:
        set_seed(seed)
        yield
    finally:
        put_back()


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
