"""Rewards before credit: clipped, and groups that taught nothing replaced.

- `clipping`: [`RewardClipCallback`], by a range or by quantiles of the batch.
- `resampling`: [`DynamicSamplingCallback`], and the merging of rows that were sampled anew.

To add a shaping of rewards, override `on_rewards` or `on_total_rewards`; to replace groups, override `on_resample`.
"""

from .clipping import RewardClipCallback
from .resampling import DynamicSamplingCallback

__all__ = ["DynamicSamplingCallback", "RewardClipCallback"]
