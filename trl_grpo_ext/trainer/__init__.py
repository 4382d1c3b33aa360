"""The life of a batch, on top of TRL's trainer.

- `adaptive`: [`AdaptiveGRPOTrainer`]. Read `_generate_and_score_completions` first: one line for each stage.
- `sampled`: a batch on its way. `features`: from options to callbacks. `logs`: what is logged of a batch.
- `lean`: TRL's trainer without work that changes no gradient. `reuse`: when further passes over a batch end.
- `saving`: checkpoints that are complete or do not count, with the state of the callbacks. `card`: the model card.
- `ground`: what callbacks may ask of the trainer. `trial`: sample and update as the run does. `untouched`: then put
  everything back.

To add an option, add its field and its rules to `config`, and its callback to `features`.
"""

from .adaptive import AdaptiveGRPOTrainer

__all__ = ["AdaptiveGRPOTrainer"]
