"""Layouts of sets on the hub that the recipes know: how `prompt` and `reference` are made of what is there."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def from_gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of GSM8K (arXiv 2110.14168): the number behind `####` is the reference, the steps before it the difficulty.

    Args:
        row (`dict`):
            `question` and `answer`, the latter with one step a line and then `#### 42`.

    Returns:
        `dict`:
            `prompt`, `reference` (the number, without the commas of thousands) and `difficulty` (number of steps).

    Raises:
        `ValueError`: where `answer` has no `####`.

    Example:

    ```python
    >>> from_gsm8k({"question": "How many?", "answer": "2*500=<<2*500=1000>>1000\\n#### 1,000"})
    {'prompt': 'How many?', 'reference': '1000', 'difficulty': 1}

    ```
    """
    steps, mark, number = (row["answer"] or "").rpartition("####")
    if not mark:
        raise ValueError(f"answer={row['answer']!r:.80} has no '####' before the number: is this the layout of gsm8k?")
    lines = [line for line in steps.splitlines() if line.strip()]
    return {"prompt": row["question"], "reference": number.strip().replace(",", ""), "difficulty": len(lines)}


def from_hh_rlhf(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of HH-RLHF (arXiv 2204.05862): the conversation up to the last answer, and the preferred last answer.

    Args:
        row (`dict`):
            `chosen` and `rejected`, each one text of the form `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Returns:
        `dict`:
            `prompt` (messages, the last one of the user) and `reference` (the last answer of `chosen`).

    Raises:
        `ValueError`: where `chosen` is no such conversation with an answer at its end.

    Example:

    ```python
    >>> from_hh_rlhf({"chosen": "\\n\\nHuman: Hi!\\n\\nAssistant: Hello.", "rejected": ""})
    {'prompt': [{'role': 'user', 'content': 'Hi!'}], 'reference': 'Hello.'}

    ```
    """
    _, *parts = _TURN.split(row["chosen"] or "")
    messages = [
        {"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise ValueError(
            f"chosen={row['chosen']!r:.80} is no conversation of 'Human:' and 'Assistant:' that ends with an answer: "
            "is this the layout of hh-rlhf?"
        )
    return {"prompt": messages[:-1], "reference": messages[-1]["content"]}


@dataclass(frozen=True)
class Layout:
    """
    How a set is laid out.

    Args:
        columns (`tuple[str, ...]`, *optional*):
            Columns that `convert` reads, and replaces by those it makes.
        convert (`Callable`, *optional*):
            From a row to `prompt`, `reference` and others.
        config (`str`, *optional*):
            Configuration to load where none is named.
        parts (`dict[str, dict]`, *optional*):
            Folders of the set to read, with the columns that all rows of each get.
    """

    columns: tuple[str, ...] = ()
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    config: str | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


LAYOUTS = {
    "gsm8k": Layout(("question", "answer"), from_gsm8k, config="main"),
    "hh-rlhf": Layout(
        ("chosen", "rejected"),
        from_hh_rlhf,
        # In harmless-base people tried to provoke harm, in helpful-base they wanted help.
        parts={"harmless-base": {"harmful": True}, "helpful-base": {"harmful": False}},
    ),
}
HUB_LAYOUTS = {"openai/gsm8k": "gsm8k", "Anthropic/hh-rlhf": "hh-rlhf"}
