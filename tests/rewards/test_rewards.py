"""The reward algebra: properties, a conformance suite, errors, logs, the cache, and one real run."""

import asyncio
import copy
import dataclasses
import functools
import importlib
import math
import operator
import pickle
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kit import count_vowels, logs_of, make_letters
from reward_helpers import Logs, ask, is_async_callable, settle
from trl import GRPOTrainer
from trl.trainer import utils
from trl.trainer.utils import get_callable_name

from trl_grpo_ext.rewards import (
    Harmlessness,
    Length,
    OverLength,
    Relevance,
    Reward,
    RewardError,
    as_reward,
    constant,
    cosine,
    linear,
    maximum,
    minimum,
    piecewise,
)
from trl_grpo_ext.rewards.schedules import training_progress

CALLS: Counter = Counter()


def column_a(a, **kwargs):
    CALLS["a"] += 1
    return list(a)


def column_b(b, **kwargs):
    CALLS["b"] += 1
    return list(b)


async def column_c(c, **kwargs):
    CALLS["c"] += 1
    await asyncio.sleep(0)
    return list(c)


class CallableObject:
    def __call__(self, a, **kwargs):
        return list(a)


class AsyncCallableObject:
    async def __call__(self, a, **kwargs):
        return list(a)


A, B, C = as_reward(column_a), as_reward(column_b), as_reward(column_c)
total = (1.0 * A + 0.5 * B - 0.001 * Length()).named("total")  # fetched by name, as `trl grpo --reward_funcs` does


def call(reward, n=None, **kwargs):
    """Values of `reward` for rows given as columns, awaited where it is async."""
    n = len(next(iter(kwargs.values()))) if n is None else n
    rows = {"prompts": ["p"] * n, "completions": ["one two"] * n, "completion_ids": [[1, 2, 3]] * n, **kwargs}
    return settle(reward(**rows))


def state(progress, max_steps=1000):
    return SimpleNamespace(global_step=round(progress * max_steps), max_steps=max_steps)


# --- properties: the algebra is plain arithmetic on lists with None ---------------------------------------------------

VALUE = st.floats(-100, 100).map(lambda x: round(x, 3))
COLUMN = st.lists(st.none() | VALUE, min_size=4, max_size=4)
NUMBER = st.floats(-10, 10).map(lambda x: round(x, 2))


def strict(function):
    return lambda *values: None if None in values else function(*values)


def add(x, y):
    return y if x is None else x if y is None else x + y


BINARY = {
    "+": (operator.add, add),
    "-": (operator.sub, lambda x, y: add(x, None if y is None else -y)),
    "*": (operator.mul, strict(operator.mul)),
    ">": (operator.gt, strict(lambda x, y: float(x > y))),
    ">=": (operator.ge, strict(lambda x, y: float(x >= y))),
    "<": (operator.lt, strict(lambda x, y: float(x < y))),
    "<=": (operator.le, strict(lambda x, y: float(x <= y))),
    "min": (minimum, lambda x, y: y if x is None else x if y is None else min(x, y)),
    "max": (maximum, lambda x, y: y if x is None else x if y is None else max(x, y)),
}


def trees():
    """(reward, reference) pairs; the reference maps one row's {"a", "b", "c"} to a value without using the package."""
    leaves = st.sampled_from([(A, lambda r: r["a"]), (B, lambda r: r["b"]), (C, lambda r: r["c"])])

    def extend(inner):
        def binary(left, right, name):
            of_rewards, of_values = BINARY[name]
            return of_rewards(left[0], right[0]), lambda r: of_values(left[1](r), right[1](r))

        def with_number(tree, number, name, swapped):
            of_rewards, of_values = BINARY[name]
            arguments = (lambda x, y: (y, x)) if swapped else (lambda x, y: (x, y))

            def reference(r):
                value = tree[1](r)  # a number does not stand in for a reward that does not apply
                return None if value is None else of_values(*arguments(value, number))

            return of_rewards(*arguments(tree[0], number)), reference

        def clip(tree, bounds):
            low, high = sorted(bounds)
            return tree[0].clip(low, high), lambda r: strict(lambda x: min(max(x, low), high))(tree[1](r))

        def where(tree, condition, otherwise):
            def reference(r):
                holds = condition[1](r)
                return None if holds is None else (tree[1](r) if holds != 0 else otherwise[1](r))

            return tree[0].where(condition[0], otherwise[0]), reference

        return st.one_of(
            st.builds(binary, inner, inner, st.sampled_from(list(BINARY))),
            st.builds(with_number, inner, NUMBER.filter(bool), st.sampled_from(list(BINARY)), st.booleans()),
            st.builds(clip, inner, st.tuples(NUMBER, NUMBER)),
            st.builds(where, inner, inner, inner),
            st.builds(lambda tree: (-tree[0], lambda r: strict(operator.neg)(tree[1](r))), inner),
            st.builds(lambda tree, t: (tree[0].threshold(t), lambda r: BINARY[">="][1](tree[1](r), t)), inner, NUMBER),
        )

    return st.recursive(leaves, extend, max_leaves=6)


