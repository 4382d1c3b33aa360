"""`by_task`: every row gets the reward of its task, and no other reward is asked about it."""

import asyncio
import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards import Length, RewardError, as_reward, by_task, constant, linear
from trl_grpo_ext.rewards.tasks import routes_of

VALUE = st.none() | st.floats(-100, 100)
TASKS = ["math", "chat", "code"]


def echo(a, **kwargs):
    return list(a)


async def echo_later(a, **kwargs):
    await asyncio.sleep(0)
    return list(a)


def call(reward, n, **columns):
    result = reward(prompts=["p"] * n, completions=["one two"] * n, completion_ids=[[1, 2]] * n, **columns)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([*TASKS, "other"]), VALUE), min_size=1, max_size=8),
    is_async=st.booleans(),
)
def test_each_row_gets_the_reward_of_its_task(rows, is_async):
    tasks, values = map(list, zip(*rows, strict=True))
    second = as_reward(echo_later if is_async else echo)
    reward = by_task({"math": as_reward(echo), "chat": 2.0 * second.clip(-10, 10) - 1.0, "code": -as_reward(echo)})
    of_task = {"math": lambda x: x, "chat": lambda x: 2.0 * min(max(x, -10), 10) - 1.0, "code": lambda x: -x}
    expected = [None if x is None or t not in of_task else of_task[t](x) for t, x in rows]
    assert call(reward, len(rows), task=tasks, a=values) == expected


@pytest.mark.parametrize(
    "reward",
    [
        by_task({"math": as_reward(echo), "chat": 0.1 * Length("words")}),
        by_task({"math": as_reward(echo), "chat": as_reward(echo_later)}, column="kind"),
        2.0 * by_task({"math": as_reward(echo).clip(0, 1) + linear(0, 1) * Length(), "chat": Length()}),
        by_task({"math": as_reward(echo)}).named("routed"),
    ],
)
def test_conformance(reward):
    rebuilt = eval(
        repr(reward),
        {"as_reward": as_reward, "echo": echo, "echo_later": echo_later, "Length": Length, "by_task": by_task}
        | {"linear": linear, "constant": constant},
    )
    assert rebuilt == reward == pickle.loads(pickle.dumps(reward)) == copy.deepcopy(reward)
    assert repr(rebuilt) == repr(reward)
    names = [leaf.__name__ for leaf in reward.leaves()]
    assert all(name.endswith(("_of_math", "_of_chat")) for name in names)
    assert reward.__name__ not in names
    columns = {"task": ["chat", "none"], "kind": ["chat", "none"], "a": [1.0, 1.0]}
    assert call(reward, 2, **columns)[1] is None


def test_no_other_reward_is_asked_about_a_row():
    asked = []

    def watch(completions, answer, **kwargs):
        asked.append(answer)
        return [0.0] * len(completions)

    call(by_task({"math": watch, "chat": Length("words")}), 3, task=["chat", "math", "chat"], answer=[None, "2", None])
    assert asked == [["2"]]
    call(by_task({"math": watch, "chat": Length("words")}), 1, task=["chat"], answer=[None])
    assert asked == [["2"]]


def test_metrics_of_one_leaf_in_two_tasks_stay_apart():
    logged, table = {}, {}

    def fail(completions, **kwargs):
        raise OSError("gone")

    broken = as_reward(fail).on_error("skip")
    reward = by_task({"math": broken, "chat": broken})
    columns = {"task": ["math", "chat", "chat"], "log_metric": logged.__setitem__, "log_extra": table.__setitem__}
    assert call(reward, 3, **columns) == [None, None, None]
    assert logged["rewards/fail_of_math/errors"] == 1.0
    assert logged["rewards/fail_of_chat/errors"] == 2.0
    assert "rewards/fail/errors" not in logged
    assert table == {"fail_of_math": [None] * 3, "fail_of_chat": [None] * 3}


def test_guards_inside_and_outside_hold():
    calls = []

    def flaky(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 1:
            raise OSError("once")
        return [1.0] * len(completions)

    reward = by_task({"math": as_reward(flaky).retry(2, wait=0)})
    assert call(reward, 2, task=["math", "chat"]) == [1.0, None]
    assert len(calls) == 2


def test_routes_are_found_in_any_tree():
    reward = 0.5 * by_task({"math": as_reward(echo)}, column="kind") + by_task({"chat": Length()})
    assert sorted(routes_of(reward)) == [("chat", "task"), ("math", "kind")]
    assert list(routes_of(echo)) == []


@pytest.mark.parametrize(
    ("routes", "error", "message"),
    [
        ({}, ValueError, "routes nothing"),
        ([("math", echo)], ValueError, "routes nothing"),
        ({"": echo}, ValueError, "is no name of a task"),
        ({1: echo}, ValueError, "1 is no name of a task"),
        ({"math": 1.0}, TypeError, "1.0 is no reward"),
    ],
)
def test_bad_routes(routes, error, message):
    with pytest.raises(error, match=message):
        by_task(routes)


def test_a_missing_column_is_named_and_never_skipped():
    for reward in (by_task({"math": as_reward(echo)}), by_task({"math": as_reward(echo)}).on_error("skip")):
        with pytest.raises(RewardError, match="needs the column 'task'"):
            call(reward, 1, a=[1.0])
