"""Generation with transformers: equal prompts are read once, finished rows leave the batch, adapters are merged."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from ..host.seams import CACHE
from .forward import reads_in_order
from .packing import equal_rows

# Settings under which a generation may be interrupted and taken up again: none depends on how long the prompt was.
STATELESS = {
    "_from_model_config",
    "bos_token_id",
    "disable_compile",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "pad_token_id",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
# Rows leave when at least this share of them has finished: less does not pay for copying the cache of the others.
LEAVE = 0.25


class EnoughFinished(StoppingCriteria):
    """Stops a generation when a share of [`LEAVE`] of its rows has finished."""

    def __init__(self, eos_token_ids: Tensor, num_rows: int):
        self.eos_token_ids = eos_token_ids
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=eos_token_ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.finished |= torch.isin(input_ids[:, -1], self.eos_token_ids)
        return (self.finished.float().mean() >= LEAVE).expand(len(self.finished))


class RoomyLayer(DynamicLayer):
    """Keys and values with room for the tokens to come: these are written into it, and nothing is copied for them."""

    room: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        if end > self.room[0].size(-2):
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def select_rows(cache: Cache, rows: Tensor, num_new: int) -> None:
    """Keep the given rows of a cache, shape `(M,)`, each as often as it is named, with room for `num_new` tokens."""
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, RoomyLayer):
            layer.batch_select_indices(rows)
            continue
        roomy, room = RoomyLayer(), []
        for old in (layer.keys, layer.values):
            new = old.new_empty(len(rows), old.size(1), old.size(2) + num_new, old.size(3))
            new[..., : old.size(2), :] = old[rows]
            room.append(new)
        roomy.lazy_initialization(*room)
        roomy.room = (room[0], room[1])
        roomy.keys, roomy.values = (new[..., : new.size(2) - num_new, :] for new in room)
        cache.layers[number] = roomy


def why_not_prefilled(
    model: PreTrainedModel, generation_config: GenerationConfig, peft_config: Any = None
) -> str | None:
    """Why `generate` cannot start from a shared prefill with this model and configuration; `None` if it can."""
    if reads_in_order(model):
        return "linear attention or recurrence, whose state is not kept token by token"
    if peft_config is not None and peft_config.is_prompt_learning:
        return "the tokens that peft puts before the prompt"
    # A configuration without a value takes the model's.
    settings = {**model.generation_config.to_diff_dict(), **generation_config.to_diff_dict()}
    others = sorted(key for key, value in settings.items() if key not in STATELESS and value not in (None, False))
    return f"the generation settings {', '.join(others)}" if others else None


def prefilled_generate(
    model: Any,
    generate: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
) -> Tensor:
    """
    `generate(input_ids=..., attention_mask=..., generation_config=...)`, with one prefill per distinct prompt.

    The logits are those of `generate` on repeated prompts up to rounding, so the samples have the same distribution;
    as long as no row leaves, they are drawn from the same random numbers.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        generate (`Callable`):
            Its `generate`.
        input_ids (`torch.Tensor` of shape `(N, P)`):
            Prompts, padded left.
        attention_mask (`torch.Tensor` of shape `(N, P)`):
            1 for tokens, 0 for padding.
        generation_config ([`~transformers.GenerationConfig`]):
            With `max_new_tokens` and `pad_token_id`.

    Returns:
        `torch.Tensor` of shape `(N, P + T)`: prompts and completions, padded right.
    """
    num_rows, width = input_ids.shape
    prompts = equal_rows(input_ids, attention_mask)
    first = torch.zeros_like(prompts).index_copy_(0, prompts, torch.arange(num_rows, device=prompts.device))
    first = first[: int(prompts.max()) + 1]
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
    # A prompt of one token leaves nothing to read ahead.
    if len(first) < num_rows and int(attention_mask.sum(1).min()) > 1:
        mask = attention_mask[first, :-1]
        prefill = model(
            input_ids=input_ids[first, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = prefill[CACHE]
        select_rows(cache, prompts, 1 + generation_config.max_new_tokens)
        arguments[CACHE] = cache

    config = copy.deepcopy(generation_config)
    config.return_dict_in_generate = True
    config.use_cache = True  # without, `generate` would read a filled cache and all tokens again
    eos = model.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    eos_token_ids = torch.tensor([] if eos is None else eos, device=input_ids.device).flatten()
    sequences = input_ids.new_full((num_rows, width + config.max_new_tokens), config.pad_token_id)
    rows = torch.arange(num_rows, device=input_ids.device)
    while True:
        output = generate(
            **arguments,
            generation_config=config,
            stopping_criteria=[EnoughFinished(eos_token_ids, len(rows))],
        )
        sequences[rows, : output.sequences.size(1)] = output.sequences
        going_on = ~torch.isin(output.sequences[:, width:], eos_token_ids).any(1)
        config.max_new_tokens = width + generation_config.max_new_tokens - output.sequences.size(1)
        if config.max_new_tokens == 0 or not going_on.any():
            return sequences[:, : output.sequences.size(1)]
        rows = rows[going_on]
        cache = output[CACHE]
        select_rows(cache, going_on.nonzero().flatten(), 1 + config.max_new_tokens)
        ids = output.sequences[going_on]
        mask = torch.ones_like(ids)
        mask[:, :width] = attention_mask[rows]
        arguments = {"input_ids": ids, "attention_mask": mask, CACHE: cache}


@contextmanager
def prefill_shared(model: Any) -> Iterator[None]:
    """While open, `model.generate` is [`prefilled_generate`]."""
    generate = model.generate

    def replacement(input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor:
        return prefilled_generate(model, generate, input_ids, attention_mask, generation_config)

    model.generate = replacement
    try:
        yield
    finally:
        del model.generate


def adapted_layers(model: Any) -> list[Any]:
    """The layers that PEFT put an adapter into."""
    return [module for module in model.modules() if hasattr(module, "merged_adapters") and hasattr(module, "merge")]


def why_not_merged(model: Any) -> str | None:
    """Why adapters cannot be merged for a generation without changing what is generated; `None` if they can."""
    layers = adapted_layers(model)
    if not layers:
        return "the model has no adapter, which peft_config=LoraConfig(...) gives it"
    counts = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not hasattr(layer, "lora_A") or weight is None or not weight.is_floating_point():
            return f"{type(layer).__name__} is no LoRA on weights in floating point"
        if any(layer.lora_bias.values()):
            return "LoRA trains a bias (lora_bias=True)"
        if any(getattr(dropout, "p", 0.0) > 0.0 for dropout in layer.lora_dropout.values()):
            return "generation while training takes part in lora_dropout: set it to 0"
        if counts[id(weight)] > 1:
            return "an adapted weight is tied to that of another layer"
    return None


@contextmanager
def adapter_merged(model: Any) -> Iterator[None]:
    """While open, the active LoRA adapters of a model are part of a copy of its weights; then they are as before."""
    before = []
    try:
        for layer in adapted_layers(model):
            weight = layer.get_base_layer().weight
            before.append((layer, weight, weight.data))
            weight.data = weight.data.clone()  # subtracting the adapter again would leave rounding errors
            layer.merge()
        yield
    finally:
        for layer, weight, data in before:
            weight.data = data
            layer.merged_adapters.clear()
