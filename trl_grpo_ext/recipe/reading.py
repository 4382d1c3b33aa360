"""Where prompts are read from: files, folders and the hub, with the number that each row has there."""

import contextlib
import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from ..host.nearest import nearest
from .layouts import Layout

Row = dict[str, Any]

SHIPPED = {name: files(__package__) / "data" / f"{name}.jsonl" for name in ("harmless", "helpful", "multi_turn")}
FORMATS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Place:
    """
    Where rows are, in words for errors.

    Args:
        name (`str`):
            What the user named.
        split (`str`, *optional*):
            The split or folder of it in which rows are counted.
        file (`str`, *optional*):
            Text file in which lines are counted.
    """

    name: str
    split: str | None = None
    file: str | None = None

    def of_row(self, number: int) -> str:
        """The row with this number from 0, in words: in a text file by its line, of which the first is 1."""
        line = None
        if self.file is not None:
            with contextlib.suppress(csv.Error, UnicodeError):  # stricter than what read the file
                line = next(itertools.islice(line_numbers(self.file), number, None), None)
        if line is not None:
            return f"Line {line} of {self.name!r}"
        split = "" if self.split is None else f"{self.split!r} of "
        return f"Row {number} (from 0) of {split}{self.name!r}"


@dataclass(frozen=True)
class Part:
    """
    Rows of one place that belong to one split.

    Args:
        rows ([`~datasets.Dataset`], or an iterable of rows that starts over each time):
            Rows.
        place ([`Place`]):
            Where they are.
        numbers (`Sequence[int]`, *optional*):
            Their numbers there. Defaults to 0, 1, ...
        split (`str`, *optional*):
            Only the rows whose column `split` says so are meant.
        extra (`dict`, *optional*):
            Columns that all of them get.
    """

    rows: Any
    place: Place
    numbers: Sequence[int] | None = None
    split: str | None = None
    extra: Row = field(default_factory=dict)

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers."""
        numbers = itertools.count() if self.numbers is None else iter(self.numbers)
        for number, row in zip(numbers, self.rows, strict=False):
            if self.split is None:
                yield number, {**row, **self.extra}
            elif row["split"] == self.split:
                yield number, {**{name: value for name, value in row.items() if name != "split"}, **self.extra}

    def select(self, positions: Sequence[int]) -> "Part":
        """Of a [`~datasets.Dataset`], the rows at these positions."""
        numbers = range(len(self.rows)) if self.numbers is None else self.numbers
        return replace(self, rows=self.rows.select(positions), numbers=[numbers[i] for i in positions])


@dataclass(frozen=True)
class JsonRows:
    """
    The objects in a JSON file, one a line or all in one list.

    Read here and not by `datasets`, which takes texts that look like dates or numbers for dates and numbers.
    """

    path: str
    name: str

    def __iter__(self) -> Iterator[Row]:
        if is_json_list(self.path):
            with open(self.path, encoding="utf-8-sig") as file:
                for number, value in enumerate(json.load(file)):
                    yield _json_object(value, Place(self.name).of_row(number))
            return
        with open(self.path, encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    try:
                        value = json.loads(text)
                    except ValueError as error:
                        raise ValueError(f"Line {line} of {self.name!r} is no JSON: {error}") from None
                    yield _json_object(value, f"Line {line} of {self.name!r}")


def _json_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is {value!r:.80}: write an object, such as {{"prompt": "..."}}')
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a pair of surrogates, which is no text: write the character") from None
    return value


def is_json_list(path: str) -> bool:
    """Whether a JSON file is one list, and not an object a line."""
    with open(path, encoding="utf-8-sig") as file:
        for text in file:
            if text.strip():
                return text.lstrip().startswith("[")
    return False


def line_numbers(path: str) -> Iterator[int]:
    """The line at which each row of a text file begins; none where rows are not lines."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if not path.endswith(".csv"):
            if not is_json_list(path):
                yield from (line for line, text in enumerate(file, start=1) if text.strip())
            return
        raw: list[str] = []  # the lines of a row
        reader, start, is_header = csv.reader(_noted(file, raw)), 1, True
        for _ in reader:
            if any(text.strip() for text in raw):  # others are skipped
                if not is_header:
                    yield start
                is_header = False
            start += len(raw)
            raw.clear()


def _noted(lines: Iterable[str], raw: list[str]) -> Iterator[str]:
    for line in lines:
        raw.append(line)
        yield line


