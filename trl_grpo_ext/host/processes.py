"""An error on one process stops all processes, with its message. Without this, the others would wait for ever.

A process that fails still takes part in the collective to which the others come next, and says there what happened.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
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
    What a failing process tells the others.

    Args:
        process (`int`):
            Rank of the process that fails.
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
    """
    Raise `error` here, and [`OtherProcessError`] on the processes that wait in [`gather_values`].

    An error that all processes know already is only raised.
    """
    if not isinstance(error, OtherProcessError) and not getattr(error, "is_known_to_all", False):
        error.is_known_to_all = True  # type: ignore[attr-defined]
        gather_object([Failure.of(error)])
    raise error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """
    Where this block raises on one process, it raises on all of them, once all have come to its end.

    Every process must enter the block. What may fail must come after the last collective in it, or wait for that one.

    Raises:
        `Exception`: the error of the block, on each process where it failed.
        [`OtherProcessError`]: on the others, with the message of the first that failed.

    Example:

    ```python
    >>> with together():
    ...     pass
    >>> with together():
    ...     raise OSError("disk full")
    Traceback (most recent call last):
        ...
    OSError: disk full

    ```
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if error is not None:
        fail(error)
    gather_values(None)


def gather_rewards(accelerator: Accelerator, calculate: Callable[[], Tensor], nothing: Tensor) -> Tensor:
    """
    Call `calculate`, which ends in a gather. Where `calculate` raises on one process, all processes raise.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
        calculate (`Callable`):
            TRL's calculation of rewards.
        nothing (`torch.Tensor`):
            Stands in for the rewards of a process that failed: a tensor of the same shape, type and device.

    Raises:
        `Exception`: the error of `calculate`, on the process where it failed.
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
    End the group of processes. Every process must call this, as the last thing in a script.

    The threads of gloo need Python's lock to free the tensors that they gathered last. A process that ends at once
    holds this lock while it waits for them, and hangs or aborts (seen with torch 2.13). So the threads get a second.
    vLLM in the process has groups of its own, which end before the one that they are part of.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        time.sleep(1)
    if (vllm := sys.modules.get("vllm.distributed.parallel_state")) is not None:
        vllm.destroy_model_parallel()
        vllm.destroy_distributed_environment()
    state.destroy_process_group()
