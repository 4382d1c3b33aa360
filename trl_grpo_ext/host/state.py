"""What may go into a checkpoint, and what may be taken back out of one: a writer refuses what its reader refuses."""

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

MAX_DEPTH = 100  # of lists in lists; torch.save ends somewhere above 300
MAX_BITS = 2032  # of an integer; torch.load reads no longer ones


class Stateful(Protocol):
    """What has a state in a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def check_state(state: Any, /, **wanted: Any) -> None:
    """
    Raise `ValueError` unless `state` has every wanted key, with a value of the wanted kind. The error names the key.

    Args:
        state (`dict`):
            What a checkpoint holds.
        wanted:
            The kind of each key. A tensor asks for a finite tensor of its dtype and shape. A type is `bool`, `int` (not
            negative), `float` (finite), `list`, `dict` or `str`.

    Example:

    ```python
    >>> check_state({"beta": 0.1, "sizes": torch.ones(2)}, beta=float, sizes=torch.zeros(2))
    >>> check_state({"beta": float("nan")}, beta=float)
    Traceback (most recent call last):
        ...
    ValueError: 'beta' is nan: not a finite number

    ```
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"it is a {type(state).__name__}, not a dict")
    for key, kind in wanted.items():
        if key not in state:
            raise ValueError(f"{key!r} is missing")
        problem = _tensor_problem(state[key], kind) if isinstance(kind, Tensor) else _problem(state[key], kind)
        if problem is not None:
            raise ValueError(f"{key!r} {problem}")


def check_savable(value: Any, place: str = "") -> None:
    """
    Raise `ValueError` for what a checkpoint could hold, but nobody could read: only tensors and plain data are safe.

    Args:
        value:
            State of a callback, or a part of it.
        place (`str`, *optional*):
            Where the value stands, for the message.

    Example:

    ```python
    >>> check_savable({"means": [torch.ones(2), 0.5, None], "name": "x"})
    >>> check_savable({"history": [{1, 2}, range(3)]})
    Traceback (most recent call last):
        ...
    ValueError: state_dict()['history'][1] is a range: make it a tensor, a number, text, or a list or dict of these

    ```
    """
    _check_savable(value, place, MAX_DEPTH)


def _check_savable(value: Any, place: str, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"state_dict(){place[:80]}... is nested more than {MAX_DEPTH} deep: make it flat")
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for key, part in value.items():
            _check_savable(key, f"{place} key", depth - 1)
            _check_savable(part, f"{place}[{_short(key)}]", depth - 1)
    elif kind in (list, tuple, set):
        for number, part in enumerate(value):
            _check_savable(part, f"{place}[{number}]", depth - 1)
    elif kind is int and value.bit_length() > MAX_BITS:
        raise ValueError(f"state_dict(){place} has {value.bit_length()} bits: no more than {MAX_BITS} are read back")
    elif kind is bytes and not value:
        raise ValueError(f"state_dict(){place} is empty bytes, which torch.load refuses: make it None")
    elif kind in (Tensor, Parameter) and value.is_meta:
        raise ValueError(f"state_dict(){place} is a tensor on the meta device, which has no values: save a real one")
    elif kind not in (bool, int, float, complex, str, bytes, bytearray, type(None), Tensor, Parameter):
        raise ValueError(
            f"state_dict(){place} is a {kind.__name__}: make it a tensor, a number, text, or a list or dict of these"
        )
    if kind in (OrderedDict, Tensor, Parameter):  # which are saved with the attributes that somebody set
        for name, part in vars(value).items():
            _check_savable(part, f"{place}.{name}", depth - 1)


def check_readable(writer: Stateful, state: dict[str, Any]) -> None:
    """
    Let a part of this package judge its own state as it will when a run resumes.

    A copy reads the state. Nothing changes, since the state is the present one. Callbacks of a user are not asked,
    because nobody knows what else they do when they load.

    Raises:
        `ValueError`: what `load_state_dict` raises.
    """
    if not _is_ours(writer):
        return
    reader = copy.copy(writer)
    if hasattr(reader, "trainer"):
        reader.trainer = _Shadow(reader.trainer)
    reader.load_state_dict(state)


def _is_ours(writer: Stateful) -> bool:
    return type(writer).load_state_dict.__module__.partition(".")[0] == __name__.partition(".")[0]


class _Shadow:
    """Has the attributes of another object. What is set here does not reach that object."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def check_logged(logged: Any) -> None:
    """Raise `ValueError` unless this is what was logged since the last log: see `seams.logged_since_log`."""
    check_state(logged, metrics=dict, losses=list, last_log=int, table=dict)
    for name, values in logged["metrics"].items():  # of which any may be NaN
        if not (isinstance(name, str) and isinstance(values, list) and all(type(value) is float for value in values)):
            raise ValueError(f"'metrics' has {_short(values)} under {name!r}: not numbers")
    if not (logged["losses"] and all(type(loss) is float for loss in logged["losses"])):
        raise ValueError(f"'losses' is {_short(logged['losses'])}: not numbers")
    table = logged["table"]
    if not table:  # no completions are logged
        return
    check_state(table, prompt=list, rewards=dict, extra=dict)
    columns = {name: values for name, values in table.items() if name not in ("rewards", "extra")}
    columns |= {f"{kind}/{name}": values for kind in ("rewards", "extra") for name, values in table[kind].items()}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(table["prompt"]):
            raise ValueError(f"'table' has a column {name!r} that does not fit 'prompt'")


def check_rollouts(rollouts: dict[str, Any], count: int) -> None:
    """Raise `ValueError` unless these are rollouts that are still to be trained on, in `count` micro-batches."""
    check_state(rollouts, step=int, inputs=list)
    if len(rollouts["inputs"]) != count:
        raise ValueError(f"'inputs' has {len(rollouts['inputs'])} micro-batches, and steps_per_generation={count}")
    for inputs in rollouts["inputs"]:
        check_state(inputs, advantages=Tensor, completion_ids=Tensor, completion_mask=Tensor)
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        shapes = {"completion_mask": [ids.shape], "advantages": [ids.shape[:1], ids.shape]}
        for key, allowed in shapes.items():
            if ids.dim() != 2 or inputs[key].shape not in allowed:
                given = tuple(inputs[key].shape)
                raise ValueError(f"{key!r} has shape {given}, and 'completion_ids' {tuple(ids.shape)}")
        if not torch.isfinite(advantages).all():
            raise ValueError("'advantages' holds NaN or infinity")


def _tensor_problem(value: Any, like: Tensor) -> str | None:
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if (value.dtype, value.shape) != (like.dtype, like.shape):
        given = f"{value.dtype} of shape {tuple(value.shape)}"
        return f"is {given}, not {like.dtype} of shape {tuple(like.shape)}"
    if not torch.isfinite(value).all():
        return "holds NaN or infinity"
    return None


def _problem(value: Any, kind: type) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        try:
            return None if is_number and math.isfinite(value) else f"is {value!r:.80}: not a finite number"
        except OverflowError:
            return "is beyond what a float can hold"
    if kind is int:
        is_count = is_number and isinstance(value, int) and 0 <= value < 2**63
        return None if is_count else f"is {_short(value)}: not a count"
    return None if isinstance(value, kind) else f"is {_short(value)}: not a {kind.__name__}"


def _short(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"
