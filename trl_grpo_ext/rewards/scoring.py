"""One leaf's call, from TRL's keyword arguments to checked values: what to score, what came back, what to remember."""

import hashlib
import logging
import math
import pickle
import sys
import traceback
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from numbers import Real
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# What TRL passes besides the rows. A cached value must not depend on these, and they cannot go to another process.
NOT_OF_THE_ROW = ("trainer_state", "environments", "log_metric", "log_extra")
# What a guarded leaf logs as `rewards/{name}/{kind}`: bad answers by kind, retried ones included, and retries.
TALLIES = ("failures", "timeouts", "garbage", "retries")
MAX_FLOAT32 = 3.4028234663852886e38  # TRL keeps rewards in float32


class RewardError(ValueError):
    """A reward raised, or returned something that is no list of finite numbers and `None`, one per completion."""


class RowError(RuntimeError):
    """What went wrong with one row, where the message says it all. `kind` is one of [`TALLIES`]."""

    def __init__(self, message: str, kind: str = "failures"):
        super().__init__(message)
        self.kind = kind


def is_missing_package(error: BaseException | None) -> bool:
    """
    Whether the reward itself lacks a package, which is for the user to install and never for `on_error` to skip.

    What a completion imports when a reward runs it is its own affair. It is told by where it stands: in code that was
    made of a string, as by `exec`, and not in a cell of a notebook, which belongs to a module and has its own name.

    ```python
    >>> def error_of(run):
    ...     try:
    ...         run()
    ...     except ImportError as error:
    ...         return error
    >>> is_missing_package(ImportError("of a file")), is_missing_package(error_of(lambda: exec("import not_there")))
    (True, False)

    ```
    """
    if not isinstance(error, ImportError):
        return False
    return not any(_is_of_a_string(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_of_a_string(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if not file.startswith("<") or file.startswith("<frozen "):
        return False
    if file == "<string>" and frame.f_code.co_name != "__init__":  # that of a dataclass is made of a string too
        return True
    name = frame.f_globals.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return frame.f_code.co_name == "<module>" or getattr(module, "__dict__", None) is not frame.f_globals


class Memory(OrderedDict[Any, Any]):
    """The least recently used values of one leaf. Pickles and deep-copies as an empty one."""

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
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
    """
    What a leaf has to score: one key per row of TRL's call, which `rows` are not `known`, and a `call` for those.
    `tally` counts what goes wrong on the way.
    """

    call: dict[str, Any]
    rows: list[int]
    keys: list[Any]
    known: dict[Any, float | None]
    tally: Counter[str] = field(default_factory=Counter)


def begin(leaf: Any, call: dict[str, Any]) -> Job:
    """The job for `leaf`: all rows, or with a cache one row for each value that it does not hold."""
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


def settle(leaf: Any, call: dict[str, Any], job: Job, outcome: Any) -> list[float | None]:
    """The leaf's values for all rows of `call`, once `outcome` has come back for the rows of `job`."""
    values, problems = _read(outcome, job.rows)
    if problems:
        message = f"reward {leaf.name!r}{next(iter(problems.values()))}"
        if not leaf.skips:
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
    if call.get("log_metric"):
        # Zero counts too: TRL averages what is logged, and silence would make a rare error look frequent.
        if leaf.skips:
            call["log_metric"](f"rewards/{leaf.name}/errors", float(sum(key in failed for key in job.keys)))
        for kind in TALLIES if leaf.guard is not None else ():
            call["log_metric"](f"rewards/{leaf.name}/{kind}", float(job.tally[kind]))
    return [found[key] for key in job.keys]


def _read(outcome: Any, rows: list[int]) -> tuple[list[float | None], dict[int, str]]:
    """Values for `rows`, and for each row without a usable one what is wrong (continuing "reward 'name'")."""
    skip = 'leave such rows out with .on_error("skip")'
    nothing: list[float | None] = [None] * len(rows)
    if isinstance(outcome, Exception):
        what = f" {said(outcome)}: mend the cause, or {skip}"
        return nothing, dict.fromkeys(rows, what)
    values = outcome.tolist() if hasattr(outcome, "tolist") else outcome  # tensors and arrays
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        what = f' returned {given} for {len(rows)} completions: return one each in a list, None for "does not apply"'
        return nothing, dict.fromkeys(rows, what)
    problems = {}
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        if isinstance(value, Exception):
            problems[row] = f", row {row}: {said(value)}: mend the cause, or {skip}"
            continue
        number, problem = number_or_problem(value)
        if problem is not None:
            problems[row] = f', row {row}: {shown(value)} {problem}: return None for "does not apply", or {skip}'
        nothing[index] = number
    return nothing, problems


def number_or_problem(value: Any) -> tuple[float | None, str | None]:
    """
    `value` as a reward, `None` for "does not apply"; or else what is wrong with it.

    ```python
    >>> number_or_problem(2), number_or_problem("two"), number_or_problem(10**40)
    ((2.0, None), (None, 'is not a finite number'), (None, 'is not a finite number in float32'))

    ```
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # scalars of torch and numpy
        value = value.item()
    if value is None:
        return None, None
    if not isinstance(value, Real) or value != value or value in (math.inf, -math.inf):
        return None, "is not a finite number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return (number, None) if abs(number) <= MAX_FLOAT32 else (None, "is not a finite number in float32")


def said(error: BaseException) -> str:
    """What an exception of a reward says, in text that any log takes."""
    if isinstance(error, RowError):
        return str(error)
    try:
        text = str(error)
    except Exception:
        text = "(it cannot say why)"
    return f"raised {type(error).__name__}: {text.strip().partition(chr(10))[0][:2000]}".encode(
        "utf-8", "backslashreplace"
    ).decode()


def shown(value: Any) -> str:
    """The beginning of the `repr` of what a reward returned, which may be anything."""
    try:
        return f"{value!r:.80}"
    except Exception:  # Python prints no integer of 5000 digits
        return f"a {type(value).__name__}"


def only_value(outcome: Any) -> float | None:
    """The value that a leaf returned for a call of one row. Raises [`RowError`] where that is no reward."""
    values = outcome.tolist() if hasattr(outcome, "tolist") else outcome
    if not isinstance(values, list | tuple) or len(values) != 1:
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise RowError(f"it returned {given} for 1 completion", "garbage")
    number, problem = number_or_problem(values[0])
    if problem is not None:
        raise RowError(f"{shown(values[0])} {problem}", "garbage")
    return number


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