@settings(max_examples=200)
@given(trees(), COLUMN, COLUMN, COLUMN)
def test_a_tree_computes_what_arithmetic_says(tree, a, b, c):
    reward, reference = tree
    expected = [reference(row) for row in ({"a": x, "b": y, "c": z} for x, y, z in zip(a, b, c, strict=True))]
    assume(all(value is None or abs(value) < 1e300 for value in expected))
    assert call(reward, a=a, b=b, c=c) == expected


@settings(max_examples=100)
@given(trees(), COLUMN, COLUMN, COLUMN)
def test_a_tree_is_made_again_from_its_source_and_its_pickle(tree, a, b, c):
    reward, expected = tree[0], call(tree[0], a=a, b=b, c=c)
    names = {"as_reward": as_reward, "column_a": column_a, "column_b": column_b, "column_c": column_c}
    rebuilt = eval(repr(reward), {**names, "minimum": minimum, "maximum": maximum})
    for same in (rebuilt, pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward), copy.copy(reward)):
        assert same == reward
        assert repr(same) == repr(reward)
        assert call(same, a=a, b=b, c=c) == expected
    # TRL takes it as a reward function.
    assert get_callable_name(reward) == reward.__name__
    leaves = {leaf.__name__ for leaf in reward.leaves()}
    assert is_async_callable(reward) == ("column_c" in leaves)
    if reward not in (A, B, C):
        assert reward.__name__ not in leaves


