"""What was meant by a word that is not known."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """
    The known word that looks most like `word`, without regard to case and to `-` for `_`; `None` where none does.

    Args:
        word (`str`):
            As it was typed.
        known (`Iterable[str]`):
            What it may be.
        cutoff (`float`, *optional*, defaults to `0.6`):
            How alike they must be, from 0 to 1.

    Example:
    ```python
    >>> nearest("--Lerning-rate", ["--learning_rate", "--max_steps"])
    '--learning_rate'
    >>> nearest("colour", ["learning_rate", "max_steps"])

    ```
    """
    plain = {item.lower().replace("-", "_"): item for item in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None
