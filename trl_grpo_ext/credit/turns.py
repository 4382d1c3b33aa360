"""Credit for answers that depend on each other: later turns of a conversation, implementations of a plan.

Axis suffixes: `A` answers, `B` rows of the loss, `T` tokens. An answer's parent is the answer it carries on from. NaN
means "no reward applies". Everything is computed in float64 and returned in the dtype that came in.
"""

import math

import torch
from torch import Tensor

from ..hooks.segments import group_mean_std
from .groups import EPS, group_advantages


def returns(rewards: Tensor, parents: Tensor) -> Tensor:
    """
    What follows from each answer: its own reward, plus the mean return of the answers that carry on from it.

    In a conversation without branches that is the sum of the rewards from the turn on (return-to-go). In a tree whose
    inner answers have no reward of their own it is the mean over the leaves below, if each has as many.

    Args:
        rewards (`torch.Tensor` of shape `(A,)`):
            Reward of each answer, NaN where none applies.
        parents (`torch.Tensor` of shape `(A,)`):
            Index of the answer that each one carries on from, smaller than its own; -1 for a first answer.

    Returns:
        `torch.Tensor` of shape `(A,)`:
            Returns over the rewards that apply; NaN where none does, neither to the answer nor to any after it.

    Example:

    ```python
    >>> import torch
    >>> nan = float("nan")
    >>> returns(torch.tensor([1.0, 2.0, 3.0]), parents=torch.tensor([-1, 0, 1])).tolist()  # three turns
    [6.0, 5.0, 3.0]
    >>> returns(torch.tensor([nan, 1.0, 0.0]), parents=torch.tensor([-1, 0, 0])).tolist()  # a plan and its two children
    [0.5, 1.0, 0.0]

    ```
    """
    values, before = rewards.double().tolist(), parents.tolist()
    below, count = [0.0] * len(values), [0] * len(values)
    for answer in reversed(range(len(values))):
        if count[answer]:
            own = 0.0 if math.isnan(values[answer]) else values[answer]
            values[answer] = own + below[answer] / count[answer]
        if before[answer] >= 0 and not math.isnan(values[answer]):
            below[before[answer]] += values[answer]
            count[before[answer]] += 1
    return torch.tensor(values, dtype=rewards.dtype, device=rewards.device)


