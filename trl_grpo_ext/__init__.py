"""TRL's GRPOTrainer with the hooks it lacks."""

from . import _host  # noqa: F401 (first: says in one line when this TRL does not fit)
from .callbacks import GRPOCallback, RolloutBatch
from .clipping import RewardClipCallback
from .config import AdaptiveGRPOConfig
from .critic import CriticBaseline
from .curriculum import OnlineCurriculumCallback, StagedCurriculumCallback, TargetCurriculumCallback
from .group_size import ThresholdGroupSizeCallback, VarianceGroupSizeCallback
from .kl import AdaptiveKLCallback
from .monitor import MonitorCallback
from .resampling import DynamicSamplingCallback
from .rollouts import HierarchicalCallback, MultiTurnCallback
from .trainer import AdaptiveGRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "AdaptiveGRPOConfig",
    "AdaptiveGRPOTrainer",
    "AdaptiveKLCallback",
    "CriticBaseline",
    "DynamicSamplingCallback",
    "GRPOCallback",
    "HierarchicalCallback",
    "MonitorCallback",
    "MultiTurnCallback",
    "OnlineCurriculumCallback",
    "RewardClipCallback",
    "RolloutBatch",
    "StagedCurriculumCallback",
    "TargetCurriculumCallback",
    "ThresholdGroupSizeCallback",
    "VarianceGroupSizeCallback",
]
