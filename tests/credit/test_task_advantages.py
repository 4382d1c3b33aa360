"""Advantages of each task: no baseline reads its own completion, and no task depends on the rewards of another."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import NAN, args_of, batch_of, set_up, through_a_file

from trl_grpo_ext import TaskAdvantagesCallback
from trl_grpo_ext.config import BASELINES
from trl_grpo_ext.credit.tasks import Moments, std_of_others_of

NAMES = ["chat", "math"]
NUMBERS = st.floats(-10, 10, width=32)
GROUPS = st.lists(st.tuples(st.integers(0, 1), st.lists(NUMBERS, min_size=1, max_size=4)), min_size=1, max_size=5)
PAST = [(0, [0.0, 1.0, 0.5]), (1, [20.0, -10.0]), (1, [5.0])]


def batch(groups, **fields):
    """Groups, each with its task, in a batch with features that tell the prompts apart."""
    tasks = torch.tensor([task for task, rewards in groups for _ in rewards])
    features = torch.tensor([[float(number), task * 1.0] for number, (task, _) in enumerate(groups)])
    rewards = [rewards for _, rewards in groups]
    return batch_of(rewards, **{"tasks": tasks, "task_names": NAMES, "prompt_features": features, **fields})


def callback_of(baseline="batch", shift=0.5, scale_rewards="batch", past=(PAST, PAST)):
    args = args_of(scale_rewards=scale_rewards, baseline=baseline)
    callback = set_up(TaskAdvantagesCallback("task", baseline, 0.0 if baseline == "group" else shift), args)
    for groups in past:
        callback.on_advantages(args=args, batch=batch(groups))
    return callback, args


# Properties


@settings(max_examples=30, deadline=None)
@given(groups=GROUPS, position=st.integers(0, 19), change=NUMBERS, has_past=st.booleans())
@pytest.mark.parametrize("baseline", [name for name in BASELINES if name != "group"])
def test_no_baseline_reads_its_own_reward(baseline, groups, position, change, has_past):
    def baselines(seen):
        callback, _ = callback_of(baseline, past=(PAST, PAST) if has_past else ())
        return callback._baseline(seen, NAMES, seen.tasks)

    seen = batch(groups)
    position %= len(seen.rewards)
    before = baselines(seen)
    seen.rewards[position] += change
    torch.testing.assert_close(baselines(seen)[position], before[position], equal_nan=True, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(groups=GROUPS, other=st.lists(NUMBERS, min_size=1, max_size=4))
@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_the_rewards_of_another_task_do_not_matter(baseline, groups, other):
    callback, args = callback_of(baseline)
    alone = [group for group in groups if group[0] == 0] or [(0, [1.0, 2.0])]
    mine = sum(len(rewards) for _, rewards in alone)
    together = callback.on_advantages(args=args, batch=batch([*alone, (1, other)]))
    callback, args = callback_of(baseline)
    expected = callback.on_advantages(args=args, batch=batch(alone))
    torch.testing.assert_close(together[:mine], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@example(scale=4.0, level=1.6013908189006258, groups=[(0, [0.0]), (0, [0.0, 0.0, 0.0, 3.0])])
@given(scale=st.floats(0.01, 100), level=st.floats(-100, 100), groups=GROUPS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_scale_and_level_of_a_task_drop_out(baseline, scale, level, groups):
    def advantages(factor, shift):
        def moved(batches):
            return [(task, [factor * r + shift if task else r for r in rewards]) for task, rewards in batches]

        callback, args = callback_of(baseline, past=(moved(PAST), moved(PAST)))
        return callback.on_advantages(args=args, batch=batch(moved(groups)))

    torch.testing.assert_close(advantages(scale, level), advantages(1.0, 0.0), rtol=2e-2, atol=2e-2)


@given(batches=st.lists(st.lists(st.integers(-10, 10).map(float), min_size=1, max_size=5), min_size=1, max_size=4))
def test_moments_that_forget_nothing_are_those_of_all(batches):
    moments = Moments(forget=1.0)
    for values in batches:
        moments.add(["math"], torch.zeros(len(values), dtype=torch.long), torch.tensor(values))
    everything = torch.tensor([value for values in batches for value in values]).double()
    assert moments.mean(["math"]).item() == pytest.approx(everything.mean().item(), abs=1e-6)
    if len(everything) > 1:
        assert moments.std(["math"]).item() == pytest.approx(everything.std().item(), abs=1e-6)


# By hand


def test_each_task_has_its_own_unit():
    callback, args = callback_of("group", past=())
    seen = batch([(0, [0.0, 1.0]), (1, [-10.0, 10.0])])
    advantages = callback.on_advantages(args=args, batch=seen)
    half = 0.5 / (0.5**0.5 + 1e-4)
    assert advantages.tolist() == pytest.approx([-half, half, -half, half], rel=1e-3)
    assert seen.metrics == pytest.approx({"tasks/chat/scale": 0.5**0.5, "tasks/math/scale": 200**0.5})


def test_the_only_completion_of_its_task_is_compared_with_the_past():
    callback, args = callback_of("batch", shift=0.0, scale_rewards="none", past=([(0, [1.0, 3.0])],))
    advantages = callback.on_advantages(args=args, batch=batch([(0, [5.0]), (1, [7.0])]))
    assert advantages.tolist() == [3.0, 0.0]  # of math nothing is known


def test_one_reward_has_no_unit():
    callback, args = callback_of("batch", shift=0.0, past=())
    assert callback.on_advantages(args=args, batch=batch([(0, [5.0]), (1, [7.0])])).tolist() == [0.0, 0.0]


def test_rows_without_a_task_are_a_task_of_their_own():
    callback, args = callback_of("batch", shift=0.0, scale_rewards="none", past=())
    seen = batch([(0, [1.0, 3.0])], tasks=torch.tensor([0, 0]))
    seen = batch_of([[1.0, 3.0], [100.0, 102.0]], tasks=torch.tensor([0, 0, -1, -1]), task_names=["chat"])
    assert callback.on_advantages(args=args, batch=seen).tolist() == [-2.0, 2.0, -2.0, 2.0]


def test_completions_without_reward_get_nothing():
    callback, args = callback_of("batch")
    advantages = callback.on_advantages(args=args, batch=batch([(0, [1.0, NAN]), (1, [NAN])]))
    assert advantages.isfinite().all()
    assert advantages[1:].tolist() == [0.0, 0.0]


def test_spreads_of_others_by_hand():
    spreads = std_of_others_of(torch.tensor([0.0, 1.0, 3.0, 5.0]), torch.tensor([0, 0, 0, 1]), 2)
    assert spreads.tolist() == pytest.approx([2**0.5, 4.5**0.5, 0.5**0.5, NAN], nan_ok=True)


@pytest.mark.parametrize("baseline", ["batch", "shrunk"])
def test_it_goes_on_where_it_was(baseline):
    one, args = callback_of(baseline)
    other, _ = callback_of(baseline, past=())
    other.load_state_dict(through_a_file(one.state_dict()))
    first, second = (callback.on_advantages(args=args, batch=batch(PAST)) for callback in (one, other))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="'chat' is"):
        other.load_state_dict({**one.state_dict(), "rewards": {"of": {"chat": [1.0, NAN, 0.0]}, "usual": {}}})


def test_it_refuses_to_scale_by_group():
    with pytest.raises(ValueError, match="no effect on scale_rewards='group'"):
        set_up(TaskAdvantagesCallback("task"), args_of(), prompt=["a"])
    with pytest.raises(ValueError, match="baseline='mean' is unknown"):
        TaskAdvantagesCallback("task", "mean")
