"""What guards a leaf against slowness and failure: a time limit, retries, rows at once, processes of its own.

A guarded leaf is asked about each row alone, so that a bad row costs nothing but itself. Every attempt that went wrong
is counted by its kind, and either leads to a retry or gives the row up, so per call
`failures + timeouts + garbage = retries + rows given up`.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from .processes import Workers
from .scoring import Job, RowError, is_missing_package, only_value

# Not the generator of the training, whose numbers must not depend on how often a server fails.
_JITTER = random.Random()


@dataclass(frozen=True)
class Guard:
    """
    How a leaf is asked about its rows; set by the methods of [`Reward`].

    Args:
        timeout (`float`, *optional*):
            Seconds for one attempt at one row.
        retries (`int`, *optional*, defaults to `0`):
            Attempts after the first.
        wait (`float`, *optional*, defaults to `1.0`):
            Longest pause before the first retry, in seconds; doubles with each.
        max_wait (`float`, *optional*, defaults to `30.0`):
            Longest pause before any retry.
        at_once (`int`, *optional*, defaults to `16`):
            Rows at once of an async leaf.
        processes (`int`, *optional*):
            Processes for a sync leaf; in this one when `None`.
    """

    timeout: float | None = None
    retries: int = 0
    wait: float = 1.0
    max_wait: float = 30.0
    at_once: int = 16
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout={self.timeout} is no time limit: pass seconds above 0")
        if self.retries < 0:
            raise ValueError(f"retry: times={self.retries} is negative: pass 0 or more")
        if not 0 <= self.wait <= self.max_wait < math.inf:
            raise ValueError(
                f"retry: wait={self.wait} must lie in [0, max_wait={self.max_wait}], and max_wait be finite: lower "
                "wait, or raise max_wait"
            )
        if self.at_once < 1:
            raise ValueError(f"concurrency: limit={self.at_once} asks about no row: pass at least 1")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"in_processes: count={self.processes} scores nothing: pass at least 1")

    def changed(self, leaf: Any, is_async: bool, method: str, changes: dict[str, Any]) -> "Guard":
        """This guard with what `method` of [`Reward`] sets. Raises `TypeError` where it cannot work with `leaf`."""
        if is_async and method == "in_processes":
            raise TypeError(f"reward {leaf.name!r} is async and waits instead of computing: use .concurrency(limit)")
        if not is_async and method == "concurrency":
            raise TypeError(f"reward {leaf.name!r} is not async: use .in_processes(count), or make it `async def`")
        if not is_async and method == "timeout" and self.processes is None:
            raise TypeError(
                f"reward {leaf.name!r} is not async, and only a process can be stopped: use "
                f".in_processes(count, timeout={changes['timeout']})"
            )
        if method == "in_processes":
            Workers.check(leaf)
        return replace(self, **changes)

    def pause(self, attempt: int) -> float:
        """Seconds before retry number `attempt`, from 1: exponential backoff with full jitter."""
        return _JITTER.uniform(0.0, min(self.max_wait, self.wait * 2.0 ** min(attempt - 1, 100)))

    def source(self) -> str:
        """The calls that make this guard of none."""
        default = {item.name: item.default for item in fields(self)}
        text = ""
        if self.processes is not None:
            text += f".in_processes({self.processes}, timeout={self.timeout})"
        elif self.timeout is not None:
            text += f".timeout({self.timeout})"
        if (self.retries, self.wait, self.max_wait) != (0, default["wait"], default["max_wait"]):
            waits = {"wait": self.wait, "max_wait": self.max_wait}
            given = "".join(f", {name}={value}" for name, value in waits.items() if value != default[name])
            text += f".retry({self.retries}{given})"
        if self.at_once != default["at_once"] or not text:
            text += f".concurrency({self.at_once})"
        return text


def run(leaf: Any, job: Job) -> Any:
    """What `leaf.score` returned or raised for the rows of `job`; for a guarded leaf a list of that, row by row."""
    guard: Guard | None = leaf.guard
    if not job.rows:
        return []
    if guard is None:
        try:
            return leaf.score(**job.call)
        except Exception as error:
            return _given_back(error)
    ask = _Rows(guard, job)
    if guard.processes is not None:
        return ask.in_processes(leaf)
    answers = [ask.retrying(index, lambda call: _answer(leaf.score, call)) for index in range(len(job.rows))]
    ask.log_columns()
    return answers


async def run_async(leaf: Any, job: Job) -> Any:
    """The same for an async leaf."""
    guard: Guard | None = leaf.guard
    if not job.rows:
        return []
    if guard is None:
        try:
            return await leaf.score(**job.call)
        except Exception as error:
            return _given_back(error)
    return await _Rows(guard, job).awaiting(leaf.score)


class _Rows:
    """One call of a guarded leaf: the rows as calls of one row each, and what went wrong with them, in `job.tally`."""

    def __init__(self, guard: Guard, job: Job):
        self.guard, self.job = guard, job
        self.columns: dict[str, list[Any]] = {}  # for the completions table, filled by rows in any order

    def call_of(self, index: int) -> dict[str, Any]:
        count = len(self.job.rows)
        call = {
            name: [value[index]] if isinstance(value, list | tuple) and len(value) == count else value
            for name, value in self.job.call.items()
        }
        if call.get("log_extra"):

            def log_extra(column: str, values: list[Any]) -> None:
                self.columns.setdefault(column, [None] * count)[index] = values[0]

            call["log_extra"] = log_extra
        return call

    def count(self, answer: Any, tally: Counter[str], attempt: int) -> bool:
        """Count what is wrong with `answer`, and whether to ask again."""
        if not isinstance(answer, Exception):
            return False
        tally[answer.kind if isinstance(answer, RowError) else "failures"] += 1
        if attempt == self.guard.retries:
            return False
        tally["retries"] += 1
        return True

    def retrying(self, index: int, ask: Callable[[dict[str, Any]], Any], tally: Counter[str] | None = None) -> Any:
        """The last answer of `ask` about a row: a value, or the exception."""
        call, attempt = self.call_of(index), 0
        while self.count(answer := ask(call), self.job.tally if tally is None else tally, attempt):
            attempt += 1
            time.sleep(self.guard.pause(attempt))
        return answer

    def in_processes(self, leaf: Any) -> list[Any]:
        guard = self.guard
        assert guard.processes is not None
        assert guard.timeout is not None
        tallies = [Counter[str]() for _ in self.job.rows]  # one per row, because threads do not count together

        def score_row(index: int) -> Any:
            return self.retrying(index, lambda call: leaf._workers.ask(leaf, call, guard.timeout), tallies[index])

        answers: list[Any] = leaf._workers.map(guard.processes, score_row, len(self.job.rows))
        self.job.tally.update(sum(tallies, Counter()))
        return answers

    async def awaiting(self, score: Callable[..., Awaitable[Any]]) -> list[Any]:
        places = asyncio.Semaphore(self.guard.at_once)

        async def one(index: int) -> Any:
            async with places:
                call, attempt = self.call_of(index), 0
                timeout, tally = self.guard.timeout, self.job.tally
                while self.count(answer := await _answer_in_time(score, call, timeout), tally, attempt):
                    attempt += 1
                    await asyncio.sleep(self.guard.pause(attempt))
                return answer

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(self.job.rows))]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one raised, which only a missing package does
                task.cancel()
        self.log_columns()
        return answers

    def log_columns(self) -> None:
        for column, values in self.columns.items():
            self.job.call["log_extra"](column, values)


def _answer(score: Callable[..., Any], call: dict[str, Any]) -> Any:
    try:
        return only_value(score(**call))
    except Exception as error:
        return _given_back(error)


def _given_back(error: Exception) -> Exception:
    if is_missing_package(error):
        raise error
    return error


async def _answer_in_time(score: Callable[..., Awaitable[Any]], call: dict[str, Any], timeout: float | None) -> Any:
    async def ask() -> Any:
        return await score(**call)

    task = asyncio.ensure_future(ask())
    try:
        # Not `wait_for`, which waits for a reward that does not let itself be cancelled.
        await asyncio.wait({task}, timeout=timeout)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda late: late.cancelled() or late.exception())  # else asyncio complains
    if not task.done():
        return RowError(f"no answer within {timeout:g} s", "timeouts")
    if task.cancelled():
        return RowError("it was cancelled")
    error = task.exception()
    if error is not None:
        if not isinstance(error, Exception):
            raise error
        return _given_back(error)
    try:
        return only_value(task.result())
    except RowError as garbage:
        return garbage