@given(COLUMN, st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_division_and_sum_builtin(a, b):
    quotients = [None if x is None else x / y for x, y in zip(a, b, strict=True)]
    assert call(A / B, a=a, b=b) == quotients
    assert call(2 / B, b=b) == [2 / y for y in b]
    assert call(A / 4, a=a) == [None if x is None else x / 4 for x in a]
    assert call(sum([A, B]), a=a, b=b) == call(A + B, a=a, b=b)
    assert sum([A]) is A


# --- conformance: every combinator and leaf ---------------------------------------------------------------------------

COMBINATORS = {
    "add": A + B,
    "subtract": A - B,
    "multiply": A * B,
    "divide": A / (B + 10),
    "scale": 0.5 * A,
    "scale right": A * 0.5,
    "schedule": linear(0, 1) * A,
    "negate": -A,
    "greater": A > 0.5,
    "at least": A >= B,
    "less": A < B,
    "at most": linear(0, 1) >= A,
    "clip": A.clip(-1, 1),
    "threshold": A.threshold(0.5),
    "where": A.where(B > 0, otherwise=-1.0),
    "minimum": minimum(A, B, 0.0),
    "maximum": maximum(A, B, linear(0, 1)),
    "named": (A + B).named("both"),
    "cached": (A + B).cached(max_size=8),
    "skip": (A + B).on_error("skip"),
    "async": A + C,
    "async gate": C.where(A > 0),
}
LEAVES = {
    "function": A,
    "async function": C,
    "partial": as_reward(functools.partial(column_a, extra=1)),
    "object": as_reward(CallableObject()),
    "async object": as_reward(AsyncCallableObject()),
    "named": A.named("other"),
    "cached": A.cached(),
    "async cached": C.cached(),
    "skip": A.on_error("skip"),
    "tokens": Length(),
    "words": Length("words"),
    "over_length": OverLength(4, 2),
    "harmlessness": Harmlessness(),
}
ROWS = {"a": [1.0, None, -2.0, 0.25], "b": [0.5, 3.0, 1.0, -1.0], "c": [2.0, -1.0, None, 0.0]}


@pytest.mark.parametrize("reward", [*COMBINATORS.values(), *LEAVES.values()], ids=[*COMBINATORS, *LEAVES])
def test_conformance(reward):
    names = {leaf.__name__ for leaf in reward.leaves()}
    assert isinstance(reward.__name__, str)
    assert reward.__name__
    assert all(isinstance(name, str) for name in names)

    asynchronous = "async" in type(reward).__name__.lower()
    assert is_async_callable(reward) == asynchronous == any(is_async_callable(leaf) for leaf in reward.leaves())

    values = call(reward, **ROWS)
    assert len(values) == 4
    assert all(value is None or isinstance(value, float) for value in values)
    assert any(value is not None for value in values)
    assert call(reward, n=0, a=[], b=[], c=[]) == []

    assert is_async_callable(pickle.loads(pickle.dumps(reward))) == asynchronous
    for same in (pickle.loads(pickle.dumps(reward)), copy.copy(reward), copy.deepcopy(reward)):
        assert same.__name__ == reward.__name__
        assert repr(same) == repr(reward)
        assert call(same, **ROWS) == values

    with pytest.raises(dataclasses.FrozenInstanceError):
        reward.name = "changed"
    assert reward.named("renamed").__name__ == "renamed"
    assert call(reward.named("renamed"), **ROWS) == values
    assert call(reward.cached(), **ROWS) == values
    assert call(reward.on_error("skip"), **ROWS) == values

    if names <= {"column_a", "column_b", "column_c"}:
        nothing = [None] * 4
        assert call(reward, a=nothing, b=nothing, c=nothing) == nothing


@pytest.mark.parametrize(
    ("reward", "name", "text"),
    [
        (
            1.0 * Relevance("reference") + 0.5 * Harmlessness() - 0.001 * Length(),
            "relevance+harmlessness-length",
            "1.0 * Relevance() + 0.5 * Harmlessness() - 0.001 * Length()",
        ),
        (0.5 * Length(), "0.5*length", "0.5 * Length()"),
        (-0.5 * Length() + Relevance("answer"), "-length+relevance", "-0.5 * Length() + Relevance(column='answer')"),
        (Length() - -Relevance(), "length+relevance", "Length() - -Relevance()"),
        (Length().clip(0, 9), "clip(length)", "Length().clip(low=0.0, high=9.0)"),
        (Length().clip(high=9), "clip(length)", "Length().clip(high=9.0)"),
        (Length() / Relevance(), "length_per_relevance", "Length() / Relevance()"),
        (2 * (Length() + Relevance()), "2*(length+relevance)", "2.0 * (Length() + Relevance())"),
        (
            Relevance().where(Harmlessness() > 0.5, -1),
            "where(relevance,harmlessness>0.5,-1)",
            "Relevance().where(Harmlessness() > 0.5, -1.0)",
        ),
        (linear(0, 1) * Length(), "linear(0,1)*length", "linear(0, 1) * Length()"),
        (minimum(Length(), 3), "minimum(length,3)", "minimum(Length(), 3.0)"),
        ((Length() * 2).named("twice"), "twice", "(Length() * 2.0).named('twice')"),
        ((Length() * 2).named("twice") - 1, "twice-1", "(Length() * 2.0).named('twice') - 1.0"),
        (
            A.named("x").cached(7).on_error("skip"),
            "x",
            "as_reward(column_a, name='x').cached(max_size=7).on_error('skip')",
        ),
    ],
)
def test_names_and_repr(reward, name, text):
    assert reward.__name__ == name
    assert repr(reward) == text


def test_a_raw_function_on_either_side():
    assert (A + column_b) == (A + B)
    assert (column_b + A) == (B + A)
    assert (column_b * A) == (B * A)
    assert Reward.of(column_a, name="x") == A.named("x")
    assert np.float32(2.0) * A == 2.0 * A
    with pytest.raises(TypeError):
        np.array([1.0, 2.0]) * A


def test_equality_tells_rewards_apart():
    assert as_reward(column_a) + as_reward(column_b) == A + B
    assert A + B != A - B
    assert (A > 1) != (A < 1)
    assert 0.5 * A != 0.6 * A
    assert len({Length(), Length(), Length("words")}) == 2


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_a_leaf_used_twice_is_called_once():
    CALLS.clear()
    tree = A.where(A > 0) + 2 * as_reward(column_a) + C * C
    assert call(tree, a=[1.0, -1.0], c=[1.0, 2.0]) == [4.0, 2.0]
    assert CALLS == {"a": 1, "c": 1}


def test_async_leaves_wait_together_and_sync_ones_run_beside_them():
    # Each waits for all others to have started, so that any order one after another ends in a timeout.
    started = threading.Barrier(2)
    together = {}
    threads = {}

    def judge(name, beside_sync=False):
        async def wait(completions, **kwargs):
            threads[name] = threading.current_thread()
            all_wait = together.setdefault("all wait", asyncio.Event())
            together.setdefault("names", []).append(name)
            if len(together["names"]) == 3:
                all_wait.set()
            await asyncio.wait_for(all_wait.wait(), 10)
            if beside_sync:
                await asyncio.to_thread(started.wait, 10)
            return [1.0] * len(completions)

        return as_reward(wait, name=name)

    def slow(completions, **kwargs):
        threads["slow"] = threading.current_thread()
        started.wait(10)
        return [1.0] * len(completions)

    assert call(judge("x") + judge("y") + judge("z", beside_sync=True) + slow, n=2) == [4.0, 4.0]
    assert threads["x"] is threads["y"] is threads["z"] is threading.current_thread()
    assert threads["slow"] is not threading.current_thread()


def test_an_error_beside_async_leaves_leaves_none_running():
    finished = []

    async def slow(completions, **kwargs):
        await asyncio.sleep(0.05)
        finished.append(True)
        return [1.0] * len(completions)

    def broken(completions, **kwargs):
        raise KeyError("x")

    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        call(as_reward(slow) + broken, n=1)
    assert finished == [True]


def test_the_branch_not_taken_does_not_matter():
    assert call((A / B).where(B > 0, otherwise=-1), a=[1.0, 1.0], b=[2.0, 0.0]) == [0.5, -1.0]
    assert call(A.where(B > 0, otherwise=C), a=[None, 5.0], b=[1.0, 0.0], c=[1.0, None]) == [None, None]


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(0.7), (0.7, 0.7, 0.7)),
        (linear(2, 4), (2.0, 3.0, 4.0)),
        (linear(1, 0, begin=0.5, finish=0.75), (1.0, 1.0, 0.0)),
        (cosine(1, 3), (1.0, 2.0, 3.0)),
        (piecewise([(0.0, 0.0), (0.5, 1.0), (0.5, 2.0), (1.0, 4.0)]), (0.0, 2.0, 4.0)),
        (piecewise([(0.2, 1.0), (0.8, 2.0)]), (1.0, 1.5, 2.0)),
    ],
)
def test_schedules_by_hand(schedule, values):
    assert [schedule(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    for weighted in (schedule * A, A * schedule):
        for progress, value in zip((0.0, 0.5, 1.0), values, strict=True):
            assert call(weighted, a=[2.0], trainer_state=state(progress)) == pytest.approx([2 * value])


def test_cosine_at_a_quarter():
    assert cosine(0, 1)(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)


@given(NUMBER, NUMBER, st.floats(0, 1))
def test_ramps_stay_between_their_ends(start, end, progress):
    for schedule in (linear(start, end), cosine(start, end), piecewise([(0, start), (1, end)])):
        assert min(start, end) - 1e-9 <= schedule(progress) <= max(start, end) + 1e-9
        assert (schedule(0.0), schedule(1.0)) == (start, end)


def test_progress_without_a_known_end_is_zero():
    ramp = linear(5, 7) * A
    assert call(ramp, a=[1.0]) == [5.0]
    assert call(ramp, a=[1.0], trainer_state=None) == [5.0]
    for unknown in (0, -1):
        assert training_progress(SimpleNamespace(global_step=3, max_steps=unknown)) == 0.0
        assert call(ramp, a=[1.0], trainer_state=SimpleNamespace(global_step=3, max_steps=unknown)) == [5.0]
    assert training_progress(SimpleNamespace(global_step=12, max_steps=10)) == 1.0


# --- logs -------------------------------------------------------------------------------------------------------------


def test_components_are_logged_raw_and_once():
    logs = Logs()
    tree = 3.0 * A.clip(0, 1) + linear(0, 1) * A + cosine(1, 0) * (A + B).named("both")
    call(tree, n=3, a=[2.0, 4.0, None], b=[None] * 3, trainer_state=state(0.5), **logs.kwargs())
    assert sorted(logs.metrics) == [
        ("reward_weights/both", pytest.approx(0.5)),
        ("reward_weights/column_a", 0.5),
        ("rewards/column_a/mean", 3.0),  # no mean for b: it applies to no row
    ]
    assert logs.columns == [("column_a", [2.0, 4.0, None]), ("column_b", [None] * 3)]


def test_a_plain_leaf_leaves_its_logging_to_trl():
    for leaf in (A, A.named("x"), A.cached(), sum([A])):
        logs = Logs()
        call(leaf, a=[1.0], **logs.kwargs())
        assert logs.metrics == logs.columns == []


def test_async_trees_log_too():
    logs = Logs()
    call(A + 2 * C, a=[1.0], c=[3.0], **logs.kwargs())
    assert sorted(logs.metrics) == [("rewards/column_a/mean", 1.0), ("rewards/column_c/mean", 3.0)]


def test_names_must_tell_leaves_apart():
    with pytest.raises(ValueError, match=r"two different rewards are called 'length': .*\.named\("):
        Length() + Length("words")
    assert (Length() + Length("words").named("words")).__name__ == "length+words"
    with pytest.raises(ValueError, match="'column_a' is the name of a reward inside it"):
        (A + B).named("column_a")


# --- errors -----------------------------------------------------------------------------------------------------------


def returning(values, name="bad"):
    return as_reward(lambda completions, **kwargs: values, name=name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, "high"], r"reward 'bad', row 1: 'high' is not a finite number: return None .*\.on_error\(\"skip\"\)"),
        ([1.0, -math.inf], r"reward 'bad', row 1: -inf is not a finite number"),
        ([1.0], r"reward 'bad' returned 1 values for 2 completions"),
        (3.0, r"reward 'bad' returned a float for 2 completions"),
        (torch.tensor(3.0), r"reward 'bad' returned a float for 2 completions"),
        (None, r"reward 'bad' returned a NoneType for 2 completions"),
    ],
)
@pytest.mark.parametrize("build", [lambda leaf: leaf, lambda leaf: 0.5 * leaf + 1], ids=["leaf", "composite"])
def test_bad_values_are_named(values, message, build):
    with pytest.raises(RewardError, match=message):
        call(build(returning(values)), n=2)


