"""Features of prompts: what the policy holds in its last hidden state where a completion begins."""

import torch
from torch import Tensor, nn

WIDTH = 256  # of the features; a wider hidden state is projected


@torch.no_grad()
def prompt_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int = WIDTH) -> Tensor:
    """Last hidden states `(P, d)` at the end of prompts that are padded on the left, float32, on the CPU."""
    was_training = model.training
    model.eval()
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    try:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
    finally:
        model.train(was_training)
    states: Tensor = output.hidden_states[-1][:, -1].float().cpu()
    if states.size(1) <= width:
        return states
    generator = torch.Generator().manual_seed(0)
    return states @ torch.randn(states.size(1), width, generator=generator) / states.size(1) ** 0.5
