"""
What travels through the life of a batch, and where you step in.

- `records`: [`RolloutPlan`], [`RolloutBatch`], [`Answer`] and [`RolloutSequence`], the data that hooks read and return.
- `callback`: [`GRPOCallback`], the hooks themselves.
- `ground`: [`HookedTrainer`], what a callback may ask of the trainer.
- `conflicts`: [`Conflict`], what cannot be combined, as data, and the one function that checks it.
- `checks`: what a hook may return.
- `segments`: sums, means and flatness of groups, as pure functions of tensors.

To add a hook: give it a method in `callback`, call it in `trainer.adaptive`, and name it in `docs/callbacks.md`.

Glossary, used in every folder:

| word | meaning | axis |
| --- | --- | --- |
| prompt | an entry of the training dataset | `D` in the dataset |
| row | a dataset entry as the generation batch holds it: one for each sequence to sample | |
| group | completions that are compared with each other, usually those of one prompt | `P` |
| completion | what the model writes before it stops: what is scored and gets an advantage | `N` |
| answer | a completion inside a conversation or a tree, with the messages before it | `N` |
| sequence | a line of tokens in the loss: a prompt, and its completion or several with the user between | `B` |
| batch | a generation batch: all completions of one plan, on all processes | |
| step | an optimizer step; one batch may serve several | |

Further axes: `K` reward functions, `T` tokens of a completion, `C` candidates of a plan. Variable names may carry their
axes, as in `rewards_NK`.
"""

from .callback import GRPOCallback
from .conflicts import Conflict
from .ground import HookedTrainer
from .records import Answer, RolloutBatch, RolloutPlan, RolloutSequence

__all__ = ["Answer", "Conflict", "GRPOCallback", "HookedTrainer", "RolloutBatch", "RolloutPlan", "RolloutSequence"]
