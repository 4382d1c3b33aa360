"""Sequence classification models: load one, and compute its logits or its score of a prompt and a completion."""

import functools
from typing import Any


def model_id(model: Any) -> str:
    """The id or folder of a model: `model` itself, or where the object was loaded from; empty where nobody knows."""
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")


def model_scores(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    completions: list[Any],
    batch_size: int,
    device: Any = None,
    max_length: int | None = None,
) -> Any:
    """
    The first logit of a classifier for each prompt + completion, a tensor `(N,)` in float32 on the CPU.

    The text is made as TRL makes it for a model in `reward_funcs`: without extra special tokens, and through the chat
    template for conversations.
    """
    model = load_classifier(model, device, num_labels=1)
    texts = [
        tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        if isinstance(prompt, list)
        else prompt + completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if max_length is not None:
        ids = [row[-max_length:] for row in ids]
    return classifier_logits(model, tokenizer, ids, batch_size)[:, 0]


def load_classifier(model: Any, device: Any = None, **kwargs: Any) -> Any:
    """The classifier of an id or folder, loaded once for each process and device; a model object as it is."""
    if isinstance(model, str):
        if device is None:
            from accelerate import PartialState

            device = PartialState().device
        return _load(model, str(device), tuple(kwargs.items()))
    return model if device is None else model.to(device)


@functools.cache
def _load(model_id: str, device: str, kwargs: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(model_id, **dict(kwargs)).to(device)


@functools.cache
def load_tokenizer(model_id: str) -> Any:
    """The tokenizer of an id or folder, loaded once for each process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_id)


def classifier_logits(model: Any, tokenizer: Any, ids: list[list[int]], batch_size: int) -> Any:
    """
    Logits `(N, labels)` in float32 on the CPU for the token ids of N rows, `batch_size` rows at a time.

    As in TRL, the model is told the padding token, since it scores the last token that is not padding.
    """
    import torch

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.eval()
    device = next(model.parameters()).device
    logits = []
    with torch.inference_mode():
        for start in range(0, len(ids), batch_size):
            # Nothing at all is read as padding.
            rows = [torch.tensor(row or [tokenizer.pad_token_id]) for row in ids[start : start + batch_size]]
            input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            lengths = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
            output = model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
            logits.append(output.logits.float().cpu())
    return torch.cat(logits)
