"""A reward as text, for flags and YAML files: `"1.0 * Relevance('reference') - 0.001 * Length()"`.

The text is read as a tree of Python syntax and never run: it can name rewards, join them by the operators of the
algebra, and pass numbers, texts and lists to them.
"""

import ast
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from ..host.nearest import nearest
from .algebra import Reward, as_reward
from .ops import Operators
from .schedules import Schedule

_INFIX: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_METHODS = {name for name in dir(Reward) if not name.startswith("_")} - {"evaluate", "leaves", "map_leaves", "of"}


def ready() -> dict[str, Any]:
    """What a text can call, by name: the public names of this room, asked for when it is complete."""
    room = importlib.import_module(__package__)
    return {name: getattr(room, name) for name in room.__all__ if name not in ("Reward", "RewardError", "parse_reward")}


def parse_reward(text: str, lookup: Callable[[str], Any] | None = None) -> Reward:
    """
    Make the reward that a text describes. What `repr` writes for a reward of this package is such a text.

    Args:
        text (`str`):
            An expression of rewards, their methods, schedules and numbers. A reward without arguments needs no
            parentheses.
        lookup (`Callable`, *optional*):
            Gives the reward function of a name or dotted name that is not ours, or raises `ValueError`.

    Raises:
        `ValueError`: for what is no reward, with the place and the nearest name.

    Example:
    ```python
    >>> parse_reward("Length('characters').clip(0, 20) / 20 - 0.1 * OverLength(max_length=8, buffer=4)")
    Length(unit='characters').clip(low=0.0, high=20.0) / 20.0 - 0.1 * OverLength(max_length=8, buffer=4)
    >>> parse_reward("Relevance('reference') + Lenght()")
    Traceback (most recent call last):
        ...
    ValueError: reward "Relevance('reference') + Lenght()": there is no reward 'Lenght': did you mean Length?

    ```
    """
    try:
        tree = ast.parse(text.strip().replace("\n", " "), mode="eval")
        reward = _Reader(lookup).value(tree.body)
        if not isinstance(reward, Reward):
            raise ValueError(f"{reward!r} is no reward: name one, such as Length()")
    except SyntaxError as error:
        raise ValueError(f'reward "{text}": {error.msg}: write an expression such as 1.0 * Length()') from None
    except (RecursionError, MemoryError):
        raise ValueError(f'reward "{text}": it is nested too deeply: write it as a function, and name that') from None
    except (ValueError, TypeError, ZeroDivisionError, ImportError) as error:
        raise ValueError(f'reward "{text}": {error}') from error
    return reward


def import_reward(name: str) -> Any:
    """The function of a dotted name, looked for as TRL's script does: in the current folder, too."""
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(f"there is no reward {name!r}{_instead(name, ready())}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{name}: {error} (looked for in {os.getcwd()}, too)") from error


class _Reader:
    """Values of the nodes of one text."""

    def __init__(self, lookup: Callable[[str], Any] | None):
        self.ready, self.lookup = ready(), lookup

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                return {self.value(key): self.value(item) for key, item in _pairs(node)}
            case ast.Name() | ast.Attribute():
                return self.named(_dotted(node), node)
            case ast.Call():
                return self.called(node)
            case ast.UnaryOp(op=ast.USub()):
                return -_number_or_reward(self.value(node.operand), node.operand)
            case ast.UnaryOp(op=ast.UAdd()):
                return _number_or_reward(self.value(node.operand), node.operand)
            case ast.BinOp() if type(node.op) in _INFIX:
                return self.infix(node.op, node.left, node.right)
            case ast.Compare(ops=[op], comparators=[right]) if type(op) in _INFIX:
                return self.infix(op, node.left, right)
            case ast.Compare():
                _refuse(node, "compare twice: (a > 0.2) * (a < 0.8)")
        _refuse(node, f"use rewards, numbers, + - * / > >= < <= and the methods {', '.join(sorted(_METHODS))}")

    def infix(self, op: ast.operator | ast.cmpop, left: ast.expr, right: ast.expr) -> Any:
        return _INFIX[type(op)](*(_number_or_reward(self.value(side), side) for side in (left, right)))

    def named(self, name: str | None, node: ast.expr) -> Any:
        """A reward that is named without parentheses."""
        if name is None:
            _refuse(node, "name a reward, or call one of its methods")
        if name in self.ready:
            if not isinstance(self.ready[name], type):
                raise ValueError(f"{name} needs its arguments: write {name}(...)")
            return self.of_call(name, [], {})
        is_foreign = name.partition(".")[0] not in self.ready
        if self.lookup is not None and is_foreign:
            if name.startswith("get_"):  # as TRL calls what makes a reward function
                raise ValueError(f"{name} makes a reward function of its arguments: write {name}(...)")
            return as_reward(self.lookup(name))
        if "." in name and is_foreign:
            remedy = "pass lookup=import_reward of trl_grpo_ext.rewards.parsing, which imports dotted names"
            raise ValueError(f"there is no reward {name!r}: {remedy}")
        raise ValueError(f"there is no reward {name!r}{_instead(name, self.ready)}")

    def called(self, node: ast.Call) -> Any:
        if any(isinstance(argument, ast.Starred) for argument in node.args) or None in [k.arg for k in node.keywords]:
            _refuse(node, "pass each argument by itself, without *")
        if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            reward = self.value(node.func.value)
            if not isinstance(reward, Reward):
                _refuse(node.func.value, "name a reward, such as Length()")
            function: Any = getattr(reward, node.func.attr)
        elif isinstance(node.func, ast.Name) and node.func.id in self.ready:
            return self.of_call(node.func.id, *self.arguments(node))
        elif isinstance(node.func, ast.Name) and self.lookup is None:
            raise ValueError(f"there is no reward {node.func.id!r}{_instead(node.func.id, self.ready)}")
        elif isinstance(node.func, ast.Name) and self.lookup is not None:
            function = self.lookup(node.func.id)
            if not node.func.id.startswith("get_"):
                _refuse(node, f"a reward function takes no arguments here: write {node.func.id}")
        else:
            methods = ", ".join(sorted(_METHODS))
            _refuse(node, f"call a reward of this package, or one of the methods {methods}")
        arguments, options = self.arguments(node)
        made = function(*arguments, **options)
        return made if isinstance(made, Reward) else as_reward(made)

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        return [self.value(item) for item in node.args], {str(k.arg): self.value(k.value) for k in node.keywords}

    def of_call(self, name: str, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            return self.ready[name](*arguments, **options)
        except TypeError as error:  # whose text names a private method
            raise ValueError(f"{name}: {str(error).partition('__init__() ')[2] or error}") from error


def _pairs(node: ast.Dict) -> list[tuple[ast.expr, ast.expr]]:
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for key, item in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant):
            _refuse(node, "use texts or numbers as keys")
        pairs.append((key, item))
    return pairs


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` where the node is such a name, else `None`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = _dotted(node.value)
        return None if front is None else f"{front}.{node.attr}"
    return None


def _number_or_reward(value: Any, node: ast.expr) -> Any:
    if not isinstance(value, int | float | Operators | Schedule):
        _refuse(node, "only rewards, schedules and numbers can be added, weighed and compared")
    return value


def _refuse(node: ast.expr, remedy: str) -> NoReturn:
    """Raise `ValueError` for a part of the text."""
    raise ValueError(f"{ast.unparse(node)} cannot stand here: {remedy}")


def _instead(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name: which of the known ones was meant, or all of them."""
    near = nearest(name, known)
    return f": did you mean {near}?" if near else f": use one of {', '.join(known)}, or a dotted name"
