"""Rewards that compose: what an answer is worth, as one readable line.

```python
reward = 1.0 * Relevance("reference") + 0.5 * Harmlessness() - 0.001 * Length()
```

- `algebra`: [`Reward`], its leaves and composites, [`as_reward`]. `ops`: the operators. `schedules`: changing weights.
- `parsing`: [`parse_reward`] reads a reward from text, as a flag or a YAML file gives it.
- `trees`: the rows of a composite. `naming`: names and `repr`.
- `scoring`: one call of a leaf. `guards`, `processes`: leaves that are slow or fail. `errors`: what the messages say.
- `text`, `turns`, `judge`, `group_judge`: ready rewards. `tasks`: a reward for each task. `models`: how a classifier is
  asked.

A reward function needs no class: pass it to [`as_reward`]. To add a ready reward, write a [`~algebra.Leaf`] with a
`score` method, as in `text.py`. To add an operator, see `ops.py`. Both join the conformance test by one line.
"""

from .algebra import Reward, RewardModel, as_reward, maximum, minimum
from .errors import RewardError
from .group_judge import GroupJudge
from .judge import Judge, Rubric
from .parsing import parse_reward
from .schedules import constant, cosine, linear, piecewise
from .tasks import by_task
from .text import Harmlessness, Length, OverLength, Relevance
from .turns import at_end, of_plan

__all__ = [
    "GroupJudge",
    "Harmlessness",
    "Judge",
    "Length",
    "OverLength",
    "Relevance",
    "Reward",
    "RewardError",
    "RewardModel",
    "Rubric",
    "as_reward",
    "at_end",
    "by_task",
    "constant",
    "cosine",
    "linear",
    "maximum",
    "minimum",
    "of_plan",
    "parse_reward",
    "piecewise",
]
