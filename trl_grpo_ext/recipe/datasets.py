"""Prompts for the recipes: a shipped set, a local file or folder, or a set on the hub, in one form."""

import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset

from .layouts import HUB_LAYOUTS, LAYOUTS, Layout

logger = logging.getLogger(__name__)

SHIPPED = {name: files(__package__) / "data" / f"{name}.jsonl" for name in ("harmless", "helpful", "multi_turn")}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # a list of messages, as text
HOLD_OUT_EVERY = 10


def load_prompts(
    name: str = "helpful",
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    layout: str | None = None,
    columns: Sequence[str] = (),
    max_test: int | None = None,
    streaming: bool = False,
) -> DatasetDict | dict[str, Dataset | IterableDataset]:
    """
    Load prompts as the splits `train` and `test`, each with a conversational `prompt` column.

    Rows that repeat the prompt (and the `turns`, where there are any) of an earlier row are dropped, and so are
    training rows whose prompt is held out; a warning says how many. The same arguments give the same rows in the same
    order.

    Args:
        name (`str`, *optional*, defaults to `"helpful"`):
            `"helpful"` (240 questions with a reference answer and a difficulty), `"harmless"` (256 harmful and harmless
            requests with a reference answer and a column `harmful`) or `"multi_turn"` (63 conversations with `turns`
            and a `reference` for each turn), all shipped with the package; a local `.jsonl`, `.json`, `.csv` or
            `.parquet` file; or a folder, or the id of a dataset on the hub, as [`~datasets.load_dataset`] takes them.
        config (`str`, *optional*):
            Configuration of a hub dataset. Defaults to that of the layout, if it has one.
        train_split (`str`, *optional*, defaults to `"train"`):
            Name of the split to train on. In a local file, a column `split` may hold such names.
        test_split (`str`, *optional*, defaults to `"test"`):
            Name of the held-out split. Where there is none, every tenth training prompt is held out (with `streaming`,
            the first `max_test` prompts).
        layout (`str`, *optional*):
            How to make `prompt` and `reference` of other columns: `"gsm8k"` or `"hh-rlhf"`. The sets `openai/gsm8k` and
            `Anthropic/hh-rlhf` have theirs without being told.
        columns (`Sequence[str]`, *optional*):
            Columns that must be there besides `prompt`.
        max_test (`int`, *optional*):
            Most held-out prompts: evenly spaced ones are kept (with `streaming`, the first ones).
        streaming (`bool`, *optional*, defaults to `False`):
            Whether `train` is an [`~datasets.IterableDataset`], read while it is used. The trainer refuses it where
            group sizes, a curriculum, dynamic sampling or a rollout choose rows.

    Returns:
        [`~datasets.DatasetDict`], or a `dict` with `streaming`:
            `train` and `test`. A `prompt` that is plain text becomes one user message; other columns are kept.

    Raises:
        `ValueError`: for an unknown layout or file ending, a missing split or column, or a row without a prompt (with
            `streaming`, when that row is read).

    Example:

    ```python
    >>> prompts = load_prompts("helpful")
    >>> len(prompts["train"]), len(prompts["test"]), sorted(prompts["train"].column_names)
    (192, 48, ['difficulty', 'prompt', 'reference'])

    ```
    """
    layout = layout or HUB_LAYOUTS.get(name)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use one of {', '.join(map(repr, LAYOUTS))}")
    if max_test is not None and max_test < 1:
        raise ValueError(f"max_test={max_test} holds nothing out: pass at least 1")
    form = LAYOUTS[layout] if layout else Layout()
    splits = _read(str(SHIPPED.get(name, name)), config or form.config, form, streaming)
    if train_split not in splits:
        raise ValueError(f"{name!r} has no split {train_split!r}, only {sorted(splits)}: name one of them")
    train, test = splits[train_split], splits.get(test_split)
    rows = _Rows(name, form, tuple(columns))
    if streaming:
        return _stream(rows, train, test, max_test)
    if test is None:
        held_out = range(0, len(train), HOLD_OUT_EVERY)
        test, train = train.select(held_out), train.select([i for i in range(len(train)) if i % HOLD_OUT_EVERY])
    seen: set[str] = set()
    test = rows.distinct(rows.convert(test), seen)
    train = rows.distinct(rows.convert(train), seen)
    if max_test is not None and max_test < len(test):
        test = test.select([i * len(test) // max_test for i in range(max_test)])
    return DatasetDict(train=train, test=test)


class _Rows:
    """What happens to the rows of one set: brought into form, checked, and without repetitions."""

    def __init__(self, name: str, layout: Layout, columns: tuple[str, ...]):
        self.name, self.layout, self.columns = name, layout, columns

    def convert(self, dataset: Dataset) -> Dataset:
        self.check_columns(dataset.column_names, self.layout.columns or ("prompt",))
        dataset = dataset.map(self.in_form, with_indices=True, remove_columns=list(self.layout.columns))
        self.check_columns(dataset.column_names, self.columns)
        return dataset

    def in_form(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """One row with a checked, conversational prompt."""
        if self.layout.convert is not None:
            try:
                made = self.layout.convert(row)
            except ValueError as error:
                raise ValueError(f"Row {number} of {self.name!r}: {error}") from None
            row = {**{key: value for key, value in row.items() if key not in self.layout.columns}, **made}
        prompt = row["prompt"]
        if not prompt:
            raise ValueError(f"Row {number} of {self.name!r} has no prompt: remove it or fill it in")
        if isinstance(prompt, list):
            is_prompt = all(isinstance(message, dict) and "role" in message for message in prompt)
        else:
            is_prompt = isinstance(prompt, str)
        if not is_prompt:
            raise ValueError(
                f"Row {number} of {self.name!r} has the prompt {prompt!r:.80}: write text or a list of messages"
            )
        if isinstance(prompt, str) and MESSAGES.match(prompt):
            raise ValueError(
                f"Row {number} of {self.name!r} has a list of messages written as text, {prompt:.80}: write it as a "
                "list, which JSONL and Parquet can hold and CSV cannot"
            )
        return {**row, "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}

    def distinct(self, dataset: Dataset, seen: set[str]) -> Dataset:
        """The rows whose prompt is not among `seen`, to which theirs are added."""
        keep = []
        for number, key in enumerate(map(_key, dataset)):
            if key not in seen:
                seen.add(key)
                keep.append(number)
        dropped = len(dataset) - len(keep)
        if not dropped:
            return dataset
        logger.warning(
            "%r: dropped %d of %d rows, whose prompts occur before or are held out", self.name, dropped, len(dataset)
        )
        return dataset.select(keep)

    def stream(self, source: IterableDataset, held_out: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
        """One pass over a stream. It remembers the prompts that went by."""
        seen = set(held_out)
        for number, row in enumerate(source):
            if number == 0:
                self.check_columns(list(row), self.layout.columns or ("prompt",))
            row = self.in_form(row, number)
            if number == 0:
                self.check_columns(list(row), self.columns)
            if _key(row) not in seen:
                seen.add(_key(row))
                yield row

    def check_columns(self, found: Sequence[str], needed: Sequence[str]) -> None:
        for column in needed:
            if column not in found:
                which = "the one with the prompts" if column == "prompt" else "the one that holds it, or add it"
                raise ValueError(f"{self.name!r} has no column {column!r}, only {list(found)}: rename {which}")


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["prompt"], row.get("turns")], sort_keys=True, default=str)


def _stream(
    rows: _Rows, train: IterableDataset, test: IterableDataset | None, max_test: int | None
) -> dict[str, Dataset | IterableDataset]:
    if test is None:
        if max_test is None:
            raise ValueError(f"{rows.name!r} has no test split, so set max_test: that many prompts are held out")
        test, train = train.take(max_test), train.skip(max_test)
    elif max_test is not None:
        test = test.take(max_test)
    if next(iter(train), None) is None:
        raise ValueError(
            f"{rows.name!r} has no row to train on besides the {max_test} that are held out: lower max_test, or leave "
            "streaming off"
        )
    held_out = list(rows.stream(test))
    keys = [_key(row) for row in held_out]
    return {
        "train": IterableDataset.from_generator(functools.partial(rows.stream, train, keys)),
        "test": Dataset.from_list(held_out),
    }


def _read(path: str, config: str | None, layout: Layout, streaming: bool) -> dict[str, Any]:
    ending = os.path.splitext(path)[1]
    if not os.path.isfile(path):
        if ending in FORMATS:
            raise ValueError(f"There is no file {path!r}: check the path")
        if not layout.parts:
            return dict(load_dataset(path, config, streaming=streaming))
        return _read_parts(path, layout, streaming)
    if ending not in FORMATS:
        raise ValueError(f"{path!r} ends in {ending!r}: use one of {', '.join(FORMATS)}")
    try:
        rows = load_dataset(FORMATS[ending], data_files=path, split="train", streaming=streaming)
        first: dict[str, Any] = next(iter(rows), {})
    except Exception as error:  # datasets, pyarrow and pandas each raise their own
        reason = (str(error.__cause__ or error).splitlines() or [""])[0]
        raise ValueError(f"{path!r} cannot be read as {ending}: {reason}") from error
    if "split" not in first:
        return {"train": rows}
    return _by_split(rows, path)


def _read_parts(path: str, layout: Layout, streaming: bool) -> dict[str, Any]:
    """The folders of a set together, with the columns that each has by being what it is."""
    found: dict[str, list[Any]] = {}
    for folder, extra in layout.parts.items():
        for split, rows in load_dataset(path, data_dir=folder, streaming=streaming).items():
            labelled = rows.map(functools.partial(_with_columns, extra=extra))
            found.setdefault(split, []).append(labelled)
    # A stream takes turns, since nobody shuffles it as a whole, and ends with its shorter part.
    join = interleave_datasets if streaming else concatenate_datasets
    return {split: join(parts) for split, parts in found.items()}


def _with_columns(row: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {**row, **extra}


def _by_split(rows: Any, path: str) -> dict[str, Any]:
    """The splits that the column `split` of a file names."""
    names = [row["split"] for row in rows.select_columns("split")]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"The column 'split' of {path!r} holds more than names: write 'train' and 'test' into it")
    if isinstance(rows, IterableDataset):
        return {name: rows.filter(_is_in, fn_kwargs={"name": name}).remove_columns("split") for name in set(names)}
    index = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
    return {name: rows.select(own).remove_columns("split") for name, own in index.items()}


def _is_in(row: dict[str, Any], name: str) -> bool:
    split: str = row["split"]
    return split == name