def test_an_exception_keeps_its_cause():
    def broken(completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'answer'") as error:
        call(0.5 * as_reward(broken), n=1)
    assert isinstance(error.value.__cause__, KeyError)
    assert isinstance(error.value, ValueError)


def test_skip_leaves_the_offending_rows_out_and_counts_them(caplog):
    logs = Logs()
    bad = returning([1.0, math.nan, "x", None]).on_error("skip")
    assert call(bad + B, n=4, b=[1.0] * 4, **logs.kwargs()) == [2.0, 1.0, 1.0, 1.0]
    assert ("rewards/bad/errors", 2.0) in logs.metrics
    assert ("rewards/bad/mean", 1.0) in logs.metrics
    assert "reward 'bad', row 1" in caplog.text

    async def broken(completions, **kwargs):
        raise OSError("no judge")

    logs = Logs()
    assert call(as_reward(broken).on_error("skip"), n=2, **logs.kwargs()) == [None, None]
    assert logs.metrics == [("rewards/broken/errors", 2.0)]
    logs = Logs()
    assert call(A.on_error("skip"), a=[1.0], **logs.kwargs()) == [1.0]
    assert logs.metrics == [("rewards/column_a/errors", 0.0)]


def test_division_by_zero():
    with pytest.raises(
        RewardError, match=r"'column_a_per_column_b', row 1: 3.0 / 0.0 is not a finite number: .*divisor > 0"
    ):
        call(A / B, a=[1.0, 3.0], b=[1.0, 0.0])
    with pytest.raises(RewardError, match=r"1e\+30 \* 1e\+30 is not a finite number in float32: clip the op"):
        call(A * B * 1e30, a=[1e30], b=[1.0])
    logs = Logs()
    assert call((A / B).on_error("skip"), n=2, a=[1.0, 3.0], b=[1.0, 0.0], **logs.kwargs()) == [1.0, None]
    assert ("rewards/column_a_per_column_b/errors", 1.0) in logs.metrics


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: A.clip(3, 1), ValueError, "clip: low=3 exceeds high=1: swap them"),
        (lambda: A.clip(math.nan, 1), ValueError, "clip: low=nan"),
        (lambda: math.nan * A, ValueError, "value=nan is not a finite number"),
        (lambda: A / 0, ZeroDivisionError, "pass a divisor other than zero"),
        (lambda: A + "org/model", TypeError, "unsupported operand"),
        (lambda: A + None, TypeError, "unsupported operand"),
        (lambda: 0.5 * Length, TypeError, "unsupported operand"),
        (lambda: A + Length, TypeError, r"Length is a class: make an object of it first, Length\(...\)"),
        (lambda: minimum(1, 2), TypeError, "holds no reward"),
        (lambda: minimum(A, "x"), TypeError, "'x' is no reward"),
        (lambda: A.where(0.5), TypeError, "condition=0.5 is not a reward"),
        (lambda: 0.2 < A < 0.8, TypeError, "no truth value"),
        (lambda: A.named(""), ValueError, "is empty"),
        (lambda: A.cached(0), ValueError, "max_size=0 keeps nothing"),
        (lambda: A.on_error("ignore"), ValueError, 'choose "raise" or "skip"'),
        (lambda: as_reward(3), TypeError, "3 is no reward"),
        (lambda: linear(0, math.inf), ValueError, "end=inf"),
        (lambda: linear(0, 1, begin=0.5, finish=0.5), ValueError, "begin < finish"),
        (lambda: piecewise([]), ValueError, "at least one"),
        (lambda: piecewise([(0.5, 1), (0.2, 1)]), ValueError, "sort the points"),
        (lambda: piecewise([(0, 1), (100, 1)]), ValueError, "shares of 1"),
    ],
)
def test_construction_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()


