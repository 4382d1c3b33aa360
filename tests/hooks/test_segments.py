"""Reductions over groups equal plain loops, whatever the sizes of the groups and the order of their rows."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NAN, close, loop_mean_std, ragged

from trl_grpo_ext.hooks.segments import flat_groups, group_mean_std, total_rewards


@given(ragged())
def test_mean_std_and_count_equal_a_plain_loop(case):
    rewards, ids, num_groups = case
    mean, std, count = group_mean_std(torch.stack([rewards, rewards * 3 - 1], dim=1), ids, num_groups)
    for group in range(num_groups):
        own = rewards[ids == group].tolist()
        for column, values in enumerate([own, [3 * value - 1 for value in own]]):
            expected = loop_mean_std(values)
            close(torch.stack([mean[group, column], std[group, column]]), torch.tensor(expected, dtype=torch.float64))
            assert count[group, column] == sum(not math.isnan(value) for value in values)


@given(ragged())
def test_a_group_is_flat_when_it_has_at_most_one_distinct_reward(case):
    rewards, ids, num_groups = case
    flat = flat_groups(rewards, ids, num_groups)
    for group in range(num_groups):
        distinct = {value for value in rewards[ids == group].tolist() if not math.isnan(value)}
        assert flat[group] == (len(distinct) <= 1)


@given(ragged(), st.floats(-2, 2), st.floats(-2, 2))
def test_total_is_the_sum_over_the_rewards_that_apply(case, first, second):
    rewards, _, _ = case
    columns = torch.stack([rewards, rewards.flip(0)], dim=1)
    expected = []
    for row in columns.tolist():
        parts = [w * value for w, value in zip((first, second), row, strict=True) if not math.isnan(value)]
        expected.append(sum(parts) if parts else NAN)
    weights = torch.tensor([first, second], dtype=torch.float64)
    close(total_rewards(columns, weights), torch.tensor(expected, dtype=torch.float64))


@given(ragged(), st.data())
def test_nothing_depends_on_the_order_of_the_rows(case, data):
    rewards, ids, num_groups = case
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    for one, other in zip(group_mean_std(rewards[order], ids[order], num_groups), group_mean_std(*case), strict=True):
        close(one, other)
    assert torch.equal(flat_groups(rewards[order], ids[order], num_groups), flat_groups(*case))


@given(ragged())
def test_infinite_rewards_count_as_missing(case):
    rewards, ids, num_groups = case
    infinite = torch.where(rewards.isnan(), torch.tensor(math.inf).double(), rewards)
    for one, other in zip(group_mean_std(infinite, ids, num_groups), group_mean_std(*case), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(flat_groups(infinite, ids, num_groups), flat_groups(*case))


def test_flat_groups_by_hand():
    rewards = torch.tensor([0.1, 0.1, 0.1, NAN, NAN, NAN, 7.0, 0.0, 0.0, 1e-30, -5.0])
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 4])
    assert flat_groups(rewards, ids, 5).tolist() == [True, True, True, False, True]


def test_total_rewards_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]])
    assert total_rewards(rewards, torch.tensor([2.0, -0.5])).tolist()[:3] == [1.0, -1.0, 2.0]
    assert total_rewards(rewards, torch.tensor([2.0, -0.5]))[3].isnan()
    # A weight of zero still scores the row; a reward that does not apply does not count at all.
    assert total_rewards(rewards, torch.tensor([0.0, 1.0])).tolist()[:3] == [2.0, 2.0, 0.0]
