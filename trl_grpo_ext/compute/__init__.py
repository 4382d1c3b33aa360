"""
The same gradient for less work.

- `packing`: where the tokens of a batch go when each prompt is laid out once, as pure functions of lengths.
- `forward`: log-probabilities of such a layout, and what a model must be like for it.
- `rows`: which rows and columns a micro-batch needs, and which micro-batch a row goes to.
- `generation`: one prefill for each distinct prompt, finished rows that leave, merged adapters.
- `hidden`: the policy's state at the end of a prompt, for predictors.

`trainer.lean` joins them to TRL's trainer. To add a saving: write it here as a function of tensors and a model, compare
it once in a run with what TRL would have computed, and fall back with a reason where the two differ.
"""

from .hidden import prompt_features

__all__ = ["prompt_features"]
