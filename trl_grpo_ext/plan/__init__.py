"""Which prompts, and how many completions each: the plan of a batch, the same on every rank.

- `planner`: [`Planner`] asks the callbacks, draws prompts and fits group sizes to the rows.
- `sampler`: [`PromptSampler`], shuffled epochs or weighted draws. `sizes`: group sizes that add up.
- `group_size`: the callbacks behind `group_size`. `curriculum`, `predicted`: those behind `curriculum`.
- `posterior`: what the rewards of a prompt say of it. `predictor`: what its features say before it was drawn.
  `outliers`: which rewards neither of them believes.
- `tasks`: which task a prompt belongs to, and the callback behind `task_mixing`.
- `difficulty`: a column of levels or numbers.

To add a curriculum, override `on_prompt_weights`; to add a rule for sizes, override `on_group_sizes`; then give it an
option in `config` and a line in `trainer.features`.
"""

from .curriculum import OnlineCurriculumCallback, StagedCurriculumCallback, TargetCurriculumCallback
from .group_size import SingleGroupSizeCallback, ThresholdGroupSizeCallback, VarianceGroupSizeCallback
from .planner import Planner
from .posterior import PromptPosterior
from .predicted import PredictedCurriculumCallback
from .predictor import RidgePredictor
from .sampler import PromptSampler
from .tasks import TaskMixingCallback

__all__ = [
    "OnlineCurriculumCallback",
    "Planner",
    "PredictedCurriculumCallback",
    "PromptPosterior",
    "PromptSampler",
    "RidgePredictor",
    "SingleGroupSizeCallback",
    "StagedCurriculumCallback",
    "TargetCurriculumCallback",
    "TaskMixingCallback",
    "ThresholdGroupSizeCallback",
    "VarianceGroupSizeCallback",
]
