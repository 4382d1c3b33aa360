"""Whether a measure moved by more than its noise, prompt by prompt. Pure functions of numbers, without torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOISE = 2.0  # a difference counts when it is this many times its standard error
FEW_PROMPTS = 20  # with fewer, a standard error says little


@dataclass(frozen=True)
class Difference:
    """
    By how much a measure differs between two evaluations of the same prompts.

    Args:
        mean (`float`):
            Mean over the prompts of the later value minus the earlier one.
        error (`float`):
            Standard error of that mean.
        count (`int`):
            Prompts that have both values.
    """

    mean: float
    error: float
    count: int

    @property
    def is_known(self) -> bool:
        """Whether there are enough prompts for an interval."""
        return self.count >= FEW_PROMPTS

    @property
    def low(self) -> float | None:
        """Lower end of the interval, `None` for too few prompts."""
        return self.mean - NOISE * self.error if self.is_known else None

    @property
    def high(self) -> float | None:
        """Upper end of the interval, `None` for too few prompts."""
        return self.mean + NOISE * self.error if self.is_known else None

    @property
    def direction(self) -> str:
        """`"up"` or `"down"` beyond the noise, `"flat"` within it, `"few"` for too few prompts."""
        return direction_of(self.mean, self.error) if self.is_known else "few"


def direction_of(difference: float, error: float) -> str:
    """`"up"`, `"down"`, or `"flat"` for a difference within its noise."""
    if not abs(difference) > max(NOISE * error, 1e-12):  # NaN too, of differences beyond what a float can hold
        return "flat"
    return "up" if difference > 0 else "down"


def paired(before: Mapping[int, float], after: Mapping[int, float]) -> Difference:
    """
    Compare each prompt with itself: what differs between prompts is no noise of the difference.

    Args:
        before (`Mapping[int, float]`), after (`Mapping[int, float]`):
            Value of each prompt, by its position. Prompts that one of them lacks are left out.

    Example:

    ```python
    >>> paired({0: 1.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 7.0, 3: 4.0})
    Difference(mean=1.5, error=0.5, count=2)

    ```
    """
    gains = [after[prompt] - before[prompt] for prompt in before if prompt in after]
    count = len(gains)
    if count == 0:
        return Difference(math.nan, math.nan, 0)
    mean = sum(gains) / count
    # Products, because a power of a large float raises an error where a product is infinite.
    variance = sum((gain - mean) * (gain - mean) for gain in gains) / max(1, count - 1)
    return Difference(mean, math.sqrt(variance / count), count)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """
    Chance that at least one of `k` answers passes, estimated without bias from more of them (arXiv 2107.03374).

    Args:
        num_samples (`int`):
            Answers that were sampled, at least `k`.
        num_passed (`int`):
            Those of them that pass.
        k (`int`):
            Answers that somebody would sample.

    Example: of four answers one passes. Of the six pairs, three hold it.

    ```python
    >>> pass_at_k(4, 1, 2)
    0.5

    ```
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must be between 1 and the {num_samples} answers of a prompt: sample more, or lower k")
    num_failed = num_samples - num_passed
    if num_failed < k:
        return 1.0
    return 1.0 - math.prod((num_failed - i) / (num_samples - i) for i in range(k))


def num_since_best(values: Sequence[float]) -> int:
    """
    How many values in a row, up to the last, did not exceed the largest before them.

    Example:

    ```python
    >>> num_since_best([0.1, 0.3, 0.2, 0.3]), num_since_best([0.1, 0.3]), num_since_best([])
    (2, 0, 0)

    ```
    """
    return len(values) - 1 - values.index(max(values)) if values else 0
