"""One call of a leaf: which rows to score, what came back, and what to remember.

A leaf without a cache scores all rows. A leaf with a cache scores the rows whose values it does not hold.
"""

import hashlib
import logging
import math
import pickle
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..host.calls import own_copy
from .errors import NOT_OF_THE_ROW, SKIP, RewardError, RowError, remedy_for, said, shown

logger = logging.getLogger(__name__)

# What a guarded leaf logs as `rewards/{name}/{kind}`: attempts that went wrong, by kind, and retries.
TALLIES = ("failures", "timeouts", "garbage", "retries")
MAX_FLOAT32 = 3.4028234663852886e38  # TRL keeps rewards in float32
_NOT_FINITE = "is not a finite number"


class Memory(OrderedDict[Any, Any]):
    """Values by key, of which the least recently used go first. Pickles and deep-copies as an empty one."""

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        return Memory, ()

    def recall(self, key: Any, default: Any = None) -> Any:
        """The value under `key`, which becomes the most recently used one."""
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
    """
    What a leaf has to score in one call.

    Args:
        call (`dict`):
            Keyword arguments for `score`, of the rows to score alone.
        rows (`list[int]`):
            Where these rows stand in TRL's call.
        keys (`list`):
            One key for each row of TRL's call. Rows with the same key have the same value.
        known (`dict`):
            Values that the cache holds, by key.
        tally (`Counter`):
            What went wrong, counted while the rows are scored.
    """

    call: dict[str, Any]
    rows: list[int]
    keys: list[Any]
    known: dict[Any, float | None]
    tally: Counter[str] = field(default_factory=Counter)


def job_of(leaf: Any, call: dict[str, Any]) -> Job:
    """What `leaf` has to score of TRL's keyword arguments `call`."""
    count = len(call["completions"])
    if leaf.cache_size is None:
        return Job(call=call, rows=list(range(count)), keys=list(range(count)), known={})
    call = {name: value for name, value in call.items() if name not in NOT_OF_THE_ROW}
    columns = {name: value for name, value in call.items() if isinstance(value, list | tuple) and len(value) == count}
    others = {name: value for name, value in call.items() if name not in columns}
    keys = [_key({name: column[row] for name, column in columns.items()} | others) for row in range(count)]
    unknown = object()
    known = {key: value for key in set(keys) if (value := leaf._memory.recall(key, unknown)) is not unknown}
    rows = sorted({key: row for row, key in reversed(list(enumerate(keys))) if key not in known}.values())
    new_rows = {name: [column[row] for row in rows] for name, column in columns.items()}
    return Job(call=new_rows | others, rows=rows, keys=keys, known=known)


def own_rows(call: dict[str, Any]) -> dict[str, Any]:
    """The call with a copy of each value of each row, so that nobody sees what another reward or attempt changes."""
    rows = {name: value for name, value in call.items() if name not in NOT_OF_THE_ROW}
    # Value by value, since rows of one prompt may share an object.
    return call | {
        name: [own_copy(item) for item in value] if type(value) is list else own_copy(value)
        for name, value in rows.items()
    }


def checked_values(leaf: Any, call: dict[str, Any], job: Job, outcome: Any) -> list[float | None]:
    """
    The leaf's values for all rows of `call`.

    Args:
        leaf ([`Leaf`]):
            The leaf that was asked.
        call (`dict`):
            TRL's keyword arguments.
        job ([`Job`]):
            What the leaf had to score.
        outcome (`Any`):
            What the leaf returned for the rows of `job`, or the exception that it raised.

    Raises:
        [`RewardError`]: where a row has no usable value and the leaf does not skip such rows.
    """
    values, problems = _read(outcome, job)
    if problems:
        message = f"reward {leaf.name!r}{next(iter(problems.values()))}"
        if not leaf.skips:
            raise RewardError(message) from (outcome if isinstance(outcome, Exception) else None)
        told = message.replace(f", or {SKIP}", "")  # which is what happens here
        logger.warning("%s (skipped %d of %d rows)", told, len(problems), len(job.rows))
    found = dict(job.known)
    failed = set()
    for row, value in zip(job.rows, values, strict=True):
        key = job.keys[row]
        found[key] = value
        if row in problems:
            failed.add(key)  # and not remembered: the error may be gone next time
        elif leaf.cache_size is not None:
            leaf._memory.remember(key, value, leaf.cache_size)
    if call.get("log_metric"):
        # Zero counts too: TRL averages what is logged, and silence would make a rare error look frequent.
        if leaf.skips:
            call["log_metric"](f"rewards/{leaf.name}/errors", float(sum(key in failed for key in job.keys)))
        for kind in TALLIES if leaf.guard is not None else ():
            call["log_metric"](f"rewards/{leaf.name}/{kind}", float(job.tally[kind]))
    return [found[key] for key in job.keys]


