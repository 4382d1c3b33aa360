"""What a few answers to each prompt say about groups of any size, and about the budget. Pure functions of numbers."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Value = float | None  # None: no reward applies
NUM_RESAMPLES = 400


@dataclass(frozen=True)
class Share:
    """
    Expected share of groups whose rewards differ.

    Args:
        size (`int`):
            Size of the groups.
        share (`float`), low (`float`), high (`float`):
            Estimate, and a 95 % interval over the prompts.
        how (`str`):
            `"unbiased"`; `"fitted"`, by a beta distribution of the pass rates; or `"at least"`, the share of the
            largest groups that were sampled, which larger ones exceed.
    """

    size: int
    share: float
    low: float
    high: float
    how: str


def flat_probability(values: Sequence[Value], size: int) -> float:
    """
    Probability that `size` answers to a prompt teach nothing, because their rewards are equal or none applies.

    Unbiased where the answers are independent: the mean over all subsets of that size.

    Args:
        values (`Sequence[float | None]`):
            Rewards of the answers to one prompt.
        size (`int`):
            At most as many as there are.

    Example:

    ```python
    >>> flat_probability([1.0, 0.0, 0.0, 0.0], size=2)
    0.5
    >>> flat_probability([1.0, None], size=2)
    1.0

    ```
    """
    if not 1 <= size <= len(values):
        raise ValueError(f"size={size} is not between 1 and the {len(values)} answers: pass fewer, or sample more")
    counts = Counter(value for value in values if value is not None)
    missing = len(values) - counts.total()
    if not counts:
        return 1.0
    subsets = sum(math.comb(count + missing, size) for count in counts.values())
    # The subsets without any reward were counted with each value.
    subsets -= (len(counts) - 1) * math.comb(missing, size)
    return subsets / math.comb(len(values), size)


def informative_share(groups: Sequence[Sequence[Value]], size: int) -> tuple[float, str]:
    """
    Expected share of informative groups of a size, and how it was found (see [`Share`]).

    Args:
        groups (`Sequence[Sequence[float | None]]`):
            Rewards of the answers to each prompt.
        size (`int`):
            Size of the groups, which may be larger than those that were sampled.

    Example:

    ```python
    >>> informative_share([[1.0, 0.0], [0.0, 0.0]], size=2)
    (0.5, 'unbiased')
    >>> informative_share([[1.0, 0.0], [0.0, 1.0]], size=4)  # each passes with probability 1/2
    (0.875, 'fitted')

    ```
    """
    sampled = min(map(len, groups))
    if size <= sampled:
        return 1 - sum(flat_probability(values, size) for values in groups) / len(groups), "unbiased"
    kinds = {value for values in groups for value in values}
    if len(kinds) <= 2 and None not in kinds and sampled >= 2:
        high = max(kinds, key=lambda value: value or 0.0)
        passed = [(sum(value == high for value in values), len(values)) for values in groups]
        return informative_share_of_beta(passed, size), "fitted"
    # A group that differs still does when answers are added to it.
    return informative_share(groups, sampled)[0], "at least"


def informative_share_of_beta(passed: Sequence[tuple[int, int]], size: int) -> float:
    """
    Expected share of groups with both a pass and a failure, for pass rates with a beta distribution.

    The distribution has the mean and the variance of the pass rates, both estimated without bias.

    Args:
        passed (`Sequence[tuple[int, int]]`):
            Passes and answers of each prompt, two answers at least.
        size (`int`):
            Size of the groups.
    """
    mean = sum(count / total for count, total in passed) / len(passed)
    square = sum(count * (count - 1) / (total * (total - 1)) for count, total in passed) / len(passed)
    variance = square - mean**2
    if variance <= 1e-12:  # all prompts alike
        return 1 - mean**size - (1 - mean) ** size
    spread = mean * (1 - mean) / variance - 1
    if spread <= 1e-12:  # each prompt always passes or always fails
        return 0.0
    a, b = mean * spread, (1 - mean) * spread
    passes = math.prod((a + i) / (spread + i) for i in range(size))
    fails = math.prod((b + i) / (spread + i) for i in range(size))
    return max(0.0, 1 - passes - fails)


def informative_shares(groups: Sequence[Sequence[Value]], sizes: Sequence[int]) -> list[Share]:
    """[`informative_share`] for several sizes, each with an interval: prompts drawn again with replacement."""
    draw = random.Random(0)
    resamples = [draw.choices(range(len(groups)), k=len(groups)) for _ in range(NUM_RESAMPLES)]
    shares = []
    for size in sizes:
        share, how = informative_share(groups, size)
        again = sorted(informative_share([groups[i] for i in chosen], size)[0] for chosen in resamples)
        low, high = again[int(0.025 * len(again))], again[int(0.975 * len(again))]
        shares.append(Share(size, share, min(low, share), max(high, share), how))
    return shares


def ended_share(lengths: Sequence[int], ended: Sequence[bool], budget: int) -> float:
    """
    Share of answers that end within a budget (Kaplan and Meier: an answer that was cut ends later than that).

    Args:
        lengths (`Sequence[int]`):
            Tokens of each answer, whatever budget it had.
        ended (`Sequence[bool]`):
            Whether it ended by itself.
        budget (`int`):
            Tokens.

    Example:

    ```python
    >>> ended_share([2, 4, 4, 8], [True, False, False, True], budget=4), ended_share([2, 8], [True, True], budget=4)
    (0.25, 0.5)

    ```
    """
    running = 1.0
    for length in sorted({length for length, ends in zip(lengths, ended, strict=True) if ends and length <= budget}):
        at_risk = sum(other >= length for other in lengths)
        ending = sum(ends and other == length for other, ends in zip(lengths, ended, strict=True))
        running *= 1 - ending / at_risk
    return 1 - running


def enough_budget(lengths: Sequence[int], ended: Sequence[bool], share: float = 0.95) -> int | None:
    """
    Smallest budget within which that share of the answers ends; `None` where no budget that was tried is enough.

    Example:

    ```python
    >>> enough_budget([3, 5, 9, 20], [True] * 4, share=0.75), enough_budget([3, 20], [True, False])
    (9, None)

    ```
    """
    tried = sorted({length for length, ends in zip(lengths, ended, strict=True) if ends})
    return next((length for length in tried if ended_share(lengths, ended, length) >= share - 1e-9), None)


@dataclass(frozen=True)
class Component:
    """
    What a part of the reward pays over all answers.

    Args:
        name (`str`):
            Name in the logs.
        applies (`float`):
            Share of the answers for which it is not `None`.
        low (`float`), high (`float`), mean (`float`):
            Of those answers; NaN without any.
        spread (`float`):
            Mean standard deviation within a prompt.
        constant (`float`):
            Share of the prompts whose answers it pays alike.
    """

    name: str
    applies: float
    low: float
    high: float
    mean: float
    spread: float
    constant: float

    @property
    def is_constant(self) -> bool:
        """Whether it pays every answer the same, or none."""
        return not self.high > self.low


def component_of(name: str, groups: Sequence[Sequence[Value]]) -> Component:
    """
    Summary of what a part of the reward paid.

    Example:

    ```python
    >>> part = component_of("right", [[1.0, 0.0], [1.0, 1.0], [None, None]])
    >>> part.low, part.high, round(part.applies, 2), round(part.constant, 2), part.is_constant
    (0.0, 1.0, 0.67, 0.67, False)

    ```
    """
    present = [[value for value in values if value is not None] for values in groups]
    flat = [value for values in present for value in values]
    count = sum(map(len, groups))
    nan = math.nan
    return Component(
        name,
        applies=len(flat) / count if count else 0.0,
        low=min(flat, default=nan),
        high=max(flat, default=nan),
        mean=sum(flat) / len(flat) if flat else nan,
        spread=sum(map(deviation, present)) / len(present) if present else 0.0,
        constant=sum(len(set(values)) <= 1 for values in present) / len(present) if present else 1.0,
    )


def deviation(values: Sequence[float]) -> float:
    """Standard deviation with Bessel's correction; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def histogram(values: Sequence[float], low: float, high: float, bins: int = 10) -> list[int]:
    """
    How many values lie in each of the bins between `low` and `high`, which belongs to the last one.

    Example:

    ```python
    >>> histogram([0.0, 0.1, 1.0], low=0.0, high=1.0, bins=4)
    [2, 0, 0, 1]

    ```
    """
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(max(place, 0), bins - 1)] += 1
    return counts
