"""Advantages are segment reductions: equal to a plain loop over groups, whatever their sizes and the order of rows."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NAN, close, loop_mean_std, ragged
from trl import GRPOTrainer

from trl_grpo_ext.credit.groups import EPS, group_advantages, normalize_then_sum
from trl_grpo_ext.hooks.segments import total_rewards

SCALES = ["group", "batch", "none"]


def loop_groups(rewards: torch.Tensor, ids: torch.Tensor) -> list[list[float]]:
    """For each row, the rewards of its group."""
    return [[r for r, j in zip(rewards.tolist(), ids.tolist(), strict=True) if j == i] for i in ids.tolist()]


def loop_advantages(rewards: torch.Tensor, ids: torch.Tensor, scale: str) -> torch.Tensor:
    advantages = []
    for reward, group in zip(rewards.tolist(), loop_groups(rewards, ids), strict=True):
        mean, std = loop_mean_std(group)
        divisor = {"group": std + EPS, "batch": loop_mean_std(rewards.tolist())[1] + EPS, "none": 1.0}[scale]
        advantages.append(0.0 if math.isnan(reward) else (reward - mean) / divisor)
    return torch.tensor(advantages, dtype=torch.float64)


# Properties


@pytest.mark.parametrize("scale", SCALES)
@given(case=ragged())
def test_advantages_equal_a_plain_loop(scale, case):
    rewards, ids, num_groups = case
    close(group_advantages(rewards, ids, num_groups, scale), loop_advantages(rewards, ids, scale))


@given(ragged(), st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_normalize_then_sum_equals_a_plain_loop(case, weights):
    rewards, ids, num_groups = case
    columns = [rewards, rewards.flip(0)]
    normalized = []
    for column in columns:
        groups = loop_groups(column, ids)
        stats = [loop_mean_std(group) for group in groups]
        normalized.append([(r - m) / (s + EPS) for r, (m, s) in zip(column.tolist(), stats, strict=True)])
    totals = []
    for row in zip(*normalized, strict=True):
        parts = [w * value for w, value in zip(weights, row, strict=True) if not math.isnan(value)]
        totals.append(sum(parts) if parts else NAN)
    mean, std = loop_mean_std(totals)
    advantages = [0.0 if math.isnan(total) else (total - mean) / (std + EPS) for total in totals]
    weights = torch.tensor(weights, dtype=torch.float64)
    total, actual = normalize_then_sum(torch.stack(columns, dim=1), weights, ids, num_groups)
    close(total, torch.tensor(totals, dtype=torch.float64))
    close(actual, torch.tensor(advantages, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "none"])
@given(case=ragged(), shift=st.integers(-50, 50))
def test_shifting_one_group_changes_nothing(scale, case, shift):
    rewards, ids, num_groups = case
    shifted = rewards + torch.where(ids == 0, shift, 0)
    close(group_advantages(shifted, ids, num_groups, scale), group_advantages(rewards, ids, num_groups, scale))


@given(case=ragged(), shift=st.integers(-50, 50))
def test_shifting_all_rewards_changes_nothing_when_scaled_by_the_batch(case, shift):
    rewards, ids, num_groups = case
    shifted = group_advantages(rewards + shift, ids, num_groups, "batch")
    close(shifted, group_advantages(rewards, ids, num_groups, "batch"))


@pytest.mark.parametrize("scale", SCALES)
@given(case=ragged())
def test_advantages_of_each_group_have_mean_zero(scale, case):
    rewards, ids, num_groups = case
    sums = torch.zeros(num_groups, dtype=torch.float64)
    sums.index_add_(0, ids, group_advantages(rewards, ids, num_groups, scale))
    close(sums, torch.zeros_like(sums))


@pytest.mark.parametrize("scale", SCALES)
@given(case=ragged(), data=st.data())
def test_shuffling_rows_shuffles_advantages(scale, case, data):
    rewards, ids, num_groups = case
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    expected = group_advantages(rewards, ids, num_groups, scale)[order]
    close(group_advantages(rewards[order], ids[order], num_groups, scale), expected)


@pytest.mark.parametrize("scale", SCALES)
@given(case=ragged(), data=st.data())
def test_relabelling_groups_changes_nothing(scale, case, data):
    rewards, ids, num_groups = case
    label = torch.tensor(data.draw(st.permutations(range(num_groups))))
    expected = group_advantages(rewards, ids, num_groups, scale)
    assert torch.equal(group_advantages(rewards, label[ids], num_groups, scale), expected)


# By hand


@pytest.mark.parametrize("scale", SCALES)
def test_flat_groups_get_exactly_zero(scale):
    for value, size, dtype in itertools.product(
        [0.1, 1 / 3, 1e-8, 123456.789], [1, 3, 7, 10], [torch.float32, torch.float64]
    ):
        rewards = torch.tensor([value] * size + [NAN, 0.0, 1.0], dtype=dtype)
        ids = torch.tensor([0] * (size + 1) + [1, 1])
        advantages = group_advantages(rewards, ids, 2, scale)
        assert advantages[: size + 1].tolist() == [0.0] * (size + 1)
        assert advantages[-1] == -advantages[-2] > 0


@pytest.mark.parametrize("scale", SCALES)
def test_group_of_one_and_group_without_rewards_get_zero(scale):
    rewards = torch.tensor([5.0, NAN, NAN, 0.0, 2.0])
    advantages = group_advantages(rewards, torch.tensor([0, 1, 1, 2, 2]), 3, scale)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[4] > 0


@pytest.mark.parametrize("scale", SCALES)
def test_batch_without_any_reward_gets_zeros(scale):
    assert group_advantages(torch.full((4,), NAN), torch.tensor([0, 0, 1, 1]), 2, scale).tolist() == [0.0] * 4


def test_ragged_groups_by_hand():
    rewards = torch.tensor([0.0, 3.0, 0.0, 1.0, NAN, 5.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    # means 1 and 3; deviations -1, 2, -1 and -2, 2; stds sqrt(3) and sqrt(8); all: mean 1.8, std sqrt(18.8 / 4)
    none = [-1.0, 2.0, -1.0, -2.0, 0.0, 2.0]
    group = [a / (math.sqrt(3.0 if i < 3 else 8.0) + EPS) for i, a in enumerate(none)]
    batch = [a / (math.sqrt(18.8 / 4) + EPS) for a in none]
    for scale, expected in {"none": none, "group": group, "batch": batch}.items():
        close(group_advantages(rewards, ids, 2, scale), torch.tensor(expected))


def test_advantages_keep_dtype():
    for dtype in (torch.float32, torch.float64):
        rewards, ids = torch.tensor([0.0, 1.0], dtype=dtype), torch.zeros(2, dtype=torch.long)
        assert group_advantages(rewards, ids, 1).dtype == dtype
        assert normalize_then_sum(rewards[:, None], torch.ones(1), ids, 1)[1].dtype == dtype


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="scale_rewards='std' is unknown: use 'group', 'batch' or 'none'"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), 1, "std")


# Against TRL: its own numbers, from a real step


def table(name: str, rewards: list[float | None]):
    """A reward function that returns the given rewards, one per row of the only batch."""

    def function(completions, **kwargs):
        assert len(completions) == len(rewards)
        return rewards

    function.__name__ = name
    return function


# Four groups of four: ordinary; flat with a row that nothing scores; nothing scored but one row; nothing scored.
FIRST = [0.0, 1.0, 2.5, None, 1.0, 1.0, None, 1.0, None, 4.0, None, None, None, None, None, None]
SECOND = [3.0, None, -1.0, 0.5, 2.0, 2.0, None, 2.0, None, None, None, None, None, None, None, None]
THIRD = [0.0, 10.0, 0.0, None, 0.0, 0.0, None, 0.0, None, 1.0, None, None, None, None, None, None]


@pytest.mark.parametrize(
    ("scale", "aggregation"),
    [(scale, "sum_then_normalize") for scale in SCALES] + [("group", "normalize_then_sum")],
)
def test_equal_groups_give_trls_own_advantages(scale, aggregation, trained):
    overrides = {"per_device_train_batch_size": 16, "max_steps": 1, "scale_rewards": scale, "max_completion_length": 2}
    overrides |= {"multi_objective_aggregation": aggregation, "reward_weights": [1.0, 0.5, -2.0]}
    tables = [table("first", FIRST), table("second", SECOND), table("third", THIRD)]
    trainer = trained(reward_funcs=tables, cls=GRPOTrainer, **overrides)
    logged = [list(trainer._logs["rewards"][name]) for name in ("first", "second", "third")]
    rewards = torch.tensor(logged).T
    expected = torch.tensor(list(trainer._logs["advantages"]))
    ids = torch.arange(4).repeat_interleave(4)
    if aggregation == "normalize_then_sum":
        actual = normalize_then_sum(rewards, trainer.reward_weights, ids, 4)[1]
    else:
        actual = group_advantages(total_rewards(rewards, trainer.reward_weights), ids, 4, scale)
    assert rewards.shape == (16, 3)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
