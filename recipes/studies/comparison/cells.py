"""A comparison is made of cells, one training each: a file for each, so that it can stop anywhere and go on."""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Work = Callable[[dict[str, Any]], dict[str, Any]]
Done = Callable[[dict[str, Any]], None]


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
        workers (`int`, *optional*, defaults to `1`):
            How many run at a time.
    """

    def __init__(self, folder: Path, work: Work, workers: int = 1):
        self.folder, self.work, self.workers = folder, work, workers
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:10]
        words = [str(cell[key]) for key in ("pool", "method", "seed", "learning_rate", "rollouts") if key in cell]
        return self.folder / f"{re.sub(r'[^a-z0-9.]+', '-', '_'.join(words).lower())}_{digest}.json"

    def run(self, cells: list[dict[str, Any]], done: Done | None = None) -> list[dict[str, Any]]:
        """
        Run cells, `workers` of them at a time.

        Args:
            cells (`list[dict]`):
                Their settings.
            done (`Callable[[dict], None]`, *optional*):
                Called with the record of each, as soon as it is there.

        Returns:
            `list[dict]`:
                The record of each cell, in the order of `cells`: `cell`, and `result` or `error`.
        """
        records: dict[int, dict[str, Any]] = {}
        running: dict[Connection, tuple[int, BaseProcess]] = {}
        waiting = deque(range(len(cells)))
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    index = waiting.popleft()
                    record = self._kept(cells[index])
                    if record is None:
                        receiver, child = _start(self.work, cells[index])
                        running[receiver] = index, child
                        continue
                    records[index] = record
                    if done:
                        done(record)
                ready = multiprocessing.connection.wait(list(running), None if running else 0)
                for receiver in [receiver for receiver in running if receiver in ready]:
                    index, child = running.pop(receiver)
                    records[index] = self._keep(cells[index], _finish(receiver, child))
                    if done:
                        done(records[index])
        finally:  # where this process is stopped, nobody is left to keep what the others find
            for _, child in running.values():
                child.kill()
                child.join()
        return [records[index] for index in range(len(cells))]

    def _kept(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        path = self.path(cell)
        record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": ""}
        return None if "error" in record else record

    def _keep(self, cell: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
        record = {"cell": cell, **outcome}
        write_whole(self.path(cell), lambda part: part.write_text(json.dumps(record, indent=1)))
        return record


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there with all its content or not at all, even if another process writes the same one."""
    part = path.with_suffix(f".{os.getpid()}.part")
    write(part)
    os.replace(part, path)


def _start(work: Work, cell: dict[str, Any]) -> tuple[Connection, BaseProcess]:
    """A cell in a forked process, which shares no state with the others and may crash without taking them along."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(work, cell, sender))
    child.start()
    sender.close()
    return receiver, child


def _finish(receiver: Connection, child: BaseProcess) -> dict[str, Any]:
    try:
        outcome: dict[str, Any] = receiver.recv()
    except EOFError:
        child.join()
        outcome = {"error": f"the process ended with exit code {child.exitcode} before it had a result"}
    child.join()
    receiver.close()
    return outcome


def _report(work: Work, cell: dict[str, Any], sender: Connection) -> None:
    try:
        record: dict[str, Any] = {"result": work(cell)}
    except Exception:
        record = {"error": traceback.format_exc()}
    sender.send(record)
    sender.close()
