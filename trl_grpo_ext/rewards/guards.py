"""Slow and failing rewards: a time limit, retries, a limit on rows at once, processes of their own, a cache.

A guarded leaf is asked about each row alone, so that a bad row costs nothing but itself. Each attempt that goes wrong
is counted by its kind, and leads to a retry or gives the row up. So for each call,
`failures + timeouts + garbage = retries + rows given up`.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Literal, TypeVar

from ..host.calls import is_async
from .errors import RowError, stops_the_run
from .processes import Workers
from .scoring import Job, only_value

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
            Longest pause before the first retry, in seconds. It doubles with each retry.
        max_wait (`float`, *optional*, defaults to `30.0`):
            Longest pause before any retry.
        at_once (`int`, *optional*, defaults to `16`):
            Most rows that an async leaf is asked about at once.
        processes (`int`, *optional*):
            Processes for a sync leaf; `None` runs it in the process of the training.
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

    def changed(self, leaf: Any, method: str, changes: dict[str, Any]) -> "Guard":
        """This guard with what `method` of [`Reward`] sets. Raises `TypeError` where `leaf` cannot have it."""
        waits = is_async(leaf)
        if waits and method == "in_processes":
            raise TypeError(f"reward {leaf.name!r} is async and waits instead of computing: use .concurrency(limit)")
        if not waits and method == "concurrency":
            raise TypeError(f"reward {leaf.name!r} is not async: use .in_processes(count), or make it `async def`")
        if not waits and method == "timeout" and self.processes is None:
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
        """The methods that make this guard, as Python."""
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


R = TypeVar("R")  # the kind of reward that the methods return: `Reward`


class LeafSettings(Generic[R]):
    """The methods that set a cache, a limit, or what errors do, on each leaf of a reward."""

    def map_leaves(self, change: Callable[[Any], Any]) -> R:
        """The same tree with every leaf replaced by `change(leaf)`."""
        raise NotImplementedError

    def cached(self, max_size: int = 10_000) -> R:
        """
        Remember values, for deterministic rewards that are expensive to compute.

        A composite caches each of its leaves, so that schedules keep moving. The key of a value is the prompt, the
        completion, its token ids and all dataset columns of the row. A cached reward is called with the rows that it
        does not know. It does not get `trainer_state`, `environments`, `log_metric` and `log_extra`, since its value
        must depend on the row alone. Remembered values are not pickled.

        Args:
            max_size (`int`, *optional*, defaults to `10_000`):
                Most values to keep for each leaf. The least recently used ones go first.
        """
        if max_size < 1:
            raise ValueError(f"cached: max_size={max_size} keeps nothing: pass at least 1")
        return self.map_leaves(lambda leaf: replace(leaf, cache_size=max_size))

    def on_error(self, action: Literal["raise", "skip"]) -> R:
        """
        What happens when a leaf raises or returns something that is no finite number.

        Args:
            action (`str`):
                `"raise"` stops the run with a [`RewardError`]. `"skip"` makes the offending rows `None`, warns, and
                counts them in the metric `rewards/{name}/errors`; a reward that raises when asked about all rows at
                once loses all of them. `"skip"` is the default after `timeout`, `retry`, `concurrency` or
                `in_processes`, and else `"raise"`. A missing package and a signature that TRL cannot call always stop
                the run.
        """
        if action not in ("raise", "skip"):
            raise ValueError(f'on_error: {action!r} is unknown: choose "raise" or "skip"')
        return self.map_leaves(lambda leaf: replace(leaf, errors=action))

    def timeout(self, seconds: float) -> R:
        """
        Limit the time of an async reward. A row without an answer in time is given up. Each row is asked about alone.

        Args:
            seconds (`float`):
                For one attempt at one row. A reward that does not await cannot be stopped: run it with
                [`in_processes`][trl_grpo_ext.rewards.Reward.in_processes].

        Raises:
            `TypeError`: for a sync reward that does not run in processes.
        """
        return self._guarded("timeout", timeout=float(seconds))

    def retry(self, times: int, wait: float = 1.0, max_wait: float = 30.0) -> R:
        """
        Ask again about a row where the reward raised, took too long or returned no number.

        Each row is asked about alone, and each attempt gets its own copy of the row.

        The pause before the `n`-th retry is drawn uniformly from 0 to `min(max_wait, wait * 2 ** (n - 1))` seconds, so
        that rows that failed together are not asked about again together.

        Args:
            times (`int`):
                Most retries of a row.
            wait (`float`, *optional*, defaults to `1.0`):
                Longest pause before the first retry, in seconds.
            max_wait (`float`, *optional*, defaults to `30.0`):
                Longest pause before any retry, in seconds.
        """
        return self._guarded("retry", retries=times, wait=float(wait), max_wait=float(max_wait))

    def concurrency(self, limit: int) -> R:
        """
        Ask an async reward about each row alone, about at most `limit` of them at once.

        Args:
            limit (`int`):
                Most rows at once, for each process of the training. Without this method, the limit is 16.

        Raises:
            `TypeError`: for a sync reward.
        """
        return self._guarded("concurrency", at_once=limit)

    def in_processes(self, count: int, timeout: float = 60.0) -> R:
        """
        Run a sync reward in processes of its own, a row at a time. A call that hangs or crashes costs only its row.

        The reward must be picklable: its function has to stand at the top of a module. A script that uses this method
        needs `if __name__ == "__main__":`. The reward gets the dataset columns, but not `trainer_state`,
        `environments`, `log_metric` and `log_extra`. Processes start at the first call, are kept, and are replaced when
        they die. They contain accidents, and are no sandbox for hostile code.

        Args:
            count (`int`):
                Processes for each process of the training.
            timeout (`float`, *optional*, defaults to `60.0`):
                Seconds for one attempt at one row. After that, the process is killed, with all that it started.

        Raises:
            `TypeError`: for an async reward, and for one that cannot be pickled.
        """
        return self._guarded("in_processes", processes=count, timeout=float(timeout))

    def _guarded(self, method: str, **changes: Any) -> R:
        return self.map_leaves(lambda leaf: replace(leaf, guard=(leaf.guard or Guard()).changed(leaf, method, changes)))


def run(leaf: Any, job: Job) -> Any:
    """
    What `leaf.score` returns for the rows of `job`, or the exception that it raises.

    A guarded leaf gives a list, with a value or an exception for each row.
    """
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
    """The same as `run`, for an async leaf."""
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
    """One call of a guarded leaf, row by row. What goes wrong is counted in `job.tally`."""

    def __init__(self, guard: Guard, job: Job):
        self.guard, self.job = guard, job
        self.columns: dict[str, list[Any]] = {}  # of the completions table; rows fill them in any order

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
        """Count what is wrong with `answer`, and say whether to ask again."""
        if not isinstance(answer, Exception):
            return False
        tally[answer.kind if isinstance(answer, RowError) else "failures"] += 1
        if attempt == self.guard.retries:
            return False
        tally["retries"] += 1
        return True

    def retrying(self, index: int, ask: Callable[[dict[str, Any]], Any], tally: Counter[str] | None = None) -> Any:
        """The last answer of `ask` about a row: a value or an exception."""
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
            for task in tasks:  # where one raised what stops the run
                task.cancel()
        self.log_columns()
        return answers

    def log_columns(self) -> None:
        for column, values in self.columns.items():
            self.job.call["log_extra"](column, values)


def _ask_why(task: "asyncio.Task[Any]") -> None:
    """Look at how a task ended that nobody waits for, or asyncio prints that nobody did."""
    if not task.cancelled():
        task.exception()


def _answer(score: Callable[..., Any], call: dict[str, Any]) -> Any:
    try:
        return only_value(score(**call))
    except Exception as error:
        return _given_back(error)


def _given_back(error: Exception) -> Exception:
    if stops_the_run(error):
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
        task.add_done_callback(_ask_why)
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
