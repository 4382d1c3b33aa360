"""[`prompt_features`]: what the policy makes of a prompt, as a vector, for predictors of rewards."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .forward import unwrapped
from .trials import in_evaluation

# Of the projection: fixed, so that features of different runs and of a resumed one are the same.
SEED = 0


@torch.no_grad()
def prompt_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int = 256) -> Tensor:
    """
    Hidden state of the policy at the last token of each prompt, from one forward pass.

    The state is what the head of the model reads to draw the first token of a completion. The model runs as it is
    wrapped for training, with its adapters and its precision, but without dropout.

    Args:
        model (`torch.nn.Module`):
            Transformers model, with or without PEFT, as wrapped for training. Where weights are split over processes,
            every process must call this.
        input_ids (`torch.Tensor` of shape `(P, L)`):
            Distinct prompts, padded on either side.
        attention_mask (`torch.Tensor` of shape `(P, L)`):
            1 for tokens, 0 for padding.
        width (`int`, *optional*, defaults to `256`):
            Largest number of features. Wider states are multiplied by a fixed random matrix, which keeps angles and
            relative lengths up to about `1 / sqrt(width)`.

    Returns:
        `torch.Tensor` of shape `(P, d)`: float32, on the CPU. `d` is the width of the model, at most `width`.
    """
    base = unwrapped(model)
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    accepted = inspect.signature(type(base).forward).parameters
    if "position_ids" in accepted:  # as in `generate`: positions count the tokens, not the padding
        arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    last = input_ids.size(1) - 1 - attention_mask.flip(1).argmax(1)
    if "logits_to_keep" in accepted:  # of which nobody reads any
        arguments["logits_to_keep"] = 1
    states: list[Tensor] = []

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0]
        offset = hidden.size(1) - input_ids.size(1)  # tokens that PEFT put before the prompt
        states.append(hidden[torch.arange(len(last), device=last.device), last + offset].float().cpu())

    handle = base.base_model.register_forward_hook(keep_last)
    try:
        with in_evaluation(model):
            model(**arguments)
    finally:
        handle.remove()
    return narrowed(states[-1], width)


def narrowed(states: Tensor, width: int) -> Tensor:
    """
    States `(P, d)` with at most `width` columns, through a fixed random projection.

    Example:

    ```python
    >>> import torch
    >>> narrowed(torch.ones(2, 3), width=4).shape, narrowed(torch.ones(2, 6), width=4).shape
    (torch.Size([2, 3]), torch.Size([2, 4]))

    ```
    """
    if states.size(1) <= width:
        return states
    generator = torch.Generator().manual_seed(SEED)
    projected: Tensor = states @ (torch.randn(states.size(1), width, generator=generator) / width**0.5)
    return projected
