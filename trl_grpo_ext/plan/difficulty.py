"""The difficulty column of a dataset, as levels or as numbers."""

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor

from .columns import column_values, known_names


def check_levels(level_names: Sequence[str]) -> None:
    """Raise `ValueError` unless there are at least two different names."""
    if len(set(level_names)) != len(level_names) or len(level_names) < 2:
        raise ValueError(f"difficulty_levels={level_names} must be at least two different names, from easy to hard")


def read_difficulty(dataset: Dataset, column: str | None, level_names: Sequence[str]) -> list[str] | list[float]:
    """
    Read and check a difficulty column.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training dataset.
        column (`str`):
            Its column with the difficulty, or the key under which a transform puts it into the rows.
        level_names (`Sequence[str]`):
            Names of the levels, from easy to hard.

    Returns:
        `list[str]` or `list[float]`:
            One name or one finite number per row.

    Raises:
        `ValueError`: for a missing column, a row with neither a known name nor a finite number, and one value for all.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> read_difficulty(Dataset.from_dict({"difficulty": ["hard", "easy"]}), "difficulty", ["easy", "hard"])
    ['hard', 'easy']

    ```
    """
    values = None if column is None else column_values(dataset, column)
    if values is None:
        raise ValueError(
            f"difficulty_column={column!r} is not a column of the training dataset, which has "
            f"{known_names(dataset)}: name one of them, or use curriculum='online', which needs none"
        )
    names = set(level_names)
    for row, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (value in names if isinstance(value, str) else is_number):
            raise ValueError(
                f"Row {row} has {column}={value!r}, which is neither a finite number nor one of the levels "
                f"{list(level_names)}: correct it, or name your levels from easy to hard in `difficulty_levels`"
            )
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"Column {column!r} mixes names and numbers: use one kind")
    if len(set(values)) == 1:
        raise ValueError(f"All prompts have {column}={values[0]!r}: a curriculum needs different difficulties")
    return values


def as_numbers(values: list[str] | list[float], level_names: Sequence[str]) -> Tensor:
    """
    Difficulties as numbers, names by their rank.

    Args:
        values (`list[str]` or `list[float]`):
            What [`read_difficulty`] returns.
        level_names (`Sequence[str]`):
            Names of the levels, from easy to hard.

    Returns:
        `torch.Tensor` of shape `(D,)`:
            Numbers, float64.

    Example:

    ```python
    >>> as_numbers(["hard", "easy"], ["easy", "medium", "hard"]).tolist()
    [2.0, 0.0]

    ```
    """
    rank = {name: level for level, name in enumerate(level_names)}
    return torch.tensor([rank[v] if isinstance(v, str) else v for v in values], dtype=torch.float64)


def as_levels(values: list[str] | list[float], level_names: Sequence[str]) -> Tensor:
    """
    Difficulties as levels. Numbers are cut into as many levels as there are names, of equal size where ties allow.

    Args:
        values (`list[str]` or `list[float]`):
            What [`read_difficulty`] returns.
        level_names (`Sequence[str]`):
            Names of the levels, from easy to hard.

    Returns:
        `torch.Tensor` of shape `(D,)`:
            Levels from 0, int64. Equal difficulties share a level.

    Example:

    ```python
    >>> as_levels([0.1, 5.0, 2.0, 9.0], ["easy", "hard"]).tolist()
    [0, 1, 0, 1]

    ```
    """
    numbers = as_numbers(values, level_names)
    if isinstance(values[0], str):
        return numbers.long()
    easier = torch.searchsorted(numbers.sort().values, numbers)
    return easier * len(level_names) // numbers.numel()
