"""What fails on one process stops all of them, with its message, instead of leaving the others to wait for it.

A process that fails takes part in the collective that the others come to next, and says there what happened.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor


class OtherProcessError(RuntimeError):
    """Another process failed; the message says which, and how."""


@dataclass(frozen=True)
class Failure:
    """
    What a failing process gathers.

    Args:
        process (`int`):
            Its rank.
        message (`str`):
            Type and text of its error.
    """

    process: int
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        return cls(PartialState().process_index, f"{type(error).__name__}: {error}")


def gather_values(value: Any) -> list[Any]:
    """
    The value of each process, in rank order. Every process must call this.

    Raises:
        [`OtherProcessError`]: where a process came to [`fail`] instead.

    Example:

    ```python
    >>> gather_values(3)
    [3]
    >>> gather_values(Failure(1, "ValueError: no"))
    Traceback (most recent call last):
        ...
    trl_grpo_ext.host.processes.OtherProcessError: Process 1 failed with ValueError: no

    ```
    """
    values: list[Any] = gather_object([value])
    failed = next((value for value in values if isinstance(value, Failure)), None)
    if failed is not None:
        raise OtherProcessError(f"Process {failed.process} failed with {failed.message}")
    return values


def fail(error: Exception) -> NoReturn:
    """Raise `error` here, and [`OtherProcessError`] on the processes that wait in [`gather_values`]: once, at most."""
    if not isinstance(error, OtherProcessError) and not getattr(error, "is_known_to_all", False):
        error.is_known_to_all = True  # type: ignore[attr-defined]
        gather_object([Failure.of(error)])
    raise error


def gather_rewards(accelerator: Accelerator, calculate: Callable[[], Tensor], nothing: Tensor) -> Tensor:
    """
    `calculate()`, which ends in a gather; where it raises on one process, all processes raise.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        calculate (`Callable`):
            TRL's calculation of rewards.
        nothing (`torch.Tensor`):
            What a process that failed gathers in place of its rewards: of their shape, type and device.

    Raises:
        `Exception`: that of `calculate`, on the process where it failed.
        [`OtherProcessError`]: on the others.
    """
    if accelerator.num_processes == 1:
        return calculate()
    failure: Exception | None = None
    try:
        rewards = calculate()
    except Exception as error:
        failure = error
        gather(nothing)
    if failure is not None:
        fail(failure)
    gather_values(None)
    return rewards


def leave() -> None:
    """
    End the group of processes, as the last thing that a script does. Every process must call this.

    A thread of gloo lets go of the last tensors that it gathered under Python's lock. A process that goes on to its end
    at once holds that lock, waits there for the thread, and stands still for ever or aborts (seen with torch 2.13). So
    the threads get a moment.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        time.sleep(1)
    state.destroy_process_group()
