"""Generalised advantage estimation, for a critic that values every token."""

import torch
from torch import Tensor


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
