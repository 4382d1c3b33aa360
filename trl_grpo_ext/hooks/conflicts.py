"""What cannot be combined, as data: each callback declares its conflicts, and `checks` looks for them."""

from collections.abc import Callable
from dataclasses import dataclass

from .ground import HookedTrainer

# What a run may have besides callbacks: name -> whether this trainer has it.
FACTS: dict[str, Callable[[HookedTrainer], bool]] = {
    "vision-language models": lambda trainer: trainer.is_vlm,
    "tools": lambda trainer: bool(trainer.tools),
    "rollout_func": lambda trainer: trainer.rollout_func is not None and not _is_ours(trainer),
    "normalize_then_sum": lambda trainer: trainer.multi_objective_aggregation == "normalize_then_sum",
    "DeepSpeed": lambda trainer: trainer.is_deepspeed_enabled,
    "DeepSpeed ZeRO-3": lambda trainer: trainer.is_deepspeed_enabled and trainer.args.hf_deepspeed_config.is_zero3(),
}


def _is_ours(trainer: HookedTrainer) -> bool:
    """Whether the `rollout_func` of the trainer stands for a callback that generates."""
    return getattr(trainer.rollout_func, "__self__", None) is trainer.rollout


@dataclass(frozen=True)
class Conflict:
    """
    Something that a callback cannot be combined with.

    Args:
        other (`str`):
            What it is: a key of [`FACTS`], the name of a hook that another callback overrides, or the name of another
            callback's class.
        message (`str`):
            The error: value, rule and remedy. `{other}` stands for the name of the other callback.

    Example:

    ```python
    >>> Conflict("on_plan", "Mine and {other} both lay out the rows: pass one of them").message.format(other="Theirs")
    'Mine and Theirs both lay out the rows: pass one of them'

    ```
    """

    other: str
    message: str