def leave_one_out_advantages(values: Tensor, group_ids: Tensor, num_groups: int, scale_rewards: str = "none") -> Tensor:
    """
    Value of each answer minus the mean of the **others** in its group (RLOO, arXiv 2402.14740).

    Given that an answer was reached, the others' values do not depend on it. So a group may hold only the trajectories
    that came as far as a turn, although the policy decides when to stop, and the gradient stays unbiased with
    `scale_rewards="none"`. An answer without others gets 0.

    Args:
        values (`torch.Tensor` of shape `(A,)`):
            Reward or return, NaN where there is none.
        group_ids (`torch.Tensor` of shape `(A,)`):
            Group of each answer.
        num_groups (`int`):
            Number of groups.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Divide by the group's standard deviation (`"group"`), by that of all values (`"batch"`), or not.

    Returns:
        `torch.Tensor` of shape `(A,)`:
            Advantages.

    Example:

    ```python
    >>> import torch
    >>> leave_one_out_advantages(torch.tensor([3.0, 1.0, 2.0, 7.0]), torch.tensor([0, 0, 0, 1]), num_groups=2).tolist()
    [1.5, -1.5, 0.0, 0.0]

    ```
    """
    _, std, count = group_mean_std(values, group_ids, num_groups)
    centred = group_advantages(values.double(), group_ids, num_groups, "none")
    advantages = centred * (count / (count - 1).clamp(min=1))[group_ids]
    if scale_rewards == "group":
        advantages = advantages / (std[group_ids] + EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (group_mean_std(values, torch.zeros_like(group_ids), 1)[1] + EPS)
    return advantages.to(values.dtype)


def tree_advantages(
    values: Tensor, levels: Tensor, group_ids: Tensor, num_groups: int, scale_rewards: str = "group"
) -> Tensor:
    """
    Advantages of the answers of a tree: at each level, against those that share a parent.

    With `r_ij` the reward of implementation `j` of plan `i` and `V_i = mean_j r_ij` ([`returns`]), plans get
    `(V_i - V̄) / σ_V` and implementations `(r_ij - V_i) / σ_i`.

    Args:
        values (`torch.Tensor` of shape `(A,)`):
            Return of each answer, NaN where there is none.
        levels (`torch.Tensor` of shape `(A,)`):
            Level of each answer, from 0. Levels are scaled apart: plans differ less than what follows from them.
        group_ids (`torch.Tensor` of shape `(A,)`):
            Group of each answer: those with one parent.
        num_groups (`int`):
            Number of groups.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            As in [`~trl_grpo_ext.credit.groups.group_advantages`].

    Returns:
        `torch.Tensor` of shape `(A,)`:
            Advantages.

    Example:

    ```python
    >>> import torch
    >>> values = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 0.0])  # two plans, then two implementations of each
    >>> levels, group_ids = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    >>> tree_advantages(values, levels, group_ids, num_groups=3, scale_rewards="none").tolist()
    [0.25, -0.25, 0.5, -0.5, 0.0, 0.0]

    ```
    """
    advantages = torch.zeros_like(values)
    for level in levels.unique():
        own = levels == level
        advantages[own] = group_advantages(values[own], group_ids[own], num_groups, scale_rewards)
    return advantages


def plan_share(rewards: Tensor, plan_ids: Tensor, prompt_of_plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    How much the plan matters: the spread of plans against the spread of the implementations of one plan.

    Args:
        rewards (`torch.Tensor` of shape `(A,)`):
            Reward of each implementation, NaN where none applies.
        plan_ids (`torch.Tensor` of shape `(A,)`):
            Plan of each implementation.
        prompt_of_plan (`torch.Tensor` of shape `(number of plans,)`):
            Prompt of each plan.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            Standard deviation of the plans' mean rewards within a prompt, and of rewards within a plan, each the root
            of the mean square; and the share of the variance that plans explain, between 0 and 1, from which the part
            that comes of averaging few implementations has been taken off (one-way analysis of variance).

    Example:

    ```python
    >>> import torch
    >>> across, within, share = plan_share(
    ...     torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]), prompt_of_plan=torch.tensor([0, 0])
    ... )
    >>> round(across.item(), 3), within.item(), share.item()
    (0.707, 0.0, 1.0)

    ```
    """
    mean, std, count = group_mean_std(rewards, plan_ids, prompt_of_plan.numel())
    _, spread, plans = group_mean_std(mean, prompt_of_plan, int(prompt_of_plan.max()) + 1)
    across, within = (spread[plans > 1] ** 2).mean(), (std[count > 1] ** 2).mean()
    noise = within.nan_to_num(0.0) / count[count > 0].mean()
    between = (across.nan_to_num(0.0) - noise).clamp(min=0)
    total = between + within.nan_to_num(0.0)
    return across.sqrt(), within.sqrt(), torch.where(total > 0, between / total, torch.nan)


def spread_over_tokens(advantages: Tensor, answer_of_token: Tensor) -> Tensor:
    """
    Advantages per token of the rows of the loss, from advantages per answer.

    Args:
        advantages (`torch.Tensor` of shape `(A,)` or `(A, T)`):
            Advantage of each answer, or of each token of it.
        answer_of_token (`torch.Tensor` of shape `(B, width)`):
            Answer that each token belongs to, -1 for tokens that the model did not write. Those of an answer follow
            one another in one row.

    Returns:
        `torch.Tensor` of shape `(B, width)`:
            Advantages, 0 where there is no answer.

    Example:

    ```python
    >>> import torch
    >>> tokens = torch.tensor([[0, 0, -1, 1], [2, -1, -1, -1]])
    >>> spread_over_tokens(torch.tensor([5.0, 6.0, 7.0]), tokens).tolist()
    [[5.0, 5.0, 0.0, 6.0], [7.0, 0.0, 0.0, 0.0]]
    >>> spread_over_tokens(torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 0.0]]), tokens).tolist()
    [[1.0, 2.0, 0.0, 3.0], [4.0, 0.0, 0.0, 0.0]]

    ```
    """
    written = answer_of_token >= 0
    answer = answer_of_token.clamp(min=0)
    if advantages.dim() == 1:
        return advantages[answer].masked_fill(~written, 0.0)
    column = torch.arange(answer.size(1), device=answer.device).expand_as(answer)
    first = torch.full((int(answer.max()) + 1,), answer.size(1), device=answer.device)
    first = first.scatter_reduce(0, answer[written], column[written], "amin")
    position = (column - first[answer]).clamp(0, advantages.size(1) - 1)
    return advantages[answer, position].masked_fill(~written, 0.0)
