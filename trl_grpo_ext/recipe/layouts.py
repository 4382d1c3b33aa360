"""Layouts: how the columns of a set become `prompt` and `reference`. To add one, add an entry to `LAYOUTS`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_SPEAKERS |= {"system": "system"}


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


def from_messages(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row with `messages`: those up to the last answer are the prompt, and the last answer is the reference.

    Args:
        row (`dict`):
            `messages`, a list of `{"role": ..., "content": ...}`.

    Returns:
        `dict`:
            `prompt` and `reference`, which is `None` where the user has the last word.

    Raises:
        `ValueError`: where `messages` is no such list, or holds nothing but an answer.

    Example:

    ```python
    >>> hello = {"role": "user", "content": "Hi!"}
    >>> from_messages({"messages": [hello, {"role": "assistant", "content": "Hello."}]})
    {'prompt': [{'role': 'user', 'content': 'Hi!'}], 'reference': 'Hello.'}

    ```
    """
    return _prompt_and_reference("messages", row["messages"], row["messages"])


def from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of ShareGPT's form: `conversations` is read as `messages` are in [`from_messages`].

    Args:
        row (`dict`):
            `conversations`, a list of `{"from": ..., "value": ...}`, from `"human"`, `"gpt"` or `"system"`.

    Returns:
        `dict`:
            `prompt` and `reference`.

    Raises:
        `ValueError`: where `conversations` is no such list, or somebody else speaks.

    Example:

    ```python
    >>> from_sharegpt({"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]})
    {'prompt': [{'role': 'user', 'content': 'Hi!'}], 'reference': 'Hello.'}

    ```
    """
    said = row["conversations"]
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        return _prompt_and_reference("conversations", said, said)
    messages = []
    for message in said:
        who = message.get("from") or message.get("role")
        if who not in _SPEAKERS:
            raise ValueError(
                f"conversations has a message from {who!r}: only {', '.join(map(repr, _SPEAKERS))} are known; rename "
                "the speaker, or leave the row out"
            )
        content = message.get("value") if "value" in message else message.get("content")
        messages.append({"role": _SPEAKERS[who], "content": content})
    return _prompt_and_reference("conversations", said, messages)


def _prompt_and_reference(column: str, given: Any, messages: Any) -> dict[str, Any]:
    is_list = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(
        message.get("role") and (message.get("content") or message.get("tool_calls")) for message in messages
    ):
        raise ValueError(f"{column}={given!r:.80} is no list of messages, each of which says something: fill it in")
    # Arrow gives each message the keys of all others, with None for those that it lacks.
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    has_reference = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if has_reference else messages
    if not prompt:
        raise ValueError(f"{column}={given!r:.80} holds nothing but an answer: put what the user says before it")
    return {"prompt": prompt, "reference": messages[-1].get("content") if has_reference else None}


@dataclass(frozen=True)
class Layout:
    """
    How a set is laid out: which of its columns become which.

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
    "messages": Layout(("messages",), from_messages),
    "sharegpt": Layout(("conversations",), from_sharegpt),
    "gsm8k": Layout(("question", "answer"), from_gsm8k, config="main"),
    "hh-rlhf": Layout(
        ("chosen", "rejected"),
        from_hh_rlhf,
        # In harmless-base people tried to provoke harm, in helpful-base they wanted help.
        parts={"harmless-base": {"harmful": True}, "helpful-base": {"harmful": False}},
    ),
}
HUB_LAYOUTS = {"openai/gsm8k": "gsm8k", "Anthropic/hh-rlhf": "hh-rlhf"}
