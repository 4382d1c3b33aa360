"""Clipping bounds rewards, keeps their order and what does not apply, and shows in the logs without changing them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import batch_of, count_vowels, has_answer

from trl_grpo_ext import GRPOCallback, RewardClipCallback, RolloutBatch
from trl_grpo_ext.credit.groups import group_advantages
from trl_grpo_ext.hooks.segments import total_rewards
from trl_grpo_ext.shape.clipping import clip_to_quantiles, clip_to_range

NAN, INF = math.nan, math.inf
values = st.lists(st.one_of(st.floats(-1e6, 1e6, width=32), st.just(NAN)), min_size=1, max_size=12).map(torch.tensor)
bounds = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2, unique=True).map(sorted)
quantiles = st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted)


def one_group(rewards: list[list[float]]) -> RolloutBatch:
    return batch_of([rewards])


def assert_keeps_order_and_nan(before, after):
    assert torch.equal(before.isnan(), after.isnan())
    valid = ~before.isnan()
    assert (after[valid][before[valid].argsort()].diff() >= 0).all()


def equal(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), equal_nan=True)


# Properties


@given(values, bounds)
def test_range_bounds_keeps_and_is_idempotent(rewards, bounds):
    low, high = bounds
    clipped = clip_to_range(rewards, low, high)
    assert_keeps_order_and_nan(rewards, clipped)
    valid = clipped[~rewards.isnan()]
    assert ((valid >= low) & (valid <= high)).all()
    inside = (rewards >= low) & (rewards <= high)
    assert torch.equal(clipped[inside], rewards[inside])
    torch.testing.assert_close(clip_to_range(clipped, low, high), clipped, rtol=0, atol=0, equal_nan=True)


@given(values, quantiles)
def test_quantiles_bound_and_keep(rewards, quantiles):
    clipped = clip_to_quantiles(rewards, *quantiles)
    assert_keeps_order_and_nan(rewards, clipped)
    valid = ~rewards.isnan()
    if valid.any():
        low, high = np.nanquantile(rewards.double().numpy(), quantiles)
        slack = 1e-6 * rewards[valid].abs().max().item()
        assert ((clipped[valid] >= low - slack) & (clipped[valid] <= high + slack)).all()
        inside = (rewards > low + slack) & (rewards < high - slack)
        assert torch.equal(clipped[inside], rewards[inside])


@given(values, quantiles, st.data())
def test_quantiles_do_not_depend_on_the_order_of_rows(rewards, quantiles, data):
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    torch.testing.assert_close(
        clip_to_quantiles(rewards[order], *quantiles), clip_to_quantiles(rewards, *quantiles)[order], equal_nan=True
    )


@given(values, quantiles)
def test_each_column_has_its_own_quantiles(rewards, quantiles):
    columns = [rewards, rewards.flip(0) * 100 + 7, torch.full_like(rewards, NAN)]
    clipped = clip_to_quantiles(torch.stack(columns, dim=1), *quantiles)
    alone = torch.stack([clip_to_quantiles(column, *quantiles) for column in columns], dim=1)
    torch.testing.assert_close(clipped, alone, rtol=0, atol=0, equal_nan=True)
    assert clipped[:, 2].isnan().all()


@given(values)
def test_quantiles_zero_to_one_change_nothing(rewards):
    torch.testing.assert_close(clip_to_quantiles(rewards, 0.0, 1.0), rewards, rtol=0, atol=0, equal_nan=True)


# By hand


def test_range_by_hand():
    equal(clip_to_range(torch.tensor([-11.0, -10.0, 0.5, NAN, INF]), -10, 10), [-10.0, -10.0, 0.5, NAN, 10.0])


def test_quantiles_by_hand():
    # of 0, 10, .., 100 the 5th percentile is 5 and the 95th is 95 by linear interpolation
    rewards = torch.arange(0.0, 101.0, 10.0)
    equal(clip_to_quantiles(rewards, 0.05, 0.95), [5.0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95])
    # NaN takes no part: of 1, 2, 4 the quantiles 1/4 and 3/4 are 1.5 and 3
    equal(clip_to_quantiles(torch.tensor([NAN, 4.0, 1.0, NAN, 2.0]), 0.25, 0.75), [NAN, 3.0, 1.5, NAN, 2.0])


@pytest.mark.parametrize("outlier", [-INF, INF])
def test_infinite_reward_does_not_spoil_the_others(outlier):
    rewards = torch.tensor([outlier, 0.0, 1.0, 2.0, 3.0, 4.0])
    clipped = clip_to_quantiles(rewards, 0.05, 0.95)
    assert not clipped.isnan().any()
    assert clipped[2:5].tolist() == [1.0, 2.0, 3.0]


def test_range_is_applied_before_quantiles():
    batch = one_group([[0.0, 0.0], [10.0, 1.0], [1000.0, 2.0]])
    clipped = RewardClipCallback((0, 20), (0.0, 0.75)).on_rewards(batch=batch)
    equal(clipped, [[0.0, 0.0], [10.0, 1.0], [15.0, 1.5]])  # of 0, 10, 20 the quantile 3/4 is 15


def test_share_of_clipped_rewards_is_logged():
    batch = one_group([[-3.0, NAN], [0.0, 5.0], [3.0, NAN], [1.0, NAN]])
    equal(
        RewardClipCallback((-1, 1)).on_rewards(batch=batch),
        [[-1.0, NAN], [0.0, 1.0], [1.0, NAN], [1.0, NAN]],
    )
    expected = {"reward_clip/frac": 3 / 5, "reward_clip/first/frac": 2 / 4, "reward_clip/second/frac": 1.0}
    assert batch.metrics == expected


def test_total_is_clipped_instead_of_each():
    batch = one_group([[-3.0, 1.0], [5.0, -4.0], [NAN, 2.0], [NAN, NAN]])
    callback = RewardClipCallback((-1, 1), on="total")
    assert callback.on_rewards(batch=batch) is None
    equal(callback.on_total_rewards(batch=batch), [-1.0, 1.0, 1.0, NAN])
    assert batch.metrics == {"reward_clip/frac": 2 / 3}
    assert RewardClipCallback((-1, 1)).on_total_rewards(batch=batch) is None


def test_batch_without_rewards_is_left_alone():
    batch = one_group([[NAN, NAN], [NAN, NAN]])
    equal(RewardClipCallback((0, 1), (0.1, 0.9)).on_rewards(batch=batch), [[NAN, NAN], [NAN, NAN]])
    assert math.isnan(batch.metrics["reward_clip/frac"])


def test_callback_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to do: set `clip_range`, `quantiles` or both"):
        RewardClipCallback()


# Real runs


class Count(GRPOCallback):
    calls = 0

    def on_rewards(self, **kwargs):
        self.calls += 1


OPTIONS = {"scale_rewards": "none", "max_completion_length": 16, "max_steps": 1}


def big(completions, **kwargs):
    """Large, spread out, a function of the completion alone."""
    return [100.0 * len(c) + ord(c[0]) if c else 0.0 for c in completions]


def small(completions, **kwargs):
    return [len(c) / 100 if len(c) % 3 else None for c in completions]


def table_of(trainer, rows=8) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards per function and advantages of the last rows of TRL's completions table."""
    rewards = torch.tensor([list(column) for column in trainer._logs["rewards"].values()]).T
    return rewards[-rows:], torch.tensor(list(trainer._logs["advantages"]))[-rows:]


