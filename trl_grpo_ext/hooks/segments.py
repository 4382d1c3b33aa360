"""Reductions over groups: pure functions of tensors and group ids.

Groups may have any sizes and need not be contiguous. NaN means "this reward does not apply", and an infinite value
counts like NaN, because it has no mean. Sums run in float64, so results do not depend on the order of the rows.
"""

import torch
from torch import Tensor


def group_mean_std(values: Tensor, group_ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Mean, standard deviation and number of the finite values of each group.

    Args:
        values (`torch.Tensor` of shape `(N,)` or `(N, K)`):
            Values, NaN where a value is missing.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row, integers in `[0, num_groups)`.
        num_groups (`int`):
            Number of groups `P`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            Mean (NaN for a group without values), standard deviation with Bessel's correction (0 for a group with
            fewer than two values) and count, each of shape `(P,)` or `(P, K)`, in float64.

    Example:

    ```python
    >>> import torch
    >>> mean, std, count = group_mean_std(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), num_groups=2)
    >>> mean.tolist(), count.tolist()
    ([2.0, 5.0], [2.0, 1.0])
    >>> [round(x, 3) for x in std.tolist()]
    [1.414, 0.0]

    ```
    """
    valid = values.isfinite()
    zeros = torch.zeros(num_groups, *values.shape[1:], dtype=torch.float64, device=values.device)
    filled = torch.where(valid, values.double(), 0.0)
    count = zeros.index_add(0, group_ids, valid.double())
    mean = zeros.index_add(0, group_ids, filled) / count
    deviation = torch.where(valid, filled - mean[group_ids], 0.0)
    variance = zeros.index_add(0, group_ids, deviation**2) / (count - 1).clamp(min=1)
    return mean, variance.sqrt(), count


def flat_groups(rewards: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """
    Which groups teach nothing: all their rewards are equal, or none applies.

    The comparison is exact (maximum against minimum), so rounding in a mean cannot make a flat group look alive.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Total reward of each row, NaN where none applies.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row.
        num_groups (`int`):
            Number of groups `P`.

    Returns:
        `torch.Tensor` of shape `(P,)`:
            `True` for a flat group.

    Example:

    ```python
    >>> import torch
    >>> flat_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]), num_groups=2).tolist()
    [True, False]

    ```
    """
    missing = ~rewards.isfinite()
    low = torch.full((num_groups,), torch.inf, dtype=rewards.dtype, device=rewards.device)
    high = low.neg().scatter_reduce(0, group_ids, rewards.masked_fill(missing, -torch.inf), "amax")
    low = low.scatter_reduce(0, group_ids, rewards.masked_fill(missing, torch.inf), "amin")
    return ~(high > low)


def total_rewards(rewards_per_func: Tensor, reward_weights: Tensor) -> Tensor:
    """
    Weighted sum over the reward functions; NaN only where every one of them is NaN.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            Reward of each function, NaN where it does not apply.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Weights.

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Total reward.

    Example:

    ```python
    >>> import torch
    >>> nan = float("nan")
    >>> total_rewards(torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]]), torch.tensor([1.0, 0.5])).tolist()
    [2.0, 1.0, nan]

    ```
    """
    total = (rewards_per_func * reward_weights).nansum(dim=1)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
