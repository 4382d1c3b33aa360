"""Prompts for the recipes, in one form, whatever file, folder or set on the hub they come from."""

import functools
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets

from ..host.nearest import nearest
from .layouts import HUB_LAYOUTS, LAYOUTS, Layout
from .normal import as_text, is_blank, without_control
from .reading import SHIPPED, Part, Place, Row, read

__all__ = ["SHIPPED", "in_one", "load_prompts"]

logger = logging.getLogger(__name__)

MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # a list of messages, as text
HOLD_OUT_EVERY = 10
TEXTS = ("prompt", "turns", "reference")
# What was done to a row, in words, by its bit in the column NOTES.
CLEANED, NUMBERS = 1, 2
NOTES = "__notes"
# `Dataset.map` makes text that looks like numbers numbers again, where the column of that name had numbers.
NEW_REFERENCE = "__reference"
SAID = {
    CLEANED: "removed control characters and marks of direction from the texts",
    NUMBERS: "read the numbers in the column 'reference' as text",
}


def load_prompts(
    name: str = "helpful",
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    layout: str | None = None,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    system_prompt: str | None = None,
    columns: Sequence[str] = (),
    max_test: int | None = None,
    streaming: bool = False,
) -> DatasetDict | dict[str, Dataset | IterableDataset]:
    """
    Load prompts as the splits `train` and `test`, each with a conversational `prompt` column.

    Rows that repeat the prompt (and the `turns`, where there are any) of an earlier row are dropped, and so are
    training rows whose prompt is held out. Control characters and marks of direction are removed from texts, and
    numbers in the column `reference` become text. Warnings say how many rows that concerns. The same arguments give
    the same rows in the same order.

    Args:
        name (`str`, *optional*, defaults to `"helpful"`):
            `"helpful"` (240 questions with a reference answer and a difficulty), `"harmless"` (256 harmful and harmless
            requests with a reference answer and a column `harmful`) or `"multi_turn"` (63 conversations with `turns`
            and a `reference` for each turn), all shipped with the package; a local `.jsonl`, `.json`, `.csv` or
            `.parquet` file; or a folder, or the id of a dataset on the hub, as [`~datasets.load_dataset`] takes them.
            `./helpful` is a path.
        config (`str`, *optional*):
            Configuration of a hub dataset. Defaults to that of the layout, if it has one.
        train_split (`str`, *optional*, defaults to `"train"`):
            Name of the split to train on. In a local file, a column `split` may hold such names.
        test_split (`str`, *optional*, defaults to `"test"`):
            Name of the held-out split. Where there is none, every tenth training prompt is held out (with `streaming`,
            the first `max_test` prompts).
        layout (`str`, *optional*):
            How to make `prompt` and `reference` of other columns: `"messages"` and `"sharegpt"` (conversations, whose
            last answer is the reference), `"gsm8k"` or `"hh-rlhf"`. The sets `openai/gsm8k` and `Anthropic/hh-rlhf`
            have theirs without being told.
        prompt_column (`str`, *optional*):
            Column with the prompts. It takes the place of `prompt`.
        reference_column (`str`, *optional*):
            Column with the references. It takes the place of `reference`.
        system_prompt (`str`, *optional*):
            What the system says first in each prompt, in place of what a row's own system message says.
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
        `ValueError`: for a set that cannot be found or read, an unknown layout, a missing split or column, or a row
            without a prompt (with `streaming`, when that row is read).

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
    if layout is not None and prompt_column is not None:
        raise ValueError(
            f"prompt_column={prompt_column!r} and layout={layout!r} both make the prompt: pass one of them"
        )
    if system_prompt is not None and is_blank(system_prompt):
        raise ValueError(f"system_prompt={system_prompt!r} says nothing: leave it out")
    form = LAYOUTS[layout] if layout else Layout()
    rows = _Rows(name, form, prompt_column, reference_column, system_prompt, tuple(columns))
    splits = read(name, config or form.config, form, streaming, rows.text_columns)
    if train_split not in splits:
        raise ValueError(f"{name!r} has no split {train_split!r}, only {sorted(splits)}: name one of them")
    train, test = splits[train_split], splits.get(test_split)
    left = sorted(set(splits) - {train_split})
    if test is None and left:
        logger.warning("%r has no split %r, and %s are not used: name one as test_split", name, test_split, left)
    if streaming:
        return _stream(rows, train, test, max_test)
    if test is None:
        train, test = _hold_out(train)
    seen: set[str] = set()
    held_out = rows.distinct(rows.convert(test), seen)
    kept = rows.distinct(rows.convert(train), seen)
    if max_test is not None and max_test < len(held_out):
        held_out = held_out.select([i * len(held_out) // max_test for i in range(max_test)])
    return DatasetDict(train=kept, test=held_out)


@dataclass(frozen=True)
class _Rows:
    """What happens to the rows of one set: brought into form, checked, and without repetitions."""

    name: str
    layout: Layout
    prompt_column: str | None = None
    reference_column: str | None = None
    system_prompt: str | None = None
    columns: tuple[str, ...] = ()
    told: set[int] = field(default_factory=set, compare=False)  # notes that a stream has told

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that must be there before a row is brought into form."""
        renamed = () if self.reference_column is None else (self.reference_column,)
        return (*(self.layout.columns or (self.prompt_column or "prompt",)), *renamed)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns whose values are text, even if they look like numbers."""
        return tuple(dict.fromkeys((*self.needed, "prompt", "reference")))

    def convert(self, parts: list[Part]) -> Dataset:
        """The rows of several parts in form, as one dataset."""
        return concatenate_datasets([self._converted(part) for part in parts])

    def _converted(self, part: Part) -> Dataset:
        dataset: Dataset = part.rows
        self.check_columns(dataset.column_names, self.needed)
        told = {"place": part.place, "numbers": part.numbers, "extra": part.extra}
        replaced = [name for name in (*self.layout.columns, "reference") if name in dataset.column_names]
        dataset = dataset.map(
            self._in_form_with_notes, with_indices=True, fn_kwargs=told, remove_columns=replaced, desc="Prompts"
        )
        if len(dataset) == 0:
            return dataset
        if NEW_REFERENCE in dataset.column_names:
            dataset = dataset.rename_column(NEW_REFERENCE, "reference")
        noted, dataset = list(dataset[NOTES]), dataset.remove_columns(NOTES)
        self.check_columns(dataset.column_names, self.columns)
        numbers = range(len(dataset)) if part.numbers is None else part.numbers
        for note, what in SAID.items():
            places = [number for number, notes in zip(numbers, noted, strict=True) if notes & note]
            if places:
                logger.warning(
                    "%r: %s of %d rows, the first being %s", self.name, what, len(places), part.place.of_row(places[0])
                )
        self._warn_of_numbers(part.place, dataset[0])
        return dataset

    def _warn_of_numbers(self, place: Place, row: Row) -> None:
        if place.file is None or not place.file.endswith(".csv"):
            return
        for name in self.columns:
            value = row[name]
            if isinstance(value, int | float) and not isinstance(value, bool):
                logger.warning(
                    "%r: the column %r holds numbers such as %r, and not text: compare it with numbers, or name it as "
                    "reference_column",
                    self.name,
                    name,
                    value,
                )

    def _in_form_with_notes(
        self, row: Row, position: int, place: Place, numbers: Sequence[int] | None, extra: Row
    ) -> Row:
        number = position if numbers is None else numbers[position]
        row, notes = self.in_form({**row, **extra}, place, number)
        return {{"reference": NEW_REFERENCE}.get(name, name): value for name, value in row.items()} | {NOTES: notes}

    def in_form(self, row: Row, place: Place, number: int) -> tuple[Row, int]:
        """One row with a checked, conversational prompt; and what was done to it."""

        def refuse(problem: str) -> ValueError:
            return ValueError(f"{place.of_row(number)} {problem}")

        if self.layout.convert is not None:
            try:
                made = self.layout.convert(row)
            except ValueError as error:
                raise ValueError(f"{place.of_row(number)}: {error}") from None
            row = {**{key: value for key, value in row.items() if key not in self.layout.columns}, **made}
        for name, column in {"prompt": self.prompt_column, "reference": self.reference_column}.items():
            if column is not None:
                row = {**row, name: row[column]}
        cleaned = {name: without_control(row[name]) for name in TEXTS if name in row}
        notes = CLEANED if any(cleaned[name] != row[name] for name in cleaned) else 0
        row = {**row, **cleaned}
        if "reference" in row:
            text = as_text(row["reference"])
            notes |= NUMBERS if text != row["reference"] else 0
            row["reference"] = text
            if "reference" in self.columns and (text is None or (isinstance(text, str) and is_blank(text))):
                raise refuse("has no reference, which the reward reads: fill it in or remove the row")
        problem = _problem(row["prompt"], row.get("turns"))
        if problem is not None:
            raise refuse(problem)
        return {**row, "prompt": self._messages(row["prompt"])}, notes

    def _messages(self, prompt: Any) -> list[Row]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is None:
            return messages
        own = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.system_prompt}, *own]

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

    def stream(
        self, parts: list[Part], held_out: Collection[str] = (), start: int = 0, stop: int | None = None
    ) -> Iterator[Row]:
        """One pass over the rows from `start` to `stop` of a stream. It remembers the prompts that went by."""
        seen = set(held_out)
        for position, (place, number, row) in enumerate(itertools.islice(_in_turn(parts), start, stop)):
            if position == 0:
                self.check_columns(list(row), self.needed)
            row, notes = self.in_form(row, place, number)
            if position == 0:
                self.check_columns(list(row), self.columns)
                self._warn_of_numbers(place, row)
            for note, what in SAID.items():
                if notes & note and note not in self.told:
                    self.told.add(note)
                    logger.warning("%r: %s, first of %s", self.name, what, place.of_row(number))
            if _key(row) not in seen:
                seen.add(_key(row))
                yield row

    def check_columns(self, found: Sequence[str], needed: Iterable[str]) -> None:
        """Raise `ValueError` for a column that is missing, with what helps."""
        for column in needed:
            if column not in found:
                raise ValueError(
                    f"{self.name!r} has no column {column!r}, only {list(found)}: {self._help(found, column)}"
                )

    def _help(self, found: Sequence[str], column: str) -> str:
        if len(found) == 1 and re.search(r"\w[;|\t]", found[0]):
            return "separate the columns by commas"
        fitting = [name for name, other in LAYOUTS.items() if other.columns and set(other.columns) <= set(found)]
        if fitting and column in ("prompt", "reference"):
            return f"pass layout={fitting[0]!r} (--dataset_layout {fitting[0]}), which makes it of those"
        if column == "prompt":
            return "name the one with the prompts as prompt_column (--prompt_column)"
        if column == "reference":
            return "name the one with the references as reference_column (--reference_column), or add it"
        if near := nearest(column, found):
            return f"did you mean {near!r}?"
        return "rename the one that holds it, or add it"


def _problem(prompt: Any, turns: Any) -> str | None:
    """What is wrong with a prompt or the turns after it, as the end of a sentence; `None` where nothing is."""
    if prompt is None or (isinstance(prompt, list) and not prompt) or (isinstance(prompt, str) and is_blank(prompt)):
        return "has no prompt: remove it or fill it in"
    if isinstance(prompt, str) and MESSAGES.match(prompt):
        return (
            f"has a list of messages written as text, {prompt:.80}: write it as a list, which JSONL and Parquet can "
            "hold and CSV cannot"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(item, dict) and item.get("role") for item in messages):
        return f"has the prompt {prompt!r:.80}: write text or a list of messages"
    if any(message["role"] == "user" and _says_nothing(message.get("content")) for message in messages):
        return f"has the prompt {prompt!r:.80}, in which the user says nothing: remove it or fill it in"
    if isinstance(turns, list) and any(map(_says_nothing, turns)):
        return f"has the turns {turns!r:.80}, in one of which the user says nothing: remove it or fill it in"
    return None


def _says_nothing(content: Any) -> bool:
    return not content or (isinstance(content, str) and is_blank(content))


def _key(row: Row) -> str:
    return json.dumps([row["prompt"], row.get("turns")], sort_keys=True, default=str)


def _hold_out(parts: list[Part]) -> tuple[list[Part], list[Part]]:
    """The parts without every tenth row of them all, and those rows."""
    kept, held_out, before = [], [], 0
    for part in parts:
        positions = range(len(part.rows))
        kept.append(part.select([i for i in positions if (before + i) % HOLD_OUT_EVERY]))
        held_out.append(part.select([i for i in positions if (before + i) % HOLD_OUT_EVERY == 0]))
        before += len(part.rows)
    return kept, held_out


def _in_turn(parts: list[Part]) -> Iterator[tuple[Place, int, Row]]:
    """A row of each part in turn, since nobody shuffles a stream as a whole, until the shortest ends."""
    for rows in zip(*(part.numbered() for part in parts), strict=False):
        for part, (number, row) in zip(parts, rows, strict=True):
            yield part.place, number, row


def _stream(
    rows: _Rows, train: list[Part], test: list[Part] | None, max_test: int | None
) -> dict[str, Dataset | IterableDataset]:
    start = 0
    if test is None:
        if max_test is None:
            raise ValueError(f"{rows.name!r} has no test split, so set max_test: that many prompts are held out")
        test, start = train, max_test
    if next(itertools.islice(_in_turn(train), start, None), None) is None:
        raise ValueError(
            f"{rows.name!r} has no row to train on besides the {max_test} that are held out: lower max_test, or leave "
            "streaming off"
        )
    held_out = list(rows.stream(test, stop=max_test))
    keys = [_key(row) for row in held_out]
    return {
        "train": IterableDataset.from_generator(functools.partial(rows.stream, train, keys, start)),
        "test": Dataset.from_list(held_out),
    }


def in_one(parts: Mapping[str, Dataset], column: str) -> Dataset:
    """
    Several sets in one, with a column that names the one that each row is of.

    Example:

    ```python
    >>> parts = {"math": Dataset.from_dict({"prompt": ["1 + 1?"]}), "chat": Dataset.from_dict({"prompt": ["Hi", "Ho"]})}
    >>> in_one(parts, "task")["task"][:]
    ['math', 'chat', 'chat']

    ```
    """
    return concatenate_datasets([rows.add_column(column, [name] * len(rows)) for name, rows in parts.items()])
