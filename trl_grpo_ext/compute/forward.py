"""Log-probabilities of completions whose prompts are computed once, and which models allow it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..host.seams import HAS_FUSED_HEAD
from .packing import Costs, PackedBatch, equal_rows, fill, may_attend, pack

# Rotary embeddings that do not depend on the length of the sequence.
ROTARY = ("default", "linear", "llama3", "yarn")
# Logits that take no more bytes are kept for the backward pass on a CPU.
KEPT_LOGITS = 2**28


def unwrapped(model: nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """The transformers model inside wrappers of accelerate and peft."""
    inner: Any = accelerator.unwrap_model(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def why_not_shared(model: PreTrainedModel, peft_config: Any = None) -> str | None:
    """
    Why a model cannot compute a prompt once for several completions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, without wrappers.
        peft_config (*optional*):
            Configuration of its peft adapter.

    Returns:
        `str`, *optional*: the reason, or `None` if it can.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config is not model.config:
        return "it takes images or sound besides text"
    if peft_config is not None and peft_config.is_prompt_learning:
        return f"peft's {peft_config.peft_type} puts tokens of its own before the prompt"
    if reads_in_order(model):
        return "its linear attention or recurrence reads tokens in order, whatever the mask"
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    ):
        return "its attention has a sliding window"
    if attention not in ("sdpa", "eager", "flex_attention"):
        return f"attn_implementation={attention!r} takes no mask of its own: use 'sdpa', 'eager' or 'flex_attention'"
    if not has_relative_positions(model):
        return "its positions are not rotary, or depend on the length of the sequence"
    return None


def reads_in_order(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state of what it has read, rather than keys and values of each token."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return getattr(model, "_is_stateful", False) or bool(kinds & {"linear_attention", "mamba", "recurrent", "conv"})


def has_relative_positions(model: PreTrainedModel) -> bool:
    """Whether moving a sequence along the positions leaves its log-probabilities as they are."""
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rotary.get("rope_type") in ROTARY


def sharing_error(model: nn.Module, base: PreTrainedModel, accelerator: Accelerator) -> str | None:
    """
    Try sharing on a few tokens: what the configuration of a model does not tell, its numbers do.

    Args:
        model (`torch.nn.Module`), base ([`~transformers.PreTrainedModel`]), accelerator ([`~accelerate.Accelerator`]):
            As in [`shared_logps`]. Every process must call this.

    Returns:
        `str`, *optional*: what is wrong, or `None` if log-probabilities agree with those of separate rows.
    """
    device, num_completion_columns = accelerator.device, 4
    ids = torch.arange(28, device=device).view(4, 7) % base.config.get_text_config().vocab_size
    ids[:, :3] = ids[0, :3]
    mask = torch.ones_like(ids)
    mask[:2, 0], mask[0, -1] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-num_completion_columns] = -100
    was_training = model.training
    model.eval()
    with torch.no_grad():
        with accelerator.autocast():
            if HAS_FUSED_HEAD:
                expected = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
            else:
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                expected = logps_and_entropies(logits, ids[:, 1:])[0].masked_fill(labels[:, 1:] == -100, 0.0)
        expected = expected[:, -num_completion_columns:].float()
        shared = shared_logps(
            model, base, accelerator, ids, mask, num_completion_columns, Costs(1.0, 0.0, float("inf"))
        )
    model.train(was_training)
    assert shared is not None
    error = (shared[0].float() - expected).abs().max().item()
    half = accelerator.mixed_precision != "no" or base.dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.2 if half else 1e-3
    if error <= tolerance:
        return None
    return f"in a trial, log-probabilities were off by {error:.2g} (at most {tolerance} is rounding)"


