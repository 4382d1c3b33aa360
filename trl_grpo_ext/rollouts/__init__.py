"""
What is sampled for a row where one completion is not enough: conversations, and plans with their implementations.

- `adapter`: [`Rollout`] and [`CallbackRollout`], between TRL, which knows sequences, and the batch of completions.
- `answers`: where the answers lie in the sequences of one process, and among those of all processes.
- `dialogue`: [`Talk`] generates answers and carries conversations on by tokens; [`roll_out`] does so to the end.
- `template`: [`TurnTemplate`], what a chat template writes between two answers.
- `limits`: how long a conversation may become.
- `multi_turn`: [`MultiTurnCallback`], a history that is shared or one for each conversation. `shared`: its rows.
- `hierarchical`: [`HierarchicalCallback`], plans and implementations.

To add a rollout: write a [`GRPOCallback`] whose `on_generate` returns one [`RolloutSequence`] for each row. Generate
with [`Talk`], lay out the rows in `on_plan`, and give credit in `on_advantages` with what `credit.turns` has. What user
code gets is a copy of its own (`host.calls.own_copy`). Then name the rollout in `trainer.features` and `config`.
"""

from .dialogue import read_turns
from .hierarchical import HierarchicalCallback
from .multi_turn import MultiTurnCallback

__all__ = ["HierarchicalCallback", "MultiTurnCallback", "read_turns"]
