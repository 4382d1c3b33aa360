"""A copy for each call of user code: equal, and with no mutable object in common."""

import collections
import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.host.calls import own_copy

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary()
NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
)


def mutables(value):
    """The lists and dicts in `value`, by identity."""
    if isinstance(value, list | tuple | dict):
        parts = value.values() if isinstance(value, dict) else value
        found = set().union(*map(mutables, parts))
        return found if isinstance(value, tuple) else found | {id(value)}
    return set()


@given(NESTED)
def test_a_copy_is_equal_and_shares_no_mutable_part(value):
    copied = own_copy(value)
    assert copied == value
    assert type(copied) is type(value)
    assert not mutables(copied) & mutables(value)
    assert len(mutables(copied)) == len(mutables(value))


@dataclasses.dataclass
class Board:
    cells: list


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (np.zeros(3), lambda array: array.fill(1)),
        (np.array([[0, 0]], dtype=object)[0], lambda array: array.fill(1)),
        (np.array([[1], [2, 3]], dtype=object), lambda array: array[0].append(1)),
        (torch.zeros(3), lambda tensor: tensor.fill_(1)),
        (torch.zeros(4, 3)[1], lambda tensor: tensor.fill_(1)),
        ((torch.zeros(2), "x"), lambda pair: pair[0].fill_(1)),
        (Board([0]), lambda board: board.cells.append(1)),
        ({"state": Board([0])}, lambda row: row["state"].cells.append(1)),
        (collections.defaultdict(list, a=[0]), lambda counts: counts["a"].append(1)),
        (collections.deque([[0]]), lambda queue: queue[0].append(1)),
        ({0, 1}, lambda numbers: numbers.add(2)),
        (bytearray(b"x"), lambda data: data.extend(b"y")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_changing_a_copy_leaves_the_original_alone(value, change):
    before = repr(value)
    copied = own_copy(value)
    assert repr(copied) == before
    change(copied)
    assert repr(copied) != before
    assert repr(value) == before


def test_a_copied_tensor_holds_its_own_values_alone():
    whole = torch.zeros(1000, 2)
    assert own_copy(whole[3]).untyped_storage().nbytes() == whole[3].nbytes
    computed = torch.ones(2, requires_grad=True) * 2
    copied = own_copy([computed])[0]
    assert copied.is_leaf
    assert copied.requires_grad
    assert copied.tolist() == [2.0, 2.0]


def test_one_object_stays_one_object():
    board = [0]
    left, right = own_copy([board, board])
    assert left is right is not board
    node = Board([])
    node.cells.append(node)
    nodes = own_copy([node, node.cells])
    assert nodes[0].cells is nodes[1] is not node.cells
    assert nodes[1][0] is nodes[0]
    loop = []
    loop.append(loop)
    copied = own_copy(loop)
    assert copied[0] is copied is not loop


class Half:
    """Fails in the middle of its copy, when one item of its list has been copied."""

    def __init__(self, part):
        self.part = part


def test_what_cannot_be_copied_stays_and_the_rest_is_copied():
    lock = threading.Lock()
    board = [[1], lock, [2]]
    half = Half(board)
    copied = own_copy({"half": half, "lock": lock, "board": board, "file": sys.stdout})
    assert copied["lock"] is lock
    assert copied["half"] is half
    assert copied["file"] is sys.stdout
    assert copied["board"] == [[1], lock, [2]]
    copied["board"][0].append(3)
    assert board == [[1], lock, [2]]
    assert own_copy(lock) is lock


def test_copying_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from trl_grpo_ext.host.calls import own_copy; assert own_copy([[1], {2}]) == [[1], {2}];"
        "print([name for name in ('torch', 'numpy', 'trl') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
