"""What properties of several rooms are about: rewards in ragged groups, and plain loops to hold results against."""

import math

import torch
from hypothesis import strategies as st

NAN = math.nan
# Repeated round values make flat groups, whose exact zeros are the hard part.
rewards_of_one = st.one_of(st.sampled_from([0.0, 0.1, 1.0, NAN]), st.floats(-100, 100, width=32))


@st.composite
def ragged(draw, values=rewards_of_one):
    """Rewards `(N,)` in float64, group ids `(N,)` in no order, number of groups; sizes from 1 to 6."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    ids = draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    rewards = draw(st.lists(values, min_size=len(ids), max_size=len(ids)))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), len(sizes)


def loop_mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and Bessel-corrected standard deviation of what is not NaN."""
    values = [value for value in values if not math.isnan(value)]
    mean = sum(values) / len(values) if values else NAN
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=atol, equal_nan=True)
