"""A comparison is made of cells, one training each: a file for each, so that it can stop anywhere and go on."""

import hashlib
import json
import multiprocessing
import os
import re
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Work = Callable[[dict[str, Any]], dict[str, Any]]


class Cells:
    """
    Runs cells, each in a process of its own, and keeps what they give.

    A cell is the settings of one training. Its file is named after a hash of all of them, so a result is never taken
    for that of other settings. What is there is not run again; what failed is there with its error, and is tried again
    at the next start.

    Args:
        folder (`Path`):
            Where the files are.
        work (`Callable[[dict], dict]`):
            Runs a cell and returns its result, which JSON can hold.
    """

    def __init__(self, folder: Path, work: Work):
        self.folder, self.work = folder, work
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:10]
        words = [str(cell[key]) for key in ("pool", "method", "seed", "learning_rate", "rollouts") if key in cell]
        return self.folder / f"{re.sub(r'[^a-z0-9.]+', '-', '_'.join(words).lower())}_{digest}.json"

    def run(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The record of a cell: `cell`, and `result` or `error`."""
        path = self.path(cell)
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text())
            if "error" not in record:
                return record
        record = dict(cell=cell, **in_child(self.work, cell))
        part = path.with_suffix(f".{os.getpid()}.part")  # another process may run the same cell
        part.write_text(json.dumps(record, indent=1))
        os.replace(part, path)
        return record


def in_child(work: Work, cell: dict[str, Any]) -> dict[str, Any]:
    """Run a cell in a forked process, which shares no state with the next and may crash without taking others along."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(work, cell, sender))
    child.start()
    sender.close()
    try:
        record: dict[str, Any] = receiver.recv()
    except EOFError:
        child.join()
        record = {"error": f"the process ended with exit code {child.exitcode} before it had a result"}
    child.join()
    return record


def _report(work: Work, cell: dict[str, Any], sender: Connection) -> None:
    try:
        record: dict[str, Any] = {"result": work(cell)}
    except Exception:
        record = {"error": traceback.format_exc()}
    sender.send(record)
    sender.close()
