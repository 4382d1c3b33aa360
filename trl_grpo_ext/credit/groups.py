"""From rewards to advantages: each completion against its group, as reductions over group ids.

Results are computed in float64 and returned in the dtype that came in.
"""

import torch
from torch import Tensor

from ..hooks.segments import flat_groups, group_mean_std, total_rewards

EPS = 1e-4  # what TRL adds to a standard deviation before dividing by it


def group_advantages(rewards: Tensor, group_ids: Tensor, num_groups: int, scale_rewards: str = "group") -> Tensor:
    """
    Advantage of each completion: its reward minus the mean of its group, scaled.

    Equal to what TRL computes when all groups have one size. A row without a reward, a group of one and a flat group
    get exactly 0.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Total reward of each row, NaN where none applies.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row.
        num_groups (`int`):
            Number of groups `P`.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What to divide by: the group's standard deviation (`"group"`, arXiv 2402.03300), that of all rows
            (`"batch"`, arXiv 2508.08221), or nothing (`"none"`, Dr. GRPO, arXiv 2503.20783).

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Advantages, in the dtype of `rewards`.

    Example:

    ```python
    >>> import torch
    >>> rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 4.0])
    >>> group_advantages(rewards, torch.tensor([0, 0, 1, 1, 2]), num_groups=3, scale_rewards="none").tolist()
    [-0.5, 0.5, 0.0, 0.0, 0.0]

    ```
    """
    rewards = rewards.masked_fill(rewards.isinf(), torch.nan)
    mean, std, _ = group_mean_std(rewards, group_ids, num_groups)
    advantages = rewards.double() - mean[group_ids]
    if scale_rewards == "group":
        advantages = advantages / (std[group_ids] + EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (_std_of_all(rewards) + EPS)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown: use 'group', 'batch' or 'none'")
    advantages[flat_groups(rewards, group_ids, num_groups)[group_ids]] = 0.0
    return torch.nan_to_num(advantages, nan=0.0).to(rewards.dtype)


def normalize_then_sum(
    rewards_per_func: Tensor, reward_weights: Tensor, group_ids: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """
    GDPO's aggregation (arXiv 2601.05242): normalise each reward within its group, sum, normalise over the batch.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            Reward of each function, NaN where it does not apply.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Weights.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row.
        num_groups (`int`):
            Number of groups `P`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            Total reward and advantage of each row, each of shape `(N,)`.

    Example:

    ```python
    >>> import torch
    >>> rewards = torch.tensor([[0.0], [1.0]])
    >>> _, advantages = normalize_then_sum(rewards, torch.ones(1), torch.tensor([0, 0]), num_groups=1)
    >>> [round(a, 3) for a in advantages.tolist()]
    [-0.707, 0.707]

    ```
    """
    rewards_per_func = rewards_per_func.masked_fill(rewards_per_func.isinf(), torch.nan)
    mean, std, _ = group_mean_std(rewards_per_func, group_ids, num_groups)
    normalized = (rewards_per_func.double() - mean[group_ids]) / (std[group_ids] + EPS)
    rewards = total_rewards(normalized, reward_weights.double())
    advantages = (rewards - rewards.nanmean()) / (_std_of_all(rewards) + EPS)
    dtype = rewards_per_func.dtype
    return rewards.to(dtype), torch.nan_to_num(advantages, nan=0.0).to(dtype)


def _std_of_all(rewards: Tensor) -> Tensor:
    return group_mean_std(rewards, torch.zeros_like(rewards, dtype=torch.long), 1)[1]
