"""Reward clipping: by a fixed range, by quantiles of the batch, or both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import check_clipping
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.records import RolloutBatch


def clip_to_range(values: Tensor, low: float, high: float) -> Tensor:
    """
    Clip to a fixed range; NaN stays NaN.

    Args:
        values (`torch.Tensor`):
            Rewards, any shape.
        low (`float`):
            Smallest value kept.
        high (`float`):
            Largest value kept.

    Returns:
        `torch.Tensor`:
            Clipped rewards, same shape.

    Example:

    ```python
    >>> import torch
    >>> clip_to_range(torch.tensor([-30.0, 0.5, float("nan")]), -10, 10).tolist()
    [-10.0, 0.5, nan]

    ```
    """
    return values.clamp(low, high)


def clip_to_quantiles(values: Tensor, low: float, high: float) -> Tensor:
    """
    Clip each column to its own quantiles (linear interpolation); NaN is left out of the quantiles and stays NaN.

    Args:
        values (`torch.Tensor` of shape `(N,)` or `(N, K)`):
            Rewards of the whole batch.
        low (`float`):
            Lower quantile in `[0, 1]`.
        high (`float`):
            Upper quantile in `[0, 1]`.

    Returns:
        `torch.Tensor`:
            Clipped rewards, same shape.

    Example:

    ```python
    >>> import torch
    >>> clip_to_quantiles(torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0]), 0.25, 0.75).tolist()
    [1.0, 1.0, 2.0, 3.0, 3.0]

    ```
    """
    # Interpolating towards an infinite reward gives NaN, so infinite ones take no part in the quantiles.
    finite = values.masked_fill(values.isinf(), torch.nan)
    bounds = torch.nanquantile(finite, torch.tensor([low, high], dtype=values.dtype), dim=0)
    # A column without any finite value has NaN bounds and nothing to clip.
    return torch.where(values.isnan() | bounds[0].isnan(), values, values.clamp(bounds[0], bounds[1]))


class RewardClipCallback(GRPOCallback):
    """
    Clip rewards after they are gathered from all processes and before they are normalised.

    Clipping sees the whole batch, so every rank clips alike. `None` rewards stay `None`. Evaluation is never clipped,
    and the logged means (`reward`, `rewards/<name>/mean`) stay raw. Logs `reward_clip/frac`, the share of rewards that
    were changed, and for each function `reward_clip/<name>/frac`.

    Args:
        clip_range (`Sequence[float]`, *optional*):
            Smallest and largest reward.
        quantiles (`Sequence[float]`, *optional*):
            Lower and upper quantile of the batch. Applied after `clip_range`.
        on (`str`, *optional*, defaults to `"each"`):
            `"each"` clips the rewards of each function, `"total"` their weighted sum.

    Raises:
        `ValueError`: when neither is given, a bound is out of order or a quantile outside `[0, 1]`.
    """

    def __init__(
        self,
        clip_range: Sequence[float] | None = None,
        quantiles: Sequence[float] | None = None,
        on: str = "each",
    ):
        check_clipping(clip_range, quantiles, on)
        if clip_range is None and quantiles is None:
            raise ValueError("RewardClipCallback has nothing to do: set `clip_range`, `quantiles` or both")
        self.clip_range = clip_range
        self.quantiles = quantiles
        self.on = on

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        message = (
            "reward_clip_on='total' cannot be combined with multi_objective_aggregation='normalize_then_sum', where "
            "the total is already normalised: use reward_clip_on='each'"
        )
        return (Conflict("normalize_then_sum", message),) if self.on == "total" else ()

    def on_rewards(self, batch: RolloutBatch, **kwargs: Any) -> Tensor | None:
        if self.on == "each":
            clipped = self._clip(batch.rewards_per_func)
            self._log(batch, batch.rewards_per_func, clipped)
            for k, name in enumerate(batch.reward_names):
                changed = _changed(batch.rewards_per_func[:, k], clipped[:, k])
                batch.metrics[f"reward_clip/{name}/frac"] = changed
            return clipped
        return None

    def on_total_rewards(self, batch: RolloutBatch, **kwargs: Any) -> Tensor | None:
        if self.on == "total":
            clipped = self._clip(batch.rewards)
            self._log(batch, batch.rewards, clipped)
            return clipped
        return None

    def _clip(self, values: Tensor) -> Tensor:
        if self.clip_range is not None:
            values = clip_to_range(values, *self.clip_range)
        if self.quantiles is not None:
            values = clip_to_quantiles(values, *self.quantiles)
        return values

    def _log(self, batch: RolloutBatch, before: Tensor, after: Tensor) -> None:
        batch.metrics["reward_clip/frac"] = _changed(before, after)


def _changed(before: Tensor, after: Tensor) -> float:
    """Share of the rewards (NaN left out) that differ; NaN when there is none."""
    valid = ~before.isnan()
    return ((before != after) & valid).sum().item() / valid.sum().item() if valid.any() else float("nan")