# --- cache ------------------------------------------------------------------------------------------------------------


class Counting:
    """Scores a completion by its length, and keeps what it was asked."""

    __name__ = "counting"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.asked.append(list(completions))
        return [None if not text else math.nan if text == "nan" else float(len(text)) for text in completions]


def test_cache_asks_for_each_row_once():
    counting = Counting()
    reward = as_reward(counting).cached()
    assert ask(reward, "a", "bb", "a", "") == [1.0, 2.0, 1.0, None]
    assert ask(reward, "bb", "ccc", "") == [2.0, 3.0, None]
    assert ask(reward, "a", "bb") == [1.0, 2.0]
    assert counting.asked == [["a", "bb", ""], ["ccc"]]


def test_cache_tells_rows_apart_by_every_column():
    counting = Counting()
    reward = as_reward(counting).cached()
    messages = [{"role": "user", "content": "a"}]
    ask(reward, messages, messages, answer=["x", "y"])
    ask(reward, [dict(messages[0])], answer=["x"])  # equal, not identical
    ask(reward, messages, answer=["z"])
    reward(prompts=["other"], completions=[messages], answer=["x"])
    assert [len(asked) for asked in counting.asked] == [2, 1, 1]


def test_cache_is_bounded_and_drops_the_least_recently_used():
    counting = Counting()
    reward = as_reward(counting).cached(max_size=2)
    ask(reward, "a")
    ask(reward, "b")
    ask(reward, "a")
    ask(reward, "c")  # drops b
    ask(reward, "a")
    ask(reward, "b")
    assert counting.asked == [["a"], ["b"], ["c"], ["b"]]
    assert ask(reward, "d", "ee", "fff", "d") == [1.0, 2.0, 3.0, 1.0]  # more rows than the cache holds


