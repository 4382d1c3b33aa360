"""TRL's GRPOTrainer with the hooks it lacks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# As in TRL, a name is imported when it is asked for: the rewards and the report need neither TRL nor a model.
_MODULES = {
    "callbacks": ["GRPOCallback", "RolloutBatch"],
    "clipping": ["RewardClipCallback"],
    "config": ["AdaptiveGRPOConfig"],
    "critic": ["CriticBaseline"],
    "curriculum": ["OnlineCurriculumCallback", "StagedCurriculumCallback", "TargetCurriculumCallback"],
    "group_size": ["ThresholdGroupSizeCallback", "VarianceGroupSizeCallback"],
    "kl": ["AdaptiveKLCallback"],
    "monitor": ["MonitorCallback"],
    "resampling": ["DynamicSamplingCallback"],
    "rollouts": ["HierarchicalCallback", "MultiTurnCallback"],
    "trainer": ["AdaptiveGRPOTrainer"],
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("._host", __name__)  # first: says in one line when this TRL does not fit
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
