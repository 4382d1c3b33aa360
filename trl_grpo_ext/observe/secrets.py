"""What a record must not hold: tokens, passwords and keys, wherever a configuration may carry them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "…"
# Names of secrets, lower-cased and with underscores. A name that ends in "token" is one, unless it is a special token.
SECRET = re.compile(
    r"secret|passw|passphrase|credential|api_?key|tokens?_?(key|value)"
    r"|(access|private|signing|account|encryption|subscription|shared|ssh)_?key"
    r"|(hub|hf|auth|access|api|write|read|refresh|session|bearer)_?tokens?(_|$)"
    r"|(^|_)(auth|authorization|authentication|cookies?|jwt|pat|pwd|bearer|sig|signature)$"
)
SPECIAL = re.compile(
    r"(bos|eos|eot|eod|pad|unk|sep|cls|mask|image|video|audio|vision|start|end|begin|stop|prefix|suffix|middle|fill"
    r"|turn|user|assistant|system|special|next|last|first|per|new|max|min|num|boi|eoi|placeholder)_?token$"
)
NAMED = re.compile(r"(?P<mark>[?&#;]?)(?P<name>[A-Za-z][\w.\-]*)[\"']?\s*[=:]\s*")  # and the value comes after it
VALUE = re.compile(r"(?:(?i:bearer|basic|digest|token)\s+)?(?:\"[^\"]*\"|'[^']*'|[^\s&;,#}\])\"']+)")
COOKIES = re.compile(r"[^\n\"']+")
USER = re.compile(r"//[^/@\s]+@")
SCHEME = re.compile(r"\b(?:(?i:bearer)\s+|(?i:basic|digest)\s+(?=[\w.~+/\-]*[\d=]))[\w.~+/\-]{6,}=*")
FLAG = re.compile(r"-{0,2}[A-Za-z][\w.\-]*")
# What some services begin their keys with, and the three parts of a JSON web token.
KNOWN = re.compile(
    r"\b(?:hf_|sk[-_]|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA|AIza)[\w\-]{12,}|\beyJ[\w\-]+\.[\w\-]+\.[\w\-]*"
)


def is_secret(name: str) -> bool:
    """
    Whether a name is that of a secret, in any case and with any separators.

    Example:

    ```python
    >>> [is_secret(name) for name in ("hub_token", "X-Api-Key", "AUTHORIZATION", "eos_token", "max_tokens")]
    [True, True, True, False, False]

    ```
    """
    spelled = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return bool(SECRET.search(spelled)) or (spelled.endswith("token") and not SPECIAL.search(spelled))


def without_secrets(value: Any) -> Any:
    """
    Options as plain JSON: secrets left out, other objects as text, NaN and infinity as `None`.

    A secret is what stands under the name of one: in a dictionary, a header, the query of an address, behind a flag, or
    in an assignment within a text. The user of an address and tokens of a known form are hidden wherever they stand.

    Example:

    ```python
    >>> without_secrets({"hub_token": "hf_x", "eos_token": "<eos>", "lr": float("inf"), "kwargs": {"password": "x"}})
    {'eos_token': '<eos>', 'lr': None, 'kwargs': {}}
    >>> without_secrets({"url": "http://me:secret@host:8000/v1?token=abc&page=2"})
    {'url': 'http://host:8000/v1?token=…&page=2'}
    >>> without_secrets([["Authorization", "Bearer abc"], ["--api-key", "abc", "--seed", "1"]])
    [['Authorization', '…'], ['--api-key', '…', '--seed', '1']]

    ```
    """
    if isinstance(value, Mapping):
        named = any(is_secret(v) for k, v in value.items() if str(k).lower() in ("name", "key") and isinstance(v, str))
        shown = {str(k): v for k, v in value.items() if not is_secret(str(k))}
        return {k: HIDDEN if named and k.lower() == "value" else without_secrets(v) for k, v in shown.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return _items(list(value))
    if isinstance(value, int | float | None):
        return finite(value)
    return hide(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def _items(values: Sequence[Any]) -> list[Any]:
    """A list in which what follows the name of a secret is hidden: a header as a pair, a flag of a command."""
    after = [False, *(isinstance(v, str) and FLAG.fullmatch(v) is not None and is_secret(v) for v in values)]
    return [HIDDEN if is_named else without_secrets(v) for v, is_named in zip(values, after, strict=False)]


def hide(text: str) -> str:
    """
    A text in which secrets are replaced by an ellipsis.

    Example:

    ```python
    >>> hide("curl -H 'Authorization: Bearer abc.def' https://host/x?sig=1&n=2")
    "curl -H 'Authorization: …' https://host/x?sig=…&n=2"

    ```
    """

    text = SCHEME.sub(HIDDEN, KNOWN.sub(HIDDEN, USER.sub("//", text)))
    parts, end = [], 0
    for match in NAMED.finditer(text):
        name = match["name"].lower()
        if match.start() < end or not (is_secret(name) or (match["mark"] and name in ("key", "code"))):
            continue
        found = (COOKIES if name.endswith("cookie") else VALUE).match(text, match.end())
        if found is not None:
            quote = found[0][-1] if found[0][-1] in "\"'" else ""
            parts += [text[end : match.end()], quote, HIDDEN, quote]
            end = found.end()
    return "".join([*parts, text[end:]])


def finite(value: float | None) -> float | None:
    """A number that JSON has, or `None`."""
    try:
        return value if value is None or math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None
