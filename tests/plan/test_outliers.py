"""What is believed of a reward: ordinary ones untouched, broken ones held, and a broken start is noticed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import args_of, batch_of, set_up

from trl_grpo_ext import BaselineCallback, TaskMixingCallback
from trl_grpo_ext.credit.tasks import Moments
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.plan.outliers import RECENT, UsualRange
from trl_grpo_ext.plan.predictor import RidgePredictor

BROKEN = [1e6, -1e6, 1e20, -1e20, 1e38]


@given(
    values=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12), min_size=1, max_size=30),
    unit=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.sampled_from([0.0, -1e3, 1e3]),
)
def test_values_within_twenty_usual_distances_are_untouched(values, unit, shift):
    usual, unit = UsualRange(), torch.tensor(unit, dtype=torch.float64)
    for batch in values:
        # Steps of 0.1: none is farther from another than twenty of the smallest distances.
        raw = ((torch.tensor(batch, dtype=torch.float64) * 9).round() / 10 + shift) * unit
        torch.testing.assert_close(usual.believed(raw), raw, rtol=1e-12, atol=0)
        assert not usual.is_spoilt()


@given(position=st.integers(0, 15), broken=st.sampled_from(BROKEN), seed=st.integers(0, 50))
def test_one_broken_value_among_others_is_held(position, broken, seed):
    usual = UsualRange()
    values = torch.rand(16, generator=torch.Generator().manual_seed(seed))
    values[position] = broken
    held = usual.believed(values)
    assert held.abs().max() < 25
    others = torch.arange(16) != position
    torch.testing.assert_close(held[others], values[others].double())
    assert not usual.is_spoilt()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_start_is_noticed_once(broken):
    usual = UsualRange()
    usual.believed(torch.tensor([0.0, 0.0, broken, 0.0]))
    usual.believed(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert [usual.is_spoilt(), usual.is_spoilt()] == [True, False]


def test_rare_successes_beside_a_small_penalty_are_usual():
    usual, draws = UsualRange(), torch.Generator().manual_seed(0)
    for _ in range(20):
        rewards = (torch.rand(64, generator=draws) < 0.05).float() - 1e-4 * torch.rand(64, generator=draws)
        held = usual.believed(rewards)
    torch.testing.assert_close(held, rewards.double())


def test_rewards_that_are_equal_but_for_rounding_are_no_distance():
    usual = UsualRange()
    alike = torch.tensor([0.5, 0.5, 0.5 + 1e-8, 0.5 - 1e-8, 0.5 + 1e-8], dtype=torch.float64)
    values = torch.cat([alike, torch.tensor([0.25, 0.75, 3.0], dtype=torch.float64)])
    assert torch.equal(usual.believed(values), values)
    # Where nothing else is known, they are all there is.
    assert torch.equal(UsualRange().believed(alike), alike)


def test_a_new_level_is_followed():
    usual, draws = UsualRange(), torch.Generator().manual_seed(0)
    for level in (0.0, 1e5):
        for _ in range(10):
            rewards = level + torch.rand(64, generator=draws)
            held = usual.believed(rewards)
            usual.is_spoilt()
        torch.testing.assert_close(held, rewards.double())


def test_missing_and_infinite_values_say_nothing():
    usual = UsualRange()
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    torch.testing.assert_close(usual.believed(values), values.double(), equal_nan=True)
    assert usual.seen == 0


def test_the_state_goes_on():
    one = UsualRange()
    one.believed(torch.rand(RECENT + 5))
    other = UsualRange()
    other.load_state_dict(one.state_dict())
    check_savable(one.state_dict())
    more = torch.tensor([0.5, 1e9])
    assert torch.equal(one.believed(more), other.believed(more))
    with pytest.raises(ValueError, match="'recent' is missing"):
        other.load_state_dict({})


# What stands on it


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("first", [True, False])
def test_one_broken_reward_is_soon_forgotten(broken, first):
    healthy, spoilt = RidgePredictor(2), RidgePredictor(2)
    draws = torch.Generator().manual_seed(0)
    for step in range(12):
        features = torch.randn(8, 2, generator=draws)
        targets = (features[:, 0] > 0).float()
        healthy.learn(features, targets)
        spoilt.learn(
            features, targets if step != (0 if first else 6) else targets.index_fill(0, torch.tensor(3), broken)
        )
    unseen = torch.randn(50, 2, generator=draws)
    assert (healthy.predict(unseen) - spoilt.predict(unseen)).abs().max() < 20
    for _ in range(60):
        features = torch.randn(8, 2, generator=draws)
        for predictor in (healthy, spoilt):
            predictor.learn(features, (features[:, 0] > 0).float())
    torch.testing.assert_close(healthy.predict(unseen), spoilt.predict(unseen), atol=0.05, rtol=0)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("kind", ["leave_one_out", "batch", "predicted", "shrunk"])
@pytest.mark.parametrize("first", [True, False])
def test_baselines_survive_one_broken_reward(kind, broken, first):
    args, moments = args_of(scale_rewards="batch"), []
    for value in (None, broken):
        callback = set_up(BaselineCallback(kind, shift=0.5))
        draws = torch.Generator().manual_seed(0)
        for step in range(120):
            rewards = (torch.rand(8, 4, generator=draws) < 0.5).float()
            features = torch.randn(8, 3, generator=draws)
            if value is not None and step == (0 if first else 10):
                rewards[2, 1] = value
            batch = batch_of(dict(enumerate(rewards.tolist())), prompt_features=features)
            callback.on_advantages(args=args, batch=batch)
        check_savable(callback.state_dict())
        moments.append(callback.moments)
    assert moments[1] == pytest.approx(moments[0], rel=0.1, abs=0.01)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_batch_that_fails_as_a_whole_is_known_in_spite_of_one_broken_reward(broken):
    args = args_of(scale_rewards="batch")
    callback = set_up(BaselineCallback("batch", shift=0.5))
    for rewards in ([[0.0, 1.0]] * 8, [[0.0, broken]] * 1 + [[0.0, 1.0]] * 7, [[0.0, 1.0]] * 8):
        callback.on_advantages(args=args, batch=batch_of(rewards))
    assert callback.on_advantages(args=args, batch=batch_of([[0.0, 0.0]] * 8)).tolist() == [0.0] * 16


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("first", [True, False])
def test_moments_of_tasks_survive_one_broken_reward(broken, first):
    healthy, spoilt = Moments(0.9), Moments(0.9)
    draws = torch.Generator().manual_seed(0)
    for step in range(100):
        values, tasks = torch.rand(8, generator=draws), torch.tensor([0, 1] * 4)
        healthy.add(["a", "b"], tasks, values)
        if step == (0 if first else 10):
            values = values.index_fill(0, torch.tensor(3), broken)
        spoilt.add(["a", "b"], tasks, values)
    for one, other in ((healthy.mean(["a", "b"]), spoilt.mean(["a", "b"])), (healthy.std("ab"), spoilt.std("ab"))):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_the_mixture_of_tasks_survives_one_broken_reward(first):
    shares = []
    for value in (None, 1e20):
        callback = set_up(TaskMixingCallback("task"), prompt=["p"] * 4, task=["a", "a", "b", "b"])
        draws = torch.Generator().manual_seed(0)
        for step in range(80):
            rewards = (torch.rand(4, 4, generator=draws) < 0.5).float()
            if value is not None and step == (0 if first else 10):
                rewards[0, 1] = value
            tasks = torch.tensor([0, 0, 1, 1]).repeat_interleave(4)
            groups = dict(enumerate(rewards.tolist()))
            callback.on_rollouts(batch=batch_of(groups, tasks=tasks, task_names=["a", "b"]))
        check_savable(callback.state_dict())
        shares.append(callback.shares())
    torch.testing.assert_close(shares[0], shares[1], rtol=0.2, atol=0.02)
