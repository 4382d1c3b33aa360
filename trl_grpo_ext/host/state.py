"""What a callback finds in a checkpoint, held against what it would have written itself."""

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def check_state(state: Any, /, **wanted: Any) -> None:
    """
    Raise `ValueError` that names the key unless `state` has all keys that are wanted, with values of their kind.

    Args:
        state (`dict`):
            What a checkpoint holds.
        wanted:
            For each key a tensor of the dtype and shape to have, whose values must be finite, or a type: `bool`, `int`
            (not negative), `float` (finite), `list`, `dict` or `str`.

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
    Raise `ValueError` for what a checkpoint could hold and never be read from: anything but tensors and plain data.

    Args:
        value:
            State of a callback, or a part of it.
        place (`str`, *optional*):
            Where it stands, for the message.

    Example:

    ```python
    >>> check_savable({"means": [torch.ones(2), 0.5, None], "name": "x"})
    >>> check_savable({"history": [{1, 2}, range(3)]})
    Traceback (most recent call last):
        ...
    ValueError: state_dict()['history'][1] is a range: make it a tensor, a number, text, or a list or dict of these

    ```
    """
    if type(value) in (dict, OrderedDict, Counter):
        for key, part in value.items():
            check_savable(key, f"{place} key")
            check_savable(part, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for number, part in enumerate(value):
            check_savable(part, f"{place}[{number}]")
    elif type(value) not in (bool, int, float, complex, str, bytes, bytearray, type(None), Tensor, Parameter):
        raise ValueError(
            f"state_dict(){place} is a {type(value).__name__}: make it a tensor, a number, text, or a list or dict of "
            "these"
        )


def check_rollouts(rollouts: dict[str, Any], count: int) -> None:
    """Raise `ValueError` unless these are the rollouts still to be trained on, in `count` micro-batches."""
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