def test_training_is_clipped_and_evaluation_and_logged_means_are_not(trained, dataset):
    options = {"reward_funcs": big, "reward_clip_range": [0.0, 900.0], **OPTIONS}
    evaluation = {"eval_dataset": dataset.select(range(2)), "eval_strategy": "steps", "eval_steps": 1}
    count = Count()
    trainer = trained(callbacks=[count], per_device_eval_batch_size=8, **evaluation, **options)
    logs, eval_logs = trainer.state.log_history[:2]
    ids = torch.arange(2).repeat_interleave(4)
    # The evaluation came last. Its advantages are those of raw rewards.
    raw, advantages = table_of(trainer)
    assert (raw > 900).any()
    torch.testing.assert_close(advantages, group_advantages(raw[:, 0], ids, 2, "none"))
    assert eval_logs["eval_reward"] == pytest.approx(raw.mean().item())
    assert not any("clip/frac" in key for key in eval_logs)
    assert count.calls == 1
    # Training: a step of the same seed without evaluation leaves its table.
    raw, advantages = table_of(trained(**options))
    assert (raw > 900).any()
    torch.testing.assert_close(advantages, group_advantages(raw[:, 0].clamp(0, 900), ids, 2, "none"))
    assert logs["reward"] == logs["rewards/big/mean"] == pytest.approx(raw.mean().item())
    assert logs["reward_clip/frac"] == logs["reward_clip/big/frac"] == pytest.approx((raw > 900).float().mean().item())


@pytest.mark.parametrize("on", ["each", "total"])
def test_two_functions_are_clipped_each_or_in_total(on, trained):
    options = {"reward_clip_quantiles": [0.2, 0.8], "reward_clip_on": on, "reward_weights": [0.01, 20.0], **OPTIONS}
    trainer = trained(reward_funcs=[big, small], per_device_train_batch_size=16, **options)
    raw, advantages = table_of(trainer, rows=16)
    weights = torch.tensor([0.01, 20.0])
    each = total_rewards(torch.stack([clip_to_quantiles(c, 0.2, 0.8) for c in raw.T], dim=1), weights)
    total = clip_to_quantiles(total_rewards(raw, weights), 0.2, 0.8)
    assert not torch.allclose(each, total)
    rewards = each if on == "each" else total
    expected = group_advantages(rewards, torch.arange(4).repeat_interleave(4), 4, "none")
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    logged = {key for key in trainer.state.log_history[0] if key.startswith("reward_clip/")}
    names = {"reward_clip/big/frac", "reward_clip/small/frac"} if on == "each" else set()
    assert logged == {"reward_clip/frac"} | names


def test_total_cannot_be_clipped_after_normalisation(make_trainer):
    options = {"reward_clip_range": [-1, 1], "multi_objective_aggregation": "normalize_then_sum"}
    with pytest.raises(ValueError, match=r"normalize_then_sum.*already normalised: use reward_clip_on='each'"):
        make_trainer(reward_funcs=[count_vowels, has_answer], reward_clip_on="total", **options)
    make_trainer(reward_funcs=[count_vowels, has_answer], **options)
