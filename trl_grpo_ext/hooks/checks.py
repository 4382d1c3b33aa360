"""What holds of callbacks together, and of what their hooks return: each check raises with value, rule and remedy."""

from collections.abc import Sequence

from torch import Tensor

from .callback import GRPOCallback
from .conflicts import FACTS
from .ground import HookedTrainer
from .records import RolloutBatch


def check_conflicts(callbacks: Sequence[GRPOCallback], trainer: HookedTrainer) -> None:
    """
    Raise `ValueError` for the first conflict that holds, with its remedy.

    Args:
        callbacks (`Sequence[GRPOCallback]`):
            All callbacks of the trainer, in their order.
        trainer ([`HookedTrainer`]):
            Trainer.
    """
    for position, callback in enumerate(callbacks):
        name = type(callback).__name__
        twin = next((other for other in callbacks[:position] if type(other) is type(callback)), None)
        if twin is not None and (callback.is_unique or twin is callback):
            raise ValueError(
                f"There are two callbacks of the class {name}, and each would act on what the other did: leave the "
                "option unset that adds one, or pass none"
            )
    for callback in callbacks:
        others = [other for other in callbacks if other is not callback]
        for conflict in callback.conflicts:
            found = _found(conflict.other, others, trainer)
            if found is not None:
                raise ValueError(conflict.message.format(other=found))


def _found(wanted: str, others: Sequence[GRPOCallback], trainer: HookedTrainer) -> str | None:
    """Name of what is in conflict; `None` where the trainer has no such thing."""
    if wanted in FACTS:
        return wanted if FACTS[wanted](trainer) else None
    for other in others:
        is_hook = wanted.startswith("on_") and other.overrides(wanted)
        if is_hook or wanted in {base.__name__ for base in type(other).__mro__}:
            return type(other).__name__
    return None


def check_shape(callback: GRPOCallback, hook: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise `ValueError` when a hook returns a tensor of none of the shapes that can replace what was there."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in {tuple(shape) for shape in shapes}:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{type(callback).__name__}.{hook} returned {got}: return a tensor of shape {wanted}, or None")


def check_finite(batch: RolloutBatch) -> None:
    """Raise `ValueError`, on every rank, where an infinite reward would make every weight NaN."""
    if batch.rewards.isinf().any():
        counts = batch.rewards_per_func.isinf().sum(0).tolist()
        of = ", ".join(
            f"{name!r} in {count} rows" for name, count in zip(batch.reward_names, counts, strict=True) if count
        )
        raise ValueError(
            f"Rewards of step {batch.step} are infinite ({of or 'the total'}): return None where a reward does not "
            'apply, set reward_clip_range, or leave such rows out with as_reward(func).on_error("skip")'
        )


def check_advantages(callback: GRPOCallback, batch: RolloutBatch) -> None:
    """Raise `ValueError`, on every rank, where a callback made an advantage that would make every weight NaN."""
    bad = (~batch.token_advantages.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"{type(callback).__name__}.on_advantages made the advantages of {int(bad.sum())} of {len(bad)} "
            "completions NaN or infinite: return 0 where a completion has no reward (batch.rewards is NaN there), such "
            "as with nan_to_num()"
        )