def read(
    name: str, config: str | None, layout: Layout, streaming: bool, text_columns: Sequence[str]
) -> dict[str, list[Part]]:
    """
    The splits of a set, each in one part or several.

    Args:
        name (`str`):
            A shipped set, a file, a folder or the id of a dataset on the hub.
        config (`str`, *optional*), layout ([`Layout`]), streaming (`bool`):
            As in [`~trl_grpo_ext.recipe.datasets.load_prompts`].
        text_columns (`Sequence[str]`):
            Columns of a CSV file that are text, even if all of their values look like numbers.

    Raises:
        `ValueError`: where there is no such set, or a file cannot be read.
    """
    path = path_of(name)
    if os.path.isfile(path):
        return _read_file(path, name, streaming, text_columns)
    found: dict[str, list[Part]] = {}
    for folder in layout.parts or [None]:
        try:
            splits = load_dataset(path, config, data_dir=folder, streaming=streaming)
        except Exception as error:  # datasets and the hub's client raise many kinds
            raise ValueError(_why_not_loaded(name, path, error)) from error
        for split, rows in splits.items():
            place = Place(name, split if folder is None else f"{folder}, {split}")
            found.setdefault(split, []).append(Part(rows, place, extra=layout.parts[folder] if folder else {}))
    return found


def path_of(name: str) -> str:
    """
    Where a set is: a file, a folder, or the id that the hub is asked about.

    Raises `ValueError` for a path at which nothing is, and for a shipped set misspelt.
    """
    path = os.path.expanduser(str(SHIPPED.get(name, name)))
    if os.path.exists(path):
        return path
    looked = f"There is no file or folder {name!r} (looked for {os.path.abspath(path)})"
    if name.startswith((".", "~", "/", "\\")) or os.path.isabs(path) or path.endswith(FORMATS) or name.count("/") > 1:
        raise ValueError(f"{looked}: check the path, or use a shipped set: {_shipped()}")
    near = nearest(name, SHIPPED, cutoff=0.75)
    if near and "/" not in name:
        raise ValueError(f"{looked}: did you mean {near!r}? The shipped sets are {_shipped()}")
    return path


def _why_not_loaded(name: str, path: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if os.path.isdir(path):
        return f"The folder {name!r} ({os.path.abspath(path)}) cannot be read as a dataset: {reason}"
    return (
        f"{name!r} is none of the shipped sets {_shipped()}, no file or folder (looked for {os.path.abspath(path)}), "
        f"and could not be loaded from the hub: {reason}"
    )


def _shipped() -> str:
    return ", ".join(map(repr, SHIPPED))


def _read_file(path: str, name: str, streaming: bool, text_columns: Sequence[str]) -> dict[str, list[Part]]:
    ending = os.path.splitext(path)[1]
    if ending not in FORMATS:
        raise ValueError(f"{name!r} ends in {ending!r}: use one of {', '.join(FORMATS)}")
    rows: Any
    try:
        if ending == ".parquet":
            rows = load_dataset("parquet", data_files=path, split="train", streaming=streaming)
        elif ending == ".csv":
            # Only an empty cell is a missing value: "NA" and "None" are texts too.
            options: dict[str, Any] = {"converters": dict.fromkeys(text_columns, str), "keep_default_na": False}
            rows = load_dataset("csv", data_files=path, split="train", streaming=streaming, na_values=[""], **options)
        else:
            rows = JsonRows(path, name)
            rows = rows if streaming else _as_dataset(list(rows), text_columns)
        first: Row = next(iter(rows), {})
    except Exception as error:  # datasets, pyarrow and pandas each raise their own
        if isinstance(error, ValueError) and repr(name) in str(error):
            raise
        reason = (str(error.__cause__ or error).splitlines() or [""])[0]
        raise ValueError(f"{name!r} cannot be read as {ending}: {reason}") from error
    if not first:
        raise ValueError(f"{name!r} holds no rows: write at least one prompt into it")
    place = Place(name, file=None if ending == ".parquet" else path)
    if "split" not in first:
        return {"train": [Part(rows, place)]}
    return _by_split(rows, place)


def _as_dataset(rows: list[Row], text_columns: Sequence[str]) -> Dataset:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name in text_columns:
        kinds = {type(value) for value in columns.get(name, [])}
        if str in kinds and kinds & {int, float, bool}:  # a column has one type
            columns[name] = [str(value) if isinstance(value, int | float) else value for value in columns[name]]
    return Dataset.from_dict(columns)


def _by_split(rows: Any, place: Place) -> dict[str, list[Part]]:
    """The splits that the column `split` of a file names."""
    names = [
        row["split"] for row in (rows.select_columns("split") if isinstance(rows, Dataset | IterableDataset) else rows)
    ]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"The column 'split' of {place.name!r} holds more than names: write 'train' and 'test' into it"
        )
    if not isinstance(rows, Dataset):
        return {name: [Part(rows, place, split=name)] for name in dict.fromkeys(names)}
    whole = Part(rows.remove_columns("split"), place)
    return {
        name: [whole.select([i for i, other in enumerate(names) if other == name])] for name in dict.fromkeys(names)
    }
