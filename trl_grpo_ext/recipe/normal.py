"""Text as rewards and models expect it: no invisible characters that change what is read, and no numbers for text."""

import re
import unicodedata
from typing import Any

# Control characters but tab and line breaks, marks that change the direction of writing, and the mark of byte order.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def is_blank(text: str) -> bool:
    """
    Whether a text shows nothing: it is empty, or holds spaces and invisible characters alone.

    Example:

    ```python
    >>> is_blank(" \\u200b\\n"), is_blank("0")
    (True, False)

    ```
    """
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def without_control(value: Any) -> Any:
    """
    The texts in a value without control characters and marks of direction.

    Args:
        value (`Any`):
            A text, or texts in lists and dicts. All else is returned as it is.

    Example:

    ```python
    >>> without_control([{"role": "user", "content": "a\\x00b\\tc"}])
    [{'role': 'user', 'content': 'ab\\tc'}]

    ```
    """
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, list):
        return [without_control(item) for item in value]
    if isinstance(value, dict):
        return {name: without_control(item) for name, item in value.items()}
    return value


def as_text(value: Any) -> Any:
    """
    A number as it is written, also in lists. All else is returned as it is.

    Example:

    ```python
    >>> as_text([3, 0.5, True, None, "3"])
    ['3', '0.5', 'True', None, '3']

    ```
    """
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return str(value) if isinstance(value, int | float) else value
