"""Prompts for the recipes: the shipped set, a local file or a set on the hub, in one form."""

import os
from importlib.resources import files

from datasets import Dataset, DatasetDict, load_dataset

SHIPPED = {name: files("trl_grpo_ext") / "data" / f"{name}.jsonl" for name in ("helpful", "multi_turn")}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    name: str = "helpful", *, config: str | None = None, train_split: str = "train", test_split: str = "test"
) -> DatasetDict:
    """
    Load prompts as the splits `train` and `test`, each with a conversational `prompt` column.

    Args:
        name (`str`, *optional*, defaults to `"helpful"`):
            `"helpful"` (240 questions with a reference answer and a difficulty) or `"multi_turn"` (63 conversations
            with `turns` and a `reference` for each turn), both shipped with the package, a local `.jsonl`, `.json`,
            `.csv` or `.parquet` file, or the id of a dataset on the hub.
        config (`str`, *optional*):
            Configuration of a hub dataset.
        train_split (`str`, *optional*, defaults to `"train"`):
            Name of the split to train on. In a local file, a column `split` may hold such names.
        test_split (`str`, *optional*, defaults to `"test"`):
            Name of the held-out split. Where there is none, every tenth training prompt is held out.

    Returns:
        [`~datasets.DatasetDict`]:
            `train` and `test`. A `prompt` that is plain text becomes one user message; other columns are kept.

    Raises:
        `ValueError`: for an unknown file ending, a missing split or column, or a row without a prompt.

    Example:

    ```python
    >>> prompts = load_prompts("helpful")
    >>> len(prompts["train"]), len(prompts["test"]), sorted(prompts["train"].column_names)
    (192, 48, ['difficulty', 'prompt', 'reference'])

    ```
    """
    splits = _read(str(SHIPPED.get(name, name)), config)
    if train_split not in splits:
        raise ValueError(f"{name!r} has no split {train_split!r}, only {sorted(splits)}: name one of them")
    train, test = splits[train_split], splits.get(test_split)
    if test is None:
        held_out = range(0, len(train), 10)
        test, train = train.select(held_out), train.select([i for i in range(len(train)) if i % 10])
    return DatasetDict(train=_conversational(train, name), test=_conversational(test, name))


def _read(path: str, config: str | None) -> dict[str, Dataset]:
    if not os.path.isfile(path):
        if os.path.splitext(path)[1] in FORMATS:
            raise ValueError(f"There is no file {path!r}: check the path")
        return dict(load_dataset(path, config))
    ending = os.path.splitext(path)[1]
    if ending not in FORMATS:
        raise ValueError(f"{path!r} ends in {ending!r}: use one of {', '.join(FORMATS)}")
    try:
        rows = load_dataset(FORMATS[ending], data_files=path, split="train")
    except Exception as error:  # datasets, pyarrow and pandas each raise their own
        reason = (str(error.__cause__ or error).splitlines() or [""])[0]
        raise ValueError(f"{path!r} cannot be read as {ending}: {reason}") from error
    if "split" not in rows.column_names:
        return {"train": rows}
    names = rows["split"]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"The column 'split' of {path!r} holds more than names: write 'train' and 'test' into it")
    index = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
    return {name: rows.select(own).remove_columns("split") for name, own in index.items()}


def _conversational(dataset: Dataset, name: str) -> Dataset:
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name!r} has no column 'prompt', only {dataset.column_names}: rename the one with the prompts"
        )
    prompts = list(dataset["prompt"])
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Row {row} of {name!r} has no prompt: remove it or fill it in")
        if not isinstance(prompt, str | list):
            raise ValueError(f"Row {row} of {name!r} has the prompt {prompt!r:.80}: write text or a list of messages")
    if not isinstance(prompts[0], str):
        return dataset
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
