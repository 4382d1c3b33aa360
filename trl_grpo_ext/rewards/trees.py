"""Reward trees: their nodes, and the values of their rows once the leaves have theirs.

A node is a composite, which has an operator `op` and `children`, or a leaf, a schedule or a constant. Composites are
recognised by `op` and not by their class, since `algebra.py`, which defines the class, imports this module.
"""

from collections.abc import Iterator
from typing import Any

from . import ops
from .errors import SKIP, RewardError
from .schedules import Constant, Schedule, training_progress
from .scoring import number_or_problem

Column = list[float | None]  # one value for each row


def is_composite(node: Any) -> bool:
    """Whether `node` is an operator over other nodes."""
    return hasattr(node, "op")


def rewards_in(node: Any) -> Iterator[Any]:
    """The reward `node` and all rewards below it, as often as they occur."""
    yield node
    for child in node.children if is_composite(node) else ():
        if not isinstance(child, Schedule):
            yield from rewards_in(child)


def weights(node: Any) -> list[tuple[Schedule, Any]]:
    """The (weight, weighed reward) of a product of a reward with a schedule or constant; empty for any other node."""
    if not is_composite(node) or not isinstance(node.op, ops.Multiply):
        return []
    pairs = (node.children, node.children[::-1])
    return [(weight, other) for weight, other in pairs if isinstance(weight, Schedule)]


def values_of_rows(tree: Any, call: dict[str, Any], leaves: list[Any], columns: list[Column]) -> list[float | None]:
    """
    The value of each row of TRL's call, and the logs of the tree.

    Args:
        tree ([`Composite`]):
            The composite that is called.
        call (`dict`):
            TRL's keyword arguments.
        leaves (`list[Leaf]`), columns (`list[list]`):
            The distinct leaves of the tree, and for each leaf its values, one for each row.

    Raises:
        [`RewardError`]: where a value is not a finite number, unless all leaves skip errors.
    """
    progress = training_progress(call.get("trainer_state"))
    _log(tree, call, leaves, columns, progress)
    # By identity, since comparing leaves for every row and occurrence would be slow.
    of_leaf = {id(node): columns[leaves.index(node)] for node in rewards_in(tree) if not is_composite(node)}

    def look(node: Any, row: int) -> float | None:
        if isinstance(node, Schedule):
            return node(progress)
        if not is_composite(node):
            return of_leaf[id(node)][row]
        try:
            value, problem = number_or_problem(node.op.of_row(node.children, lambda child: look(child, row)))
        except ArithmeticError:
            value, problem = None, "is not a finite number"
        if problem is not None:
            text = node.op.source(*(str(look(child, row)) for child in node.children))
            remedy = "divide only .where(divisor > 0)" if isinstance(node.op, ops.Divide) else "clip the operands"
            raise RewardError(f"reward {node.__name__!r}, row {row}: {text} {problem}: {remedy}, or {SKIP}")
        return value

    skip = all(leaf.skips for leaf in leaves)
    values: list[float | None] = []
    errors = 0
    for row in range(len(call["completions"])):
        try:
            values.append(look(tree, row))
        except RewardError:
            if not skip:
                raise
            values.append(None)
            errors += 1
    if skip and call.get("log_metric"):
        call["log_metric"](f"rewards/{tree.__name__}/errors", float(errors))
    return values


def _log(tree: Any, call: dict[str, Any], leaves: list[Any], columns: list[Column], progress: float) -> None:
    log_metric, log_extra = call.get("log_metric"), call.get("log_extra")
    for leaf, values in zip(leaves, columns, strict=True):
        present = [value for value in values if value is not None]
        if log_metric and present:
            log_metric(f"rewards/{leaf.name}/mean", sum(present) / len(present))
        if log_extra:
            log_extra(leaf.name, values)
    if not log_metric:
        return
    for node in rewards_in(tree):
        for weight, weighed in weights(node):
            if not isinstance(weight, Constant):
                log_metric(f"reward_weights/{weighed.__name__}", weight(progress))