def _read(outcome: Any, job: Job) -> tuple[list[float | None], dict[int, str]]:
    """Values for the rows of `job`, and for each row without one what is wrong (continuing "reward 'name'")."""
    rows, completions = job.rows, job.call["completions"]
    numbers: list[float | None] = [None] * len(rows)
    if isinstance(outcome, Exception):
        return numbers, dict.fromkeys(rows, f" {said(outcome)}: {remedy_for(outcome, completions)}")
    values = listed(outcome, len(rows))
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        what = f" returned {_amount(values)} for {len(rows)} completions: "
        return numbers, dict.fromkeys(rows, what + 'return one each in a list, None for "does not apply"')
    problems = {}
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        if isinstance(value, Exception):
            problems[row] = f", row {row}: {said(value)}: {remedy_for(value, completions)}"
            continue
        numbers[index], problem = number_or_problem(value)
        if problem is not None:
            problems[row] = f', row {row}: {shown(value)} {problem}: return None for "does not apply", or {SKIP}'
    return numbers, problems


def only_value(outcome: Any) -> float | None:
    """The value that a leaf returned for a call of one row. Raises [`RowError`] where that is no reward."""
    values = listed(outcome, 1)
    if not isinstance(values, list | tuple) or len(values) != 1:
        raise RowError(f"it returned {_amount(values)} for 1 completion", "garbage")
    number, problem = number_or_problem(values[0])
    if problem is not None:
        raise RowError(f"{shown(values[0])} {problem}", "garbage")
    return number


def _amount(values: Any) -> str:
    return f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"


def listed(outcome: Any, count: int) -> Any:
    """
    The list of what a tensor or an array holds; anything else as it is.

    `(N, 1)`, the shape of a model with one output, is read as `(N,)`.

    ```python
    >>> import torch
    >>> listed(torch.tensor([[0.5], [2.0]]), 2)
    [0.5, 2.0]

    ```
    """
    if not hasattr(outcome, "tolist"):
        return outcome
    shape = tuple(getattr(outcome, "shape", ()))
    return (outcome.reshape(count) if len(shape) > 1 and shape[0] == math.prod(shape) == count else outcome).tolist()


def number_or_problem(value: Any) -> tuple[float | None, str | None]:
    """
    A value as a reward, and what is wrong with it where it cannot be one. `None` is "does not apply".

    Any scalar that Python can make a `float` of is a number: `Decimal`, `Fraction`, the scalars of other libraries, and
    arrays and tensors that hold one element. Text is not, even if it reads as a number.

    ```python
    >>> from decimal import Decimal
    >>> number_or_problem(2), number_or_problem(Decimal("0.5")), number_or_problem(None)
    ((2.0, None), (0.5, None), (None, None))
    >>> number_or_problem("two"), number_or_problem(10**40)
    ((None, 'is not a finite number'), (None, 'is not a finite number in float32'))

    ```
    """
    if type(value) is not float:
        try:
            value = _only_element(value)
            if value is None:
                return None, None
            value = float(value) if _is_numeric(value) else math.nan
        except OverflowError:
            return None, f"{_NOT_FINITE} in float32"
        except Exception:  # such as an array of two numbers
            return None, _NOT_FINITE
    if not math.isfinite(value):
        return None, _NOT_FINITE
    return (value, None) if abs(value) <= MAX_FLOAT32 else (None, f"{_NOT_FINITE} in float32")


def _is_numeric(value: Any) -> bool:
    # numpy makes a number of some durations, and not of others.
    is_time = getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M")
    has_float = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    return has_float and not is_time and not isinstance(value, str)


def _only_element(value: Any) -> Any:
    """The element of an array, tensor or numpy scalar that holds one; anything else as it is."""
    shape = getattr(value, "shape", None)
    holds_one = hasattr(value, "item") and isinstance(shape, tuple) and math.prod(shape) == 1
    return value.item() if holds_one and _is_numeric(value) else value


def _key(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(repr(_canonical(row)).encode(), digest_size=16).digest()


def _canonical(value: Any) -> Any:
    """Something whose `repr` is the same for equal values, and differs between different ones."""
    if isinstance(value, dict):
        return "dict", sorted((repr(key), _canonical(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    return "pickle", pickle.dumps(value)  # a default `repr` holds an address, which another object may get later
