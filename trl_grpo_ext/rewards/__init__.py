"""Rewards that compose: any TRL reward function, model or hub id, in one readable line.

```python
reward = 1.0 * Relevance("reference") + 0.5 * Harmlessness() - 0.001 * Length()
```
"""

from .base import Reward
from .composites import maximum, minimum
from .leaves import as_reward
from .models import RewardModel
from .schedules import constant, cosine, linear, piecewise
from .scoring import RewardError
from .text import Harmlessness, Length, OverLength, Relevance
from .turns import at_end, of_plan

__all__ = [
    "Harmlessness",
    "Length",
    "OverLength",
    "Relevance",
    "Reward",
    "RewardError",
    "RewardModel",
    "as_reward",
    "at_end",
    "constant",
    "cosine",
    "linear",
    "maximum",
    "minimum",
    "of_plan",
    "piecewise",
]
