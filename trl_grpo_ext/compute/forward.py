"""Log-probabilities of completions whose prompts are computed once, and which models allow it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..host.seams import HAS_FUSED_HEAD
from .packing import Costs, PackedBatch, equal_rows, fill, may_attend, pack
from .trials import in_evaluation, nudged, relative_error, rounding, why_not

# Logits that take no more bytes are kept for the backward pass on a CPU.
KEPT_LOGITS = 2**28


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of accelerate and peft."""
    inner: Any = extract_model_from_parallel(model)
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
    if not takes_positions(model):
        return "its forward pass takes no position_ids"
    return None


def reads_in_order(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state of what it has read, rather than keys and values of each token."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return getattr(model, "_is_stateful", False) or bool(kinds & {"linear_attention", "mamba", "recurrent", "conv"})


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward pass of a model, or of its backbone, can be told the positions of tokens."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


@contextmanager
def positions_from(model: PreTrainedModel, start: int) -> Iterator[None]:
    """While open, `model` numbers the columns of a batch from `start`, as if padding before them had not been cut."""

    def number(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None and takes_positions(module):
            columns = torch.arange(start, start + mask.size(1), device=mask.device)
            kwargs["position_ids"] = columns.expand(mask.size(0), -1)
        return args, kwargs

    handle = model.base_model.register_forward_pre_hook(number, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Trials:
    """
    Whether a model computes the same with a saving, tried on four rows. Every process must make the same trials.

    Args:
        model (`torch.nn.Module`), base ([`~transformers.PreTrainedModel`]), accelerator ([`~accelerate.Accelerator`]):
            As in [`shared_logps`].
    """

    num_columns = 4

    def __init__(self, model: nn.Module, base: PreTrainedModel, accelerator: Accelerator):
        self.model, self.base, self.accelerator = model, base, accelerator
        is_half = accelerator.mixed_precision in ("bf16", "fp16")
        self.dtype = torch.bfloat16 if is_half else base.dtype
        self.ids = torch.arange(28, device=accelerator.device).view(4, 7) % base.config.get_text_config().vocab_size
        self.ids[:, :3] = self.ids[0, :3]
        self.mask = torch.ones_like(self.ids)
        self.mask[:2, 0], self.mask[0, -1] = 0, 0

    def why_not_shared(self) -> str | None:
        """Why prompts cannot be computed once."""
        return self._why_not(0, self._shared)

    def why_not_trimmed(self) -> str | None:
        """Why padding before all prompts cannot be left out."""
        return self._why_not(2, self._trimmed)

    def _why_not(self, padding: int, saving: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        ids, mask = (nn.functional.pad(values, (padding, 0)) for values in (self.ids, self.mask))

        def compare() -> tuple[Tensor, Tensor, float]:
            expected, found = self._plain(ids, mask), saving(ids, mask)
            scored = mask[:, -self.num_columns :].bool()
            with nudged(self.base, self.dtype):
                noise = relative_error(self._plain(ids, mask)[scored], expected[scored])
            return found[scored], expected[scored], rounding(noise)

        with torch.no_grad(), in_evaluation(self.model):
            return why_not(compare, "log-probabilities")

    def _plain(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As TRL computes them."""
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : -self.num_columns] = -100
        with self.accelerator.autocast():
            if HAS_FUSED_HEAD:
                log_probs = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
            else:
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                log_probs = logps_and_entropies(logits, ids[:, 1:])[0]
        scored: Tensor = log_probs[:, -self.num_columns :]
        return scored

    def _shared(self, ids: Tensor, mask: Tensor) -> Tensor:
        costs = Costs(1.0, 0.0, float("inf"))
        shared = shared_logps(self.model, self.base, self.accelerator, ids, mask, self.num_columns, costs)
        assert shared is not None  # equal prompts, which cost less together
        return shared[0]

    def _trimmed(self, ids: Tensor, mask: Tensor) -> Tensor:
        with positions_from(self.base, start=2):
            return self._plain(ids[:, 2:], mask[:, 2:])


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
    first_position: int = 0,
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
        first_position (`int`, *optional*, defaults to `0`):
            Position of the first column, where padding before it was left out.

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
    batch = fill(packing, input_ids, attention_mask, num_completion_columns, first_position)
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
