"""Group statistics and advantages as segment reductions over group ids.

Axis suffixes: `N` rows (completions), `P` groups (prompts), `K` reward functions. Groups may have any sizes and need
not be contiguous. NaN means "this reward does not apply", and so does what is infinite, which has no mean. Everything
is computed in float64 and returned in the dtype that came in, so that results do not depend on the order of the rows.
"""

import torch
from torch import Tensor

EPS = 1e-4  # what TRL adds to a standard deviation before dividing by it


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


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation (arXiv 1506.02438, equation 16), and what the values should have been.

    `A_t = δ_t + γλ A_{t+1}` with `δ_t = r_t + γ V_{t+1} - V_t`. Nothing follows the last token of a row: behind it,
    value and advantage are 0. With `lam=1` the advantage is the discounted return minus the value, whatever the value
    says of later tokens; with `lam=0` it is `δ_t` alone.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`):
            Reward of each token.
        values (`torch.Tensor` of shape `(N, T)`):
            Estimated return from each token on, seen before the token is written.
        lengths (`torch.Tensor` of shape `(N,)`):
            Tokens of each row; what lies beyond is not read.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of a token.
        lam (`float`, *optional*, defaults to `0.95`):
            How far to look past the next value: smaller trusts the values more.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            Advantages and returns `A + V`, each `(N, T)`, 0 beyond the lengths, in the dtype of `values`.

    Example:

    ```python
    >>> import torch
    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    >>> advantages, returns = gae(rewards, values, torch.tensor([2]), lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[0.5, 0.75]], [[1.0, 1.0]])

    ```
    """
    is_token = torch.arange(values.size(1), device=values.device) < lengths[:, None]
    value = torch.where(is_token, values.double(), 0.0)
    delta = torch.where(is_token, rewards.double(), 0.0) - value
    delta[:, :-1] += gamma * value[:, 1:]
    advantages = torch.zeros_like(value)
    following = torch.zeros_like(value[:, 0])
    for t in reversed(range(values.size(1))):
        # A row that has ended has no δ, so what it passes on is 0.
        following = advantages[:, t] = delta[:, t] + gamma * lam * following
    return advantages.to(values.dtype), (advantages + value).to(values.dtype)


def _std_of_all(rewards: Tensor) -> Tensor:
    return group_mean_std(rewards, torch.zeros_like(rewards, dtype=torch.long), 1)[1]