def test_cache_forgets_errors_and_names_the_row_of_the_call():
    counting = Counting()
    reward = as_reward(counting).cached()
    ask(reward, "a")
    with pytest.raises(RewardError, match="row 2: nan"):
        ask(reward, "a", "b", "nan")
    logs = Logs()
    skipping = reward.on_error("skip")
    assert ask(skipping, "nan", "a", "nan", **logs.kwargs()) == [None, 1.0, None]
    assert logs.metrics == [("rewards/counting/errors", 2.0)]
    ask(skipping, "nan", "a")
    assert counting.asked[-1] == ["nan"]


def test_cache_keeps_schedules_moving_and_hides_what_is_not_of_the_row():
    seen = {}

    def spy(completions, **kwargs):
        seen.update(kwargs)
        return [1.0] * len(completions)

    reward = (linear(0, 1) * as_reward(spy)).cached()
    logs = Logs()
    values = [ask(reward, "a", trainer_state=state(p), **logs.kwargs(), environments=[1]) for p in (0.0, 0.5, 1.0)]
    assert values == [[0.0], [0.5], [1.0]]
    assert set(seen) == {"prompts", "completion_ids"}


def test_cache_of_an_async_reward():
    CALLS.clear()
    reward = C.cached() + A
    assert call(reward, a=[1.0], c=[2.0]) == call(reward, a=[1.0], c=[2.0]) == [3.0]
    assert CALLS == {"c": 1, "a": 2}


