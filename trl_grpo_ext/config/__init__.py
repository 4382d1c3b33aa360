"""Every option and its rules. A leaf: it imports nothing of ours.

- `options`: [`AdaptiveGRPOConfig`], each option with its `help`, which is the docstring and the page of options, too.
- `rules`: what options may be, alone and together. Callbacks that are built without a configuration check by them.
- `presets`: options that go together, [`EFFICIENT`] and [`EFFICIENT_LONG_PROMPTS`].

To add an option: a field with its `help` in `options`, a rule in `rules`, and a line in `trainer.features`; then run
`python docs/tables.py`.
"""

from .options import AdaptiveGRPOConfig
from .presets import EFFICIENT, EFFICIENT_LONG_PROMPTS
from .rules import (
    ACTIONS,
    ALARMS,
    BASELINES,
    TASK_MIXINGS,
    check_clipping,
    check_held_out,
    check_kl,
    check_on_alarm,
    check_task_mixing,
)

__all__ = [
    "ACTIONS",
    "ALARMS",
    "BASELINES",
    "EFFICIENT",
    "EFFICIENT_LONG_PROMPTS",
    "TASK_MIXINGS",
    "AdaptiveGRPOConfig",
    "check_clipping",
    "check_held_out",
    "check_kl",
    "check_on_alarm",
    "check_task_mixing",
]
