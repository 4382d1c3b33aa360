"""How a reward tree reads: as the Python that builds it (`repr`), and as the name of its metrics (`__name__`)."""

from typing import Any

from . import ops
from .schedules import Constant, Schedule


def describe(node: Any, outer: int = 0, *, naming: bool) -> str:
    """
    `node` as Python source, or as a metric name.

    Args:
        node ([`Reward`] or schedule):
            What to describe.
        outer (`int`, *optional*, defaults to `0`):
            Precedence of the expression around it: parentheses appear where `node` binds less tightly.
        naming (`bool`):
            Whether to write a metric name: short, no spaces, sums without their weights.
    """
    if isinstance(node, Constant):
        return f"{node.value:g}" if naming else repr(node.value)
    if isinstance(node, Schedule):
        return repr(node).replace(" ", "") if naming else repr(node)
    if not _is_composite(node):
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
        left_text = describe(left, ops.PRODUCT if minus else ops.SUM, naming=True)
        text = f"{signs[0]}{left_text}{signs[1]}{describe(right, ops.PRODUCT, naming=True)}"
    else:
        binds = op.binds if op.binds and not (naming and precedence == ops.ATOM) else (0,) * len(children)
        parts = [describe(child, bind, naming=naming) for child, bind in zip(children, binds, strict=True)]
        text = op.label(*parts) if naming else op.source(*parts)
    if name is not None:
        text, precedence = f"({text}).named({name!r})", ops.ATOM
    return text if precedence >= outer else f"({text})"


def _unweighted(term: Any) -> tuple[bool, Any]:
    """(whether the term is negative, the term without sign and weight)."""
    if _is_composite(term) and term.name is None:
        if isinstance(term.op, ops.Negate):
            minus, rest = _unweighted(term.children[0])
            return not minus, rest
        for weight, weighed in weights(term):
            minus, rest = _unweighted(weighed)
            return minus != (isinstance(weight, Constant) and weight.value < 0), rest
    return False, term


def weights(node: Any) -> list[tuple[Schedule, Any]]:
    """The (weight, weighed reward) of a product of a reward with a schedule or constant; empty for any other node."""
    if not _is_composite(node) or not isinstance(node.op, ops.Multiply):
        return []
    pairs = (node.children, node.children[::-1])
    return [(weight, other) for weight, other in pairs if isinstance(weight, Schedule)]


def _is_composite(node: Any) -> bool:
    return hasattr(node, "op")  # not by class: base.py imports this module
