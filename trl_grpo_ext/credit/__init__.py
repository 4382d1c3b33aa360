"""From rewards to advantages: what each completion, or each of its tokens, is credited with.

- `groups`: against the mean of the group, as TRL does, for groups of any size.
- `baselines`: against others of the batch or a guess for the prompt, and [`BaselineCallback`] behind `baseline`.
- `tasks`: the same task by task, and [`TaskAdvantagesCallback`] behind `task_advantages`.
- `turns`: conversations and trees, with credit for each turn and level.
- `critic`: [`CriticBaseline`], a value model as in PPO. `gae`: its advantages for each token.

To add a credit, write a pure function of tensors here and a callback with `on_advantages` that calls it.
"""

from .baselines import BaselineCallback
from .critic import CriticBaseline
from .tasks import TaskAdvantagesCallback

__all__ = ["BaselineCallback", "CriticBaseline", "TaskAdvantagesCallback"]
