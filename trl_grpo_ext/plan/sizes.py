"""Group sizes that add up: integers within bounds, as close to the wishes as a fixed number of rows allows."""

import torch
from torch import Tensor


def num_groups_that_fit(wishes: Tensor, num_rows: int, min_size: int, max_size: int) -> int:
    """
    How many of the candidate groups to use, so that their wished sizes come as close to `num_rows` as the bounds allow.

    Args:
        wishes (`torch.Tensor` of shape `(C,)`):
            Wished size of each candidate, in the order of their draw.
        num_rows (`int`):
            Number of rows to fill.
        min_size (`int`):
            Smallest group.
        max_size (`int`):
            Largest group.

    Returns:
        `int`:
            Number of leading candidates to use.

    Example:

    ```python
    >>> import torch
    >>> num_groups_that_fit(torch.tensor([4.0, 4.0, 4.0, 4.0]), num_rows=12, min_size=2, max_size=8)
    3

    ```
    """
    filled = wishes.double().clamp(min_size, max_size).cumsum(0)
    wanted = int(torch.searchsorted(filled, num_rows - 1e-6)) + 1
    fewest, most = -(-num_rows // max_size), num_rows // min_size
    if wishes.numel() < fewest:
        raise ValueError(
            f"{wishes.numel()} candidate prompts with at most {max_size} completions each cannot fill {num_rows} rows: "
            "return sizes for more candidates from `on_group_sizes`"
        )
    return min(max(wanted, fewest), most, wishes.numel())


def fit_group_sizes(wishes: Tensor, num_rows: int, min_size: int, max_size: int) -> Tensor:
    """
    Integer group sizes, proportional to the wishes within bounds, that add up to exactly `num_rows`.

    One factor `c` is found by bisection such that `clip(c * wishes, min_size, max_size)` adds up, then sizes are
    rounded by largest remainder (ties: first come). Where all wishes are zero, groups share equally.

    Args:
        wishes (`torch.Tensor` of shape `(P,)`):
            Non-negative wishes, in any unit.
        num_rows (`int`):
            Number of rows to fill, with `P * min_size <= num_rows <= P * max_size`.
        min_size (`int`):
            Smallest group.
        max_size (`int`):
            Largest group.

    Returns:
        `torch.Tensor` of shape `(P,)`:
            Sizes, int64.

    Example:

    ```python
    >>> import torch
    >>> fit_group_sizes(torch.tensor([1.0, 1.0, 6.0]), num_rows=16, min_size=2, max_size=12).tolist()
    [2, 2, 12]

    ```
    """
    num_groups = wishes.numel()
    if not num_groups * min_size <= num_rows <= num_groups * max_size:
        raise ValueError(
            f"{num_groups} groups of {min_size} to {max_size} completions cannot add up to {num_rows} rows: change the "
            "bounds or the number of groups"
        )
    wishes = torch.nan_to_num(wishes.double(), nan=0.0, posinf=1e30).clamp(min=0)
    # A group without a wish still has to take what the others cannot hold.
    wishes = wishes / wishes.max() + 1e-9 if wishes.max() > 0 else torch.ones_like(wishes)
    low, high = 0.0, max_size / wishes.min().item()
    for _ in range(100):
        middle = (low + high) / 2
        if (middle * wishes).clamp(min_size, max_size).sum() < num_rows:
            low = middle
        else:
            high = middle
    exact = (high * wishes).clamp(min_size, max_size)
    sizes = (exact + 1e-6).floor().long()
    missing = num_rows - int(sizes.sum())
    room = exact - sizes
    sizes[room.argsort(descending=True, stable=True)[:missing]] += 1
    return sizes
