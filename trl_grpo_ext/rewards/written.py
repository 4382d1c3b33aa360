"""A reward from text, as a YAML file or a command line has it: an expression of the algebra, or a dotted path."""

import ast
import difflib
import importlib
import inspect
import operator
from typing import Any

from .algebra import Reward, as_reward

_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


def reward_of_text(text: str) -> Reward:
    """
    The reward that a text stands for.

    Args:
        text (`str`):
            An expression of the rewards of this package, such as `Relevance("reference") - 0.01 * Length()`, or the
            dotted path of a reward function, a reward, or a class of rewards that needs no arguments, such as
            `my_rewards.correct`. Only names of this package are called; a path is imported, as TRL does with
            `reward_funcs`.

    Raises:
        `ValueError`: for what is neither, with the nearest name.

    Example:

    ```python
    >>> reward_of_text("1 - 0.5 * Length('characters')")
    1.0 - 0.5 * Length(unit='characters')
    >>> reward_of_text("Lenght()")
    Traceback (most recent call last):
        ...
    ValueError: 'Lenght()': there is no reward 'Lenght': did you mean 'Length'?

    ```
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from error
    try:
        value = _value(tree)
        return as_reward(value() if isinstance(value, type) else value)
    except (ArithmeticError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.UnaryOp | ast.BinOp) and type(node.op) in _OPERATORS:
        operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return _OPERATORS[type(node.op)](*(_operand(part) for part in operands))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        return _OPERATORS[type(node.ops[0])](_operand(node.left), _operand(node.comparators[0]))
    if isinstance(node, ast.Name):
        return _ready(node.id)
    if isinstance(node, ast.Attribute):
        path = ast.unparse(node)
        if all(part.isidentifier() for part in path.split(".")):
            return _imported(path)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        return _called(node)
    raise ValueError(f"{ast.unparse(node)!r} has no place in a reward: use numbers, + - * /, and rewards")


def _operand(node: ast.AST) -> Any:
    """A number, a schedule or a reward: of a function, `+` would otherwise be unknown."""
    value = _value(node)
    return as_reward(value) if inspect.isroutine(value) else value


def _called(node: ast.Call) -> Any:
    """A ready reward with its arguments, or a method such as `.named("x")` of a reward."""
    arguments = [_value(argument) for argument in node.args]
    keywords = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node.func, ast.Name):
        return _ready(node.func.id)(*arguments, **keywords)
    assert isinstance(node.func, ast.Attribute)
    owner, name = _operand(node.func.value), node.func.attr
    if not isinstance(owner, Reward) or name.startswith("_"):
        raise ValueError(f"{ast.unparse(node.func)!r} is no reward of this package: put it into a function of yours")
    return getattr(owner, name)(*arguments, **keywords)


def _ready(name: str) -> Any:
    """What this package calls by a name, from `trl_grpo_ext.rewards`."""
    room = importlib.import_module(__package__)
    if name in room.__all__:
        return getattr(room, name)
    near = difflib.get_close_matches(name, room.__all__, 1)
    remedy = f"did you mean {near[0]!r}?" if near else f"name a function by its dotted path, or one of {room.__all__}"
    raise ValueError(f"there is no reward {name!r}: {remedy}")


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
