"""What the rows of a dataset hold as they are fetched, which its columns need not say: a transform makes rows anew."""

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset

Row = dict[str, Any]

CHUNK = 1000  # rows that are fetched at once


def row_keys(dataset: Dataset) -> list[str]:
    """
    Keys of the rows as they are fetched: those that a transform makes, else the columns of the format.

    Example:

    ```python
    >>> dataset = Dataset.from_dict({"question": ["a", "b"]})
    >>> dataset.set_transform(lambda columns: {"prompt": columns["question"], "level": [1] * len(columns["question"])})
    >>> row_keys(dataset), dataset.column_names
    (['prompt', 'level'], ['question'])

    ```
    """
    return list(dataset.__getitems__([0])[0]) if len(dataset) > 0 else list(dataset.column_names)


def fetched_rows(dataset: Dataset, names: Iterable[str]) -> Iterator[Row]:
    """All rows as the trainer fetches them, with at least those of `names` that they have."""
    if not is_transformed(dataset):  # then columns that nobody asks for, such as images, need not be read
        keys = row_keys(dataset)
        chosen = [name for name in dict.fromkeys(names) if name in keys]
        if not chosen:
            yield from ({} for _ in range(len(dataset)))
            return
        dataset = dataset.select_columns(chosen)
    for start in range(0, len(dataset), CHUNK):
        yield from dataset.__getitems__(list(range(start, min(start + CHUNK, len(dataset)))))


def column_values(dataset: Dataset, name: str) -> list[Any] | None:
    """
    The value of each row under `name`, in Python's own types: what a transform makes of it, else the column's.

    `None` where there is neither.

    Example:

    ```python
    >>> dataset = Dataset.from_dict({"level": [1, 2]})
    >>> column_values(dataset, "level"), column_values(dataset, "other")
    ([1, 2], None)
    >>> dataset.set_transform(lambda columns: {"prompt": ["a"] * len(columns["level"])})
    >>> column_values(dataset, "level")  # not among the keys of the rows, but there
    [1, 2]

    ```
    """
    if is_transformed(dataset) and name in row_keys(dataset):
        return [_plain(row.get(name)) for row in fetched_rows(dataset, [name])]
    if name in dataset.column_names:
        return list(dataset.with_format(None)[name])  # and not as tensors
    return None


def known_names(dataset: Dataset) -> list[str]:
    """Every name that [`column_values`] knows: keys of the rows, then columns that are not among them."""
    return list(dict.fromkeys([*row_keys(dataset), *dataset.column_names]))


def is_transformed(dataset: Dataset) -> bool:
    """Whether a function of the user makes the rows when they are fetched (`set_transform`, `with_transform`)."""
    return bool(getattr(dataset, "format", {}).get("type") == "custom")


def _plain(value: Any) -> Any:
    """A number in place of an array or tensor of one element."""
    size = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
    return value.item() if hasattr(value, "item") and size == 1 else value