def costs_of(model: PreTrainedModel) -> Costs:
    """Cost of a token and of a pair of tokens, from the shapes of the model."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = 0 if head is not None and embedding.weight is head.weight else embedding.weight.numel()
    token = sum(p.numel() for p in model.parameters()) - skipped
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    if config._attn_implementation == "flex_attention":
        return Costs(token, pair=0.0, max_area=float("inf"))  # which skips the masked blocks
    # Eager attention keeps its scores for the backward pass.
    max_area = 1.0 if config._attn_implementation == "eager" else 4.0
    return Costs(token, pair=2.0 * width * config.num_hidden_layers, max_area=max_area)


def attention_mask_for(model: PreTrainedModel, batch: PackedBatch) -> Any:
    """The mask of a packed batch, in the form that the attention of `model` takes."""
    attention = model.config.get_text_config()._attn_implementation
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        chunks, rows = batch.chunks, batch.rows

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = (chunks[b, q] == chunks[b, k]) & ((rows[b, k] == -1) | (rows[b, q] == rows[b, k]))
            return visible & (q >= k) & (chunks[b, k] >= 0) | (q == k)

        return create_block_mask(mask_mod, chunks.size(0), None, chunks.size(1), chunks.size(1), chunks.device)
    mask = may_attend(batch.chunks, batch.rows)
    if attention == "eager":
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
    return mask


@contextmanager
def only_positions(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """While open, the backbone of `model` returns the hidden states at `positions`, `(B, L)`, as one sequence."""

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[positions][None]
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def has_small_logits(model: PreTrainedModel, accelerator: Accelerator, num_positions: int) -> bool:
    """
    Whether the logits of so many positions are worth keeping.

    TRL's fused head computes them in tiles and once more in the backward pass, to save memory. In float32 and without
    its Triton kernel, keeping at most [`KEPT_LOGITS`] bytes of them is faster.
    """
    head: Tensor = model.get_output_embeddings().weight
    is_float32 = head.dtype == torch.float32 and accelerator.mixed_precision == "no"
    return is_float32 and head.device.type == "cpu" and 4 * num_positions * head.size(0) <= KEPT_LOGITS


def logps_and_entropies(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropy_requires_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities `(..., T)` of `labels`, and entropies, from logits `(..., T, V)`.

    One softmax serves both. The entropies are computed a few tokens at a time, which saves memory.
    """
    log_probs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_requires_grad and torch.is_grad_enabled()):
        entropies = [-(part.exp() * part).sum(-1) for part in log_probs.split(64, dim=-2)]
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), torch.cat(entropies, dim=-1)


def shared_logps(
    model: nn.Module,
    base: PreTrainedModel,
    accelerator: Accelerator,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion_columns: int,
    costs: Costs,
    temperature: float | None = None,
    entropy_requires_grad: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """
    Log-probabilities and entropies of completions, from one forward pass in which equal prompts are computed once.

    Args:
        model (`torch.nn.Module`):
            Model with TRL's fused LM head, wrapped as for training.
        base ([`~transformers.PreTrainedModel`]):
            The same without wrappers.
        accelerator ([`~accelerate.Accelerator`]):
            For autocast.
        input_ids (`torch.Tensor` of shape `(N, P + T)`):
            Prompts, padded left, and completions, padded right.
        attention_mask (`torch.Tensor` of shape `(N, P + T)`):
            1 for tokens, 0 for padding.
        num_completion_columns (`int`):
            `T`.
        costs ([`Costs`]):
            From [`costs_of`].
        temperature (`float`, *optional*):
            Temperature of the log-probabilities, which TRL's fused head knows. Without one, that head is used for all
            sizes; it is 1 where TRL has none.
        entropy_requires_grad (`bool`, *optional*, defaults to `False`):
            Whether gradients flow through the entropies.

    Returns:
        `tuple` of `torch.Tensor` of shape `(N, T)`, *optional*: log-probabilities, and entropies where the head
        computes them; 0 at padding. `None` where sharing saves nothing, a prompt is empty,
        or no token is scored.
    """
    width = input_ids.size(1) - num_completion_columns
    prompt_lengths, completion_lengths = attention_mask[:, :width].sum(1), attention_mask[:, width:].sum(1)
    if width == 0 or int(prompt_lengths.min()) == 0 or int(completion_lengths.max()) == 0:
        return None
    prompts = equal_rows(input_ids[:, :width], attention_mask[:, :width])
    packing = pack(prompts, prompt_lengths, completion_lengths, costs)
    if packing is None:
        return None
    batch = fill(packing, input_ids, attention_mask, num_completion_columns)
    # Where there is no Triton, the fused head projects every position: hand it only those that are scored.
    scored = batch.labels != -100
    labels = batch.labels[scored][None]
    packed = {
        "input_ids": batch.input_ids,
        "attention_mask": attention_mask_for(base, batch),
        "position_ids": batch.position_ids,
    }
    with accelerator.autocast(), only_positions(base, scored):
        keeps_logits = temperature is not None and has_small_logits(base, accelerator, labels.size(1))
        if HAS_FUSED_HEAD and (entropy_requires_grad or not keeps_logits):
            outputs = model(**packed, shift_labels=labels, fused_lm_head=True)
            log_probs, entropies = outputs.log_probs, outputs.entropy
        else:
            logits = model(**packed, use_cache=False).logits
            log_probs, entropies = logps_and_entropies(logits, labels, temperature or 1.0, entropy_requires_grad)
    padding = attention_mask[:, width:] == 0
    place = (scored.flatten().cumsum(0) - 1)[batch.index]

    def unpacked(values: Tensor) -> Tensor:
        return values[0][place].masked_fill(padding, 0.0)

    return unpacked(log_probs), None if entropies is None else unpacked(entropies)
