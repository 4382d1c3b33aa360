"""What TRL logged of a batch before the hooks ran, corrected, and what the hooks add to it."""

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from ..credit.groups import flat_groups, total_rewards
from ..hooks.callback import RolloutBatch


def mean_advantages(batch: RolloutBatch) -> Tensor:
    """
    Advantage of each row `(N,)`; where there is one per token, the mean over the tokens of the row.

    Example:

    ```python
    >>> import torch
    >>> ids, sizes = torch.tensor([0, 0]), torch.tensor([2])
    >>> batch = RolloutBatch(0, ids, sizes, None, torch.ones(2, 1), torch.ones(2, 1), ["reward"])
    >>> batch.advantages, batch.completion_lengths = torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([2, 1])
    >>> mean_advantages(batch).tolist()
    [2.0, 4.0]

    ```
    """
    if batch.advantages.dim() == 1:
        return batch.advantages
    is_token = torch.arange(batch.advantages.size(1)) < batch.completion_lengths[:, None]
    return (batch.advantages * is_token).sum(1) / batch.completion_lengths.clamp(min=1)


def flat_rows(batch: RolloutBatch) -> Tensor:
    """Which rows `(N,)` are in a group whose rewards are all equal."""
    return flat_groups(batch.rewards, batch.group_ids, batch.num_groups)[batch.group_ids]


def metrics_of_merged(batch: RolloutBatch, reward_weights: Tensor, with_lengths: bool) -> dict[str, float]:
    """
    TRL's metrics of a batch of which some groups were replaced: TRL logged those of each round on its own.

    Args:
        batch ([`RolloutBatch`]):
            The merged batch.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Weights.
        with_lengths (`bool`):
            Whether `batch.completion_lengths` are the lengths that TRL logs.

    Returns:
        `dict[str, float]`
    """
    raw = batch.raw_rewards_per_func
    total = total_rewards(raw, reward_weights)
    corrected = {"reward": total.nanmean().item(), "reward_std": nanstd(total).item()}
    for k, name in enumerate(batch.reward_names):
        corrected[f"rewards/{name}/mean"] = raw[:, k].nanmean().item()
        corrected[f"rewards/{name}/std"] = nanstd(raw[:, k]).item()
    if with_lengths:
        lengths = batch.completion_lengths.float()
        for stat in ("mean", "min", "max"):
            corrected[f"completions/{stat}_length"] = getattr(lengths, stat)().item()
    return corrected


def added_metrics(batch: RolloutBatch, has_sizes: bool, num_rounds: int | None) -> dict[str, float]:
    """
    What is logged of every batch besides TRL's metrics.

    Args:
        batch ([`RolloutBatch`]):
            The finished batch.
        has_sizes (`bool`):
            Whether a callback chooses group sizes.
        num_rounds (`int`, *optional*):
            Rounds in which groups were replaced; `None` where no callback replaces any.

    Returns:
        `dict[str, float]`: what callbacks put into `batch.metrics`, and the counts.
    """
    metrics = {}
    for name, value in batch.metrics.items():
        try:
            metrics[name] = float(value)  # trackers and the state of a run take no tensors
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"batch.metrics[{name!r}] is {value!r:.80}: put one number into it") from error
    if has_sizes:
        sizes = batch.group_sizes.float()
        metrics["group_size/mean"] = sizes.mean().item()
        metrics["group_size/min"] = sizes.min().item()
        metrics["group_size/max"] = sizes.max().item()
    flat = flat_rows(batch)
    discarded = 0 if batch.discarded is None else batch.discarded.group_ids.numel()
    metrics["rollouts/informative"] = (~flat).sum().item() / (flat.numel() + discarded)
    if num_rounds is not None:
        metrics["dynamic_sampling/rounds"] = float(num_rounds)
        metrics["dynamic_sampling/discarded"] = float(discarded)
    return metrics
