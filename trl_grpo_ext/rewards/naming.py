"""How a reward reads: as the Python that builds it (`repr`), and as the name of its metrics (`__name__`)."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from . import ops
from .schedules import Constant, Schedule
from .trees import is_composite, weights


def expression(node: Any, outer: int = 0, *, naming: bool) -> str:
    """
    A reward or schedule as Python source, or as the name of its metrics.

    Args:
        node ([`Reward`] or schedule):
            What to write.
        outer (`int`, *optional*, defaults to `0`):
            Precedence of the expression around `node`. A `node` that binds less tightly gets parentheses.
        naming (`bool`):
            Whether to write a name: short, without spaces, sums without their weights.
    """
    if isinstance(node, Constant):
        return f"{node.value:g}" if naming else repr(node.value)
    if isinstance(node, Schedule):
        return repr(node).replace(" ", "") if naming else repr(node)
    if not is_composite(node):
        return node.__name__ if naming else repr(node)
    name: str | None = node.name
    if naming and name is not None:
        return name
    op, children = node.op, node.children
    precedence = op.precedence
    if naming and isinstance(op, ops.Add | ops.Subtract):
        # A sum is named after what it adds up: weights would make the name long, and schedules are logged anyway.
        (minus, left), (flip, right) = map(_unweighted, children)
        signs = "-" if minus else "", "-" if flip != isinstance(op, ops.Subtract) else "+"
        left_text = expression(left, ops.PRODUCT if minus else ops.SUM, naming=True)
        text = f"{signs[0]}{left_text}{signs[1]}{expression(right, ops.PRODUCT, naming=True)}"
    else:
        binds = op.binds if op.binds and not (naming and precedence == ops.ATOM) else (0,) * len(children)
        parts = [expression(child, bind, naming=naming) for child, bind in zip(children, binds, strict=True)]
        text = op.label(*parts) if naming else op.source(*parts)
    if name is not None:
        text, precedence = f"({text}).named({name!r})", ops.ATOM
    return text if precedence >= outer else f"({text})"


def _unweighted(term: Any) -> tuple[bool, Any]:
    """(whether the term is negative, the term without sign and weight)."""
    if is_composite(term) and term.name is None:
        if isinstance(term.op, ops.Negate):
            minus, rest = _unweighted(term.children[0])
            return not minus, rest
        for weight, weighed in weights(term):
            minus, rest = _unweighted(weighed)
            return minus != (isinstance(weight, Constant) and weight.value < 0), rest
    return False, term


def leaf_source(leaf: Any) -> str:
    """A leaf as Python: its constructor, and the methods that set its limits, its cache and what errors do."""
    text: str = leaf._constructor() + ("" if leaf.guard is None else leaf.guard.source())
    if leaf.cache_size is not None:
        text += f".cached(max_size={leaf.cache_size})"
    is_set = leaf.errors is not None and leaf.errors != ("raise" if leaf.guard is None else "skip")
    return text + (f".on_error({leaf.errors!r})" if is_set else "")


def constructor_source(leaf: Any) -> str:
    """The constructor of a leaf as Python, with the arguments that differ from their defaults."""
    given = []
    for item in fields(leaf):
        value = getattr(leaf, item.name)
        default = leaf.default_name if item.name == "name" else item.default
        # Methods set these three, and `leaf_source` writes them as methods.
        if item.init and item.name not in ("errors", "cache_size", "guard") and value != default:
            given.append(f"{item.name}={value!r}")
    return f"{type(leaf).__name__}({', '.join(given)})"


def callable_name(function: Callable[..., Any]) -> str:
    """The name that TRL's logs use for a function: its own, or for a callable object the name of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