def test_cache_is_not_pickled():
    reward = A.cached()
    call(reward, a=[1.0, 2.0])
    assert len(pickle.dumps(reward)) == len(pickle.dumps(A.cached()))
    assert not pickle.loads(pickle.dumps(reward))._memory


# --- with TRL ---------------------------------------------------------------------------------------------------------


def test_import_pulls_in_no_optional_package():
    code = (
        "import sys, trl_grpo_ext.rewards; heavy = ('torch', 'trl', 'transformers', 'sklearn', 'openai');"
        "print([name for name in ('sentence_transformers', *heavy) if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_found_by_name_as_trl_grpo_does(monkeypatch):
    reward = getattr(importlib.import_module(__name__), "total")  # noqa: B009
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert call(reward, a=[1.0], b=[2.0]) == [pytest.approx(1.997)]


async def vowels(completions, **kwargs):
    await asyncio.sleep(0)
    return count_vowels(completions)


def applies_to_vowels(completions, answer, **kwargs):
    return [1.0 if letter in "aeiou" else None for letter in answer]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_stock_trainer_logs_every_component(asynchronous, trained):
    if asynchronous and not hasattr(utils, "is_async_callable"):
        pytest.skip("stock GRPOTrainer of TRL 1.13 takes an async reward for a function only")
    reward = 2.0 * Length("words").named("words") + linear(1, 0) * as_reward(applies_to_vowels) - 0.1 * Length()
    if asynchronous:
        reward = reward + vowels
    options = {"num_generations": 2, "max_steps": 2, "log_completions": True, "cls": GRPOTrainer}
    trainer = trained(reward_funcs=reward, dataset=make_letters().select([0, 1, 2, 4]), **options)
    first, second = logs_of(trainer)
    assert first["rewards/applies_to_vowels/mean"] == 1.0
    assert (first["reward_weights/applies_to_vowels"], second["reward_weights/applies_to_vowels"]) == (1.0, 0.5)
    assert first["rewards/length/mean"] > 0
    assert first[f"rewards/{reward.__name__}/mean"] == pytest.approx(first["reward"])
    assert ("rewards/vowels/mean" in first) == asynchronous
    columns = trainer._logs["extra"]
    assert list(columns["words"]) == Length("words")([""] * 8, list(trainer._logs["completion"]))
