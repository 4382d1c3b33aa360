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
from .trials import in_evaluation, nudged, relative_error, rounding, why_not

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
# The first choice of tokens, by no random numbers, with a cache that can be taken up again.
RESUMABLE = {"return_dict_in_generate": True, "use_cache": True}
GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, **RESUMABLE}
# Tokens that a trial generates.
TRIAL_LENGTH = 4
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


def prefilled(
    generate: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
) -> dict[str, Any]:
    """
    Arguments for `generate` on repeated prompts, of which each distinct one has been read once.

    `generate` itself reads them, so that adapters, hooks and precision are those of the generation that follows.
    """
    num_rows = input_ids.size(0)
    prompts = equal_rows(input_ids, attention_mask)
    first = torch.zeros_like(prompts).index_copy_(0, prompts, torch.arange(num_rows, device=prompts.device))
    first = first[: int(prompts.max()) + 1]
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
    # A prompt of one token leaves nothing to read ahead.
    if len(first) < num_rows and int(attention_mask.sum(1).min()) > 1:
        config = copy.deepcopy(generation_config)
        config.update(max_new_tokens=1, min_new_tokens=None, **GREEDY)
        output = generate(
            input_ids=input_ids[first, :-1], attention_mask=attention_mask[first, :-1], generation_config=config
        )
        arguments[CACHE] = repeated(output, prompts, 1 + generation_config.max_new_tokens)
    return arguments


def repeated(output: Any, rows: Tensor, num_new: int) -> Cache:
    """The cache that a generation leaves, with the given rows of it, shape `(M,)`, and room for `num_new` tokens."""
    cache = output.get(CACHE)
    if not isinstance(cache, Cache):
        raise TypeError(f"its generation leaves no cache of keys and values, but {type(cache).__name__}")
    select_rows(cache, rows, num_new)
    return cache


def going_on(output: Any, rows: Tensor, attention_mask: Tensor, num_new: int) -> dict[str, Any]:
    """Arguments for `generate` on the given rows of an interrupted generation, shape `(M,)`, for `num_new` tokens."""
    ids = output.sequences[rows]
    mask = torch.ones_like(ids)
    mask[:, : attention_mask.size(1)] = attention_mask[rows]
    return {"input_ids": ids, "attention_mask": mask, CACHE: repeated(output, rows, 1 + num_new)}


def prefilled_generate(
    model: Any,
    generate: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
) -> Tensor:
    """
    `generate(input_ids=..., attention_mask=..., generation_config=...)`, with one prefill per distinct prompt.

    The logits are those of `generate` on repeated prompts up to rounding, so the samples have the same distribution.
    As long as no row leaves, they are drawn from the same random numbers.

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
    arguments = prefilled(generate, input_ids, attention_mask, generation_config)
    config = copy.deepcopy(generation_config)
    config.update(**RESUMABLE)
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
        unfinished = ~torch.isin(output.sequences[:, width:], eos_token_ids).any(1)
        config.max_new_tokens = width + generation_config.max_new_tokens - output.sequences.size(1)
        if config.max_new_tokens == 0 or not unfinished.any():
            return sequences[:, : output.sequences.size(1)]
        staying = unfinished.nonzero().flatten()
        arguments = going_on(output, staying, attention_mask[rows], config.max_new_tokens)
        rows = rows[staying]


def why_not_as_plain(
    model: Any,
    generate: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
) -> str | None:
    """
    Why a shared prefill does not give the logits of plain generation, tried on two of the given prompts.

    Four tokens are chosen greedily for two copies of each prompt. After two tokens, one copy of each leaves. Every
    process must call this.

    Args:
        model, generate, input_ids, attention_mask, generation_config:
            As in [`prefilled_generate`].

    Returns:
        `str`, *optional*: the reason, or `None` if the logits agree.
    """
    ids, mask = two_prompts(input_ids, attention_mask)
    ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    half = TRIAL_LENGTH // 2
    config = copy.deepcopy(generation_config)
    config.update(max_new_tokens=TRIAL_LENGTH, min_new_tokens=TRIAL_LENGTH, output_logits=True, **GREEDY)

    def compare() -> tuple[Tensor, Tensor, float]:
        plain = generate(input_ids=ids, attention_mask=mask, generation_config=copy.deepcopy(config))
        again = copy.deepcopy(config)
        config.update(max_new_tokens=half, min_new_tokens=half)
        begun = generate(**prefilled(generate, ids, mask, config), generation_config=config)
        staying = torch.tensor([0, 3], device=ids.device)
        with nudged(model, dtype_of(begun[CACHE])):
            noisy = generate(input_ids=ids[staying], attention_mask=mask[staying], generation_config=again)
        ended = generate(**going_on(begun, staying, mask, half), generation_config=config)
        begun.logits = [logits[staying] for logits in begun.logits]
        limit = rounding(relative_error(*same_context([noisy], plain, staying)))
        return *same_context([begun, ended], plain, staying), limit

    with torch.no_grad(), in_evaluation(model):
        return why_not(compare, "logits of a shared prefill")


def same_context(parts: list[Any], plain: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """
    Logits `(M, V)` of a generation in parts, and of the given rows of another, until both chose different tokens.
    """
    found = torch.stack([logits for part in parts for logits in part.logits])
    expected = torch.stack([logits[rows] for logits in plain.logits])
    chosen, others = (out.sequences[:, -len(found) :].T for out in (parts[-1], plain))
    same = (chosen == others[:, rows])[:-1].long()
    comparable = torch.cat([torch.ones_like(same[:1]), same.cumprod(0)]).bool()
    return found[comparable], expected[comparable]


def dtype_of(cache: Cache) -> torch.dtype:
    """Precision in which a model has computed its keys, which autocast decides."""
    keys = next((layer.keys for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)), None)
    return torch.float32 if keys is None else keys.dtype


def two_prompts(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The longest of some prompts and the shortest, of at least two tokens, of which the second has padding."""
    lengths = attention_mask.sum(1)
    pair = torch.stack([lengths.argmax(), lengths.argmin()])
    ids, mask = input_ids[pair], attention_mask[pair].clone()
    if int(lengths.min()) < 3:  # none to take away from
        return ids[:, -1:].repeat(1, 4), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device=ids.device)
    mask[1] *= mask[1].cumsum(0) > 1  # without its first token, there is padding for sure
    return ids, mask


class SharedPrefill:
    """[`prefilled_generate`] in the place of a model's `generate`, once a trial has shown that both agree."""

    def __init__(self) -> None:
        self.is_tried = False
        self.reason: str | None = None

    @contextmanager
    def replacing(self, model: Any) -> Iterator[None]:
        """While open, `model.generate` reads equal prompts once, unless the trial gave a reason against it."""
        generate = model.generate

        def replacement(*args: Any, **arguments: Any) -> Any:
            if args or arguments.keys() != {"input_ids", "attention_mask", "generation_config"}:
                return generate(*args, **arguments)
            if not self.is_tried:
                self.is_tried = True
                self.reason = why_not_as_plain(model, generate, **arguments)
            if self.reason is not None:
                return generate(**arguments)
            return prefilled_generate(model, generate, **arguments)

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
