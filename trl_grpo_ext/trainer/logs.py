"""What TRL logged of a batch before the hooks ran, corrected, and what the hooks add to it."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import nanstd

from ..hooks.records import RolloutBatch
from ..hooks.segments import total_rewards


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
    flat = batch.flat_completions()
    discarded = 0 if batch.discarded is None else batch.discarded.group_ids.numel()
    metrics["rollouts/informative"] = (~flat).sum().item() / (flat.numel() + discarded)
    if num_rounds is not None:
        metrics["dynamic_sampling/rounds"] = float(num_rounds)
        metrics["dynamic_sampling/discarded"] = float(discarded)
    return metrics


class StepMarks(TrainerCallback):
    """
    Remembers how many values each training metric had when the optimizer step began.

    Args:
        marks (`dict[str, int]`):
            Where to put the numbers.
        metrics (`dict[str, list[float]]`):
            TRL's training metrics, which start anew after each log.
    """

    def __init__(self, marks: dict[str, int], metrics: dict[str, list[float]]):
        self.marks = marks
        self.metrics = metrics

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.marks.clear()
        self.marks.update({name: len(values) for name, values in self.metrics.items()})
