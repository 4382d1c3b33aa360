"""Tables for the trackers that take one, as TRL logs its completions."""

import importlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

TRACKERS = ("wandb", "trackio")


def log_table(report_to: Sequence[str] | None, name: str, step: int, rows: list[dict[str, Any]]) -> None:
    """
    Log rows as a table to each tracker of a run that takes one. Only the main process calls this.

    Args:
        report_to (`Sequence[str]`, *optional*):
            Trackers of the run.
        name (`str`):
            Name of the table.
        step (`int`):
            Optimizer steps, the first column.
        rows (`list[dict]`):
            Rows; a dict among their values becomes a column for each key.
    """
    flat = [{"step": step, **{key: v for key, v in row.items() if not isinstance(v, dict)}} for row in rows]
    for line, row in zip(flat, rows, strict=True):
        for part in (value for value in row.values() if isinstance(value, dict)):
            line.update(part)
    for tracker in TRACKERS:
        if tracker not in (report_to or ()):
            continue
        module = importlib.import_module(tracker)
        if tracker == "wandb" and module.run is None:  # it was not begun
            continue
        module.log({name: module.Table(dataframe=pd.DataFrame(flat))})
