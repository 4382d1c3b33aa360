"""A model with a scalar head as a reward."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .leaves import Leaf

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class RewardModel(Leaf):
    """
    The score of a reward model for prompt and completion: the first logit of a sequence classification model.

    Scores as TRL does when a model is passed to `reward_funcs`: prompt + completion as one text, through the chat
    template for conversations (without `chat_template_kwargs`, which TRL passes on), no extra special tokens, padded on
    the right. A hub id or folder is loaded at the first
    call, once per process and device, and is what gets pickled (not the weights).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `torch.nn.Module`):
            Hub id or folder, or the model itself.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the tokenizer saved with the model.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass.
        device (`str` or `torch.device`, *optional*):
            Defaults to the device of this training process for an id, and for a model object to where it is.
        max_length (`int`, *optional*):
            Longest input in tokens. Longer ones lose their beginning, so that the completion's end is always scored.
        name (`str`, *optional*, defaults to the last part of the model's id):
            Name in the logs.

    Example:
    ```python
    >>> RewardModel("org/my-reward-model").__name__
    'my-reward-model'

    ```
    """

    model: Any
    tokenizer: Any = None
    batch_size: int = field(default=16, kw_only=True)
    device: Any = field(default=None, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"RewardModel: batch_size={self.batch_size} scores nothing: pass at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"RewardModel: max_length={self.max_length} leaves no token: pass at least 1, or None")
        if self.tokenizer is None and not _model_id(self.model):
            raise ValueError(
                f"RewardModel: {type(self.model).__name__} does not say where it was loaded from: pass tokenizer=..."
            )

    @property
    def default_name(self) -> str:
        return _model_id(self.model).rstrip("/").split("/")[-1] or type(self.model).__name__

    def _constructor(self) -> str:
        text = super()._constructor()
        return text if isinstance(self.model, str) else text.replace(repr(self.model), f"<{type(self.model).__name__}>")

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> "torch.Tensor":
        model = load_classifier(self.model, self.device, num_labels=1)
        tokenizer = load_tokenizer(_model_id(self.model)) if self.tokenizer is None else self.tokenizer
        texts = [
            tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            if isinstance(prompt, list)
            else prompt + completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if self.max_length is not None:
            ids = [row[-self.max_length :] for row in ids]
        return classifier_logits(model, tokenizer, ids, self.batch_size)[:, 0]


def _model_id(model: Any) -> str:
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")


def load_classifier(model: Any, device: Any = None, **kwargs: Any) -> Any:
    """The sequence classification model for an id or folder, loaded once per process and device; objects stay."""
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
    """The tokenizer for an id or folder, loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_id)


def classifier_logits(model: Any, tokenizer: Any, ids: list[list[int]], batch_size: int) -> "torch.Tensor":
    """
    Logits `(N, labels)` in float32 on the CPU for token ids `ids` of N rows, `batch_size` rows at a time.

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
