"""One leaf's call, from TRL's keyword arguments to checked values: what to score, what came back, what to remember."""

import hashlib
import logging
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

logger = logging.getLogger(__name__)

# What TRL passes besides the rows. A cached value must not depend on these.
_NOT_OF_THE_ROW = ("trainer_state", "environments", "log_metric", "log_extra")


class RewardError(ValueError):
    """A reward raised, or returned something that is no list of finite numbers and `None`, one per completion."""


class Memory(OrderedDict):
    """The least recently used values of one leaf. Pickles and deep-copies as an empty one."""

    def __reduce__(self):
        return Memory, ()

    def recall(self, key: Any, default: Any = None) -> Any:
        """The value under `key`, now the most recently used one."""
        if key not in self:
            return default
        self.move_to_end(key)
        return self[key]

    def remember(self, key: Any, value: Any, max_size: int) -> None:
        """Keep `value`, and drop the least recently used values beyond `max_size`."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > max_size:
            self.popitem(last=False)


@dataclass(frozen=True)
class Job:
    """What a leaf has to score: one key per row of TRL's call, which `rows` are not `known`, and a `call` for those."""

    call: dict[str, Any]
    rows: list[int]
    keys: list[Any]
    known: dict[Any, float | None]

    def run(self, score: Callable) -> Any:
        """What `score` returns, or the exception it raised."""
        if not self.rows:
            return []
        try:
            return score(**self.call)
        except ImportError:  # a missing package is for the user to install, never for `on_error` to skip
            raise
        except Exception as error:
            return error

    async def run_async(self, score: Callable) -> Any:
        """The same for an async `score`."""
        if not self.rows:
            return []
        try:
            return await score(**self.call)
        except ImportError:
            raise
        except Exception as error:
            return error


def begin(leaf: Any, call: dict[str, Any]) -> Job:
    """The job for `leaf`: all rows, or with a cache one row for each value that it does not hold."""
    count = len(call["completions"])
    if leaf.cache_size is None:
        return Job(call=call, rows=list(range(count)), keys=list(range(count)), known={})
    call = {name: value for name, value in call.items() if name not in _NOT_OF_THE_ROW}
    columns = {name: value for name, value in call.items() if isinstance(value, list | tuple) and len(value) == count}
    others = {name: value for name, value in call.items() if name not in columns}
    keys = [_key({name: column[row] for name, column in columns.items()} | others) for row in range(count)]
    unknown = object()
    known = {key: value for key in set(keys) if (value := leaf._memory.recall(key, unknown)) is not unknown}
    rows = sorted({key: row for row, key in reversed(list(enumerate(keys))) if key not in known}.values())
    new_rows = {name: [column[row] for row in rows] for name, column in columns.items()}
    return Job(call=new_rows | others, rows=rows, keys=keys, known=known)


def settle(leaf: Any, call: dict[str, Any], job: Job, outcome: Any) -> list[float | None]:
    """The leaf's values for all rows of `call`, once `outcome` has come back for the rows of `job`."""
    values, problems = _read(outcome, job.rows)
    if problems:
        message = f"reward {leaf.name!r}{next(iter(problems.values()))}"
        if leaf.errors == "raise":
            raise RewardError(message) from (outcome if isinstance(outcome, Exception) else None)
        logger.warning("%s (skipped %d of %d rows)", message, len(problems), len(job.rows))
    found = dict(job.known)
    failed = set()
    for row, value in zip(job.rows, values, strict=True):
        key = job.keys[row]
        found[key] = value
        if row in problems:
            failed.add(key)  # and not remembered: the error may be gone next time
        elif leaf.cache_size is not None:
            leaf._memory.remember(key, value, leaf.cache_size)
    if leaf.errors == "skip" and call.get("log_metric"):
        # Zero counts too: TRL averages what is logged, and silence would make a rare error look frequent.
        call["log_metric"](f"rewards/{leaf.name}/errors", float(sum(key in failed for key in job.keys)))
    return [found[key] for key in job.keys]


def _read(outcome: Any, rows: list[int]) -> tuple[list[float | None], dict[int, str]]:
    """Values for `rows`, and for each row without a usable one what is wrong (continuing "reward 'name'")."""
    skip = 'leave such rows out with .on_error("skip")'
    nothing: list[float | None] = [None] * len(rows)
    if isinstance(outcome, Exception):
        what = f" raised {type(outcome).__name__}: {outcome}: mend the cause, or {skip}"
        return nothing, dict.fromkeys(rows, what)
    values = outcome.tolist() if hasattr(outcome, "tolist") else outcome  # tensors and arrays
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        what = f' returned {given} for {len(rows)} completions: return one each in a list, None for "does not apply"'
        return nothing, dict.fromkeys(rows, what)
    problems = {}
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # scalars of torch and numpy
            value = value.item()
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            what = f'{value!r:.80} is not a finite number: return None for "does not apply", or {skip}'
            problems[row] = f", row {row}: {what}"
        else:
            nothing[index] = None if value is None else float(value)
    return nothing, problems


def _key(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(repr(_canonical(row)).encode(), digest_size=16).digest()


def _canonical(value: Any) -> Any:
    """`value` with a `repr` that is equal for equal values and different for different ones."""
    if isinstance(value, dict):
        return "dict", sorted((repr(key), _canonical(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    return "pickle", pickle.dumps(value)  # a default `repr` holds an address, which another object may get later
