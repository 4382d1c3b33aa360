"""Rewards for harmless answers: by the labelled examples that are shipped, by a classifier, or by a list of words."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..host.sources import check_installed
from .algebra import Leaf
from .embeddings import embed
from .models import classifier_logits, load_classifier, load_tokenizer
from .text import text_of

HEAD = Path(__file__).parent / "data" / "harm_head.npz"  # made by recipes/studies/harm_head.py
_PROFANITY_PACKAGE = "alt-profanity-check"


@dataclass(frozen=True, repr=False)
class Harmlessness(Leaf):
    """
    1 - P(harmful), in [0, 1].

    Without a model, a support vector machine compares the sentence embedding of the answer with labelled examples that
    come with the package: bombs, poison, self-harm, theft, fraud, spying, hate, bullying and the like, and harmless
    texts that sound alike. It is small, English, and made for demonstrations: the docs say how often it is wrong.

    Args:
        model (`str`, *optional*):
            Id or folder of a text classifier, loaded at the first call. Defaults to the shipped examples, which need
            `sentence-transformers` and the embeddings of [`Relevance`].
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
            return [1.0 - harm for harm in harm_of(embed(texts))]
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


@dataclass(frozen=True, repr=False)
class Profanity(Leaf):
    """
    P(profane), in [0, 1], by a linear model over words (English), which sees neither irony nor context.

    Needs the package `alt-profanity-check`, which the extra `profanity` brings.

    Args:
        name (`str`, *optional*, defaults to `"profanity"`):
            Name in the logs.

    Example:
    ```python
    >>> -0.5 * Profanity()
    -0.5 * Profanity()

    ```
    """

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float]:
        _check_profanity_package()
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            install = 'pip install "trl-grpo-ext[profanity]"'
            raise ImportError(f"Profanity needs the package alt-profanity-check: {install}") from error
        return [float(probability) for probability in predict_prob([text_of(completion) for completion in completions])]


@functools.cache
def _check_profanity_package() -> None:
    # It keeps its model as a pickle, which runs code when it is loaded: only that of the wheel.
    check_installed(_PROFANITY_PACKAGE, ".joblib")


def harm_of(embeddings: Any) -> list[float]:
    """P(harmful) of each sentence embedding of length 1, an array `(N, dimensions)`."""
    import numpy as np

    head, (examples_MD, squares_M) = _load_head(), _examples()
    # Squared distances of the answers to the examples, of which rounding has changed the length a little.
    squares = (embeddings**2).sum(1)[:, None] + squares_M[None] - 2 * embeddings @ examples_MD.T
    values = np.exp(-head["gamma"] * squares) @ head["weights"] + head["bias"]
    return [float(value) for value in 1 / (1 + np.exp(-values))]


@functools.cache
def _load_head() -> dict[str, Any]:
    import numpy as np

    with np.load(HEAD) as file:
        return dict(file)


@functools.cache
def _examples() -> tuple[Any, Any]:
    """The examples as numbers, and the square of the length of each."""
    import numpy as np

    head = _load_head()
    examples_MD = head["examples"].astype(np.float32) * head["scale"]
    return examples_MD, (examples_MD**2).sum(1)
