"""Calls of the user's functions: which kind a function is, and a copy of what it gets. Without TRL or torch."""

import copy
import functools
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

_IMMUTABLE = frozenset(
    {type(None), bool, int, float, complex, str, bytes}
)  # most values of a dataset, left as they are

SIBLINGS = "group_answers"  # column for a reward with `reads_siblings`: the texts of all answers of the row's group


def siblings_of(prompts: list[Any], texts: list[str]) -> list[list[str]]:
    """
    For each row, the different answers to its prompt, in the order of their first row.

    Example:

    ```python
    >>> siblings_of(["p", "q", "p", "p"], ["a", "b", "c", "a"])
    [['a', 'c'], ['b'], ['a', 'c'], ['a', 'c']]

    ```
    """
    keys = [json.dumps(prompt, sort_keys=True, default=lambda part: type(part).__name__) for prompt in prompts]
    groups: dict[str, dict[str, None]] = {}
    for key, text in zip(keys, texts, strict=True):
        groups.setdefault(key, {})[text] = None
    return [list(groups[key]) for key in keys]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives a coroutine, as TRL's `is_async_callable` does (without needing TRL)."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def own_copy(value: Any) -> Any:
    """
    A copy of `value` that shares no mutable object with it, so that one call of user code cannot change another's.

    Lists, dicts, tuples, arrays and tensors are copied to any depth, and so is each other object that `copy.deepcopy`
    takes. A part that cannot be copied, such as a lock or an open file, stays in the copy as it is. An object that
    occurs several times in `value` is one object in the copy too.

    Args:
        value (`Any`):
            A value of a dataset column, or a whole row.

    Returns:
        `Any`:
            The copy. Strings, numbers and `None` are returned as they are.

    Example:
    ```python
    >>> row = {"board": [[0, 0], [0, 0]], "level": 3}
    >>> mine = own_copy(row)
    >>> mine["board"][0][1] = 1
    >>> mine, row
    ({'board': [[0, 1], [0, 0]], 'level': 3}, {'board': [[0, 0], [0, 0]], 'level': 3})

    ```
    """
    return value if type(value) in _IMMUTABLE else _copied(value, {})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """The copy of `value`; `memo` holds the copies made so far by the `id` of their originals, as in `deepcopy`."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is list:
        items = memo[id(value)] = []  # before its items, one of which may be the list itself
        items.extend(item if type(item) in _IMMUTABLE else _copied(item, memo) for item in value)
        return items
    if kind is dict:
        entries = memo[id(value)] = {}
        for key, item in value.items():
            entries[key] = _copied(item, memo)
        return entries
    if kind is tuple:
        parts = tuple(_copied(item, memo) for item in value)
        return parts if any(part is not item for part, item in zip(parts, value, strict=True)) else value
    memo[id(value)] = copied = _copied_object(value, memo)
    return copied


def _copied_object(value: Any, memo: dict[int, Any]) -> Any:
    # What has not been imported has no objects.
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        # Not `deepcopy`, which copies all that the tensor is a view of, and refuses results of a computation.
        return value.detach().clone().requires_grad_(value.requires_grad)
    if numpy is not None and type(value) is numpy.ndarray and value.dtype.hasobject and value.dtype.names is None:
        array = memo[id(value)] = value.copy()
        array.flat = [_copied(item, memo) for item in value.flat]
        return array
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # objects refuse in many ways
        while len(memo) > known:  # no other part may get what was copied by half
            memo.popitem()
        return value
