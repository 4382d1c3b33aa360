"""Untrusted text: what a model, a dataset or a file name may contain, made safe to show."""

import json
import math
import unicodedata
from typing import Any

# Characters that a reader cannot see, or that change the order in which he sees the others.
_HIDDEN = [*range(0x80, 0xA0), 0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)]
_HIDDEN += [0xFEFF, *range(0xE0000, 0xE0080)]
_JOINERS = {0x200C, 0x200D}  # some scripts and emoji are not readable without them
_VISIBLE = {code: f"⟨U+{code:04X}⟩" for code in _HIDDEN if code not in _JOINERS}
_VISIBLE |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "␡"}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # lone surrogates, which UTF-8 cannot write


def visible(text: Any) -> str:
    """
    `text` with control characters, direction marks and other invisible characters spelled out.

    Args:
        text (`Any`):
            Text, or anything with a `str`.

    Returns:
        `str`:
            Text that UTF-8 can write, and that neither a terminal nor a browser takes for an instruction to reorder,
            hide or overwrite anything. Line breaks and tabs are kept.

    Example:

    ```python
    >>> visible("a\\x1b[2J" + chr(0x202E) + "b")
    'a␛[2J⟨U+202E⟩b'

    ```
    """
    return str(text).translate(_VISIBLE)


def one_line(text: Any, limit: int = 200) -> str:
    """`text` for a title or a label: visible, white space folded, and cut after `limit` characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def message_text(value: Any) -> str:
    """
    A prompt or completion as plain text: the text itself, or the messages of a conversation below each other.

    Example:

    ```python
    >>> message_text([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> print(message_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    system: Be brief.
    user: Hi

    ```
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return str(value)
    parts = [(str(message.get("role", "")), _content(message)) for message in value]
    if len(parts) == 1:
        return parts[0][1]
    return "\n".join(f"{role}: {content}" for role, content in parts)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # blocks of text, images and so on
        blocks = [block for block in content if isinstance(block, dict)]
        content = " ".join(str(block.get("text") or f"[{block.get('type')}]") for block in blocks)
    calls = message.get("tool_calls")
    return ("" if content is None else str(content)) + (f" [calls {calls}]" if calls else "")


def json_for_html(value: Any) -> str:
    """
    JSON that can stand inside `<script type="application/json">`: no text in it ends the element or starts another.

    Strings are made [`visible`]; what is not finite becomes `null`.

    Example:

    ```python
    >>> json_for_html({"text": "</script><b>", "value": float("nan")})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e","value":null}'

    ```
    """
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {visible(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else visible(value)


def file_name(text: str) -> str:
    """`text` as the name of a file: lower case letters, digits and underscores."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return "_".join("".join(c if c.isalnum() else " " for c in ascii_text).split()) or "figure"
