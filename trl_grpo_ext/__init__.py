"""TRL's GRPOTrainer with the hooks it lacks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AdaptiveGRPOConfig
    from .credit.baselines import BaselineCallback
    from .credit.critic import CriticBaseline
    from .credit.tasks import TaskAdvantagesCallback
    from .hooks import GRPOCallback, RolloutBatch
    from .observe.evaluation import HeldOutCallback
    from .observe.kl import AdaptiveKLCallback
    from .observe.monitor import MonitorCallback
    from .observe.tasks import TaskCallback
    from .plan.curriculum import OnlineCurriculumCallback, StagedCurriculumCallback, TargetCurriculumCallback
    from .plan.group_size import SingleGroupSizeCallback, ThresholdGroupSizeCallback, VarianceGroupSizeCallback
    from .plan.predicted import PredictedCurriculumCallback
    from .plan.tasks import TaskMixingCallback
    from .rollouts import HierarchicalCallback, MultiTurnCallback
    from .shape.clipping import RewardClipCallback
    from .shape.resampling import DynamicSamplingCallback
    from .trainer.adaptive import AdaptiveGRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "AdaptiveGRPOConfig",
    "AdaptiveGRPOTrainer",
    "AdaptiveKLCallback",
    "BaselineCallback",
    "CriticBaseline",
    "DynamicSamplingCallback",
    "GRPOCallback",
    "HeldOutCallback",
    "HierarchicalCallback",
    "MonitorCallback",
    "MultiTurnCallback",
    "OnlineCurriculumCallback",
    "PredictedCurriculumCallback",
    "RewardClipCallback",
    "RolloutBatch",
    "SingleGroupSizeCallback",
    "StagedCurriculumCallback",
    "TargetCurriculumCallback",
    "TaskAdvantagesCallback",
    "TaskCallback",
    "TaskMixingCallback",
    "ThresholdGroupSizeCallback",
    "VarianceGroupSizeCallback",
]

# As in TRL, a name is imported when it is asked for: the rewards and the report need neither TRL nor a model.
_MODULES = {
    "hooks": ["GRPOCallback", "RolloutBatch"],
    "config": ["AdaptiveGRPOConfig"],
    "plan.curriculum": ["OnlineCurriculumCallback", "StagedCurriculumCallback", "TargetCurriculumCallback"],
    "plan.group_size": ["SingleGroupSizeCallback", "ThresholdGroupSizeCallback", "VarianceGroupSizeCallback"],
    "plan.predicted": ["PredictedCurriculumCallback"],
    "plan.tasks": ["TaskMixingCallback"],
    "rollouts": ["HierarchicalCallback", "MultiTurnCallback"],
    "shape.clipping": ["RewardClipCallback"],
    "shape.resampling": ["DynamicSamplingCallback"],
    "credit.baselines": ["BaselineCallback"],
    "credit.critic": ["CriticBaseline"],
    "observe.evaluation": ["HeldOutCallback"],
    "credit.tasks": ["TaskAdvantagesCallback"],
    "observe.kl": ["AdaptiveKLCallback"],
    "observe.monitor": ["MonitorCallback"],
    "observe.tasks": ["TaskCallback"],
    "trainer.adaptive": ["AdaptiveGRPOTrainer"],
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".host.seams", __name__)  # first: says in one line when this TRL does not fit
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
