"""Baselines: none reads its own completion, all but the group's mean leave the gradient as it is, and they train."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import batch_of, count_vowels, logs_of, set_up, weights_of
from torch import Tensor

from trl_grpo_ext import BaselineCallback, RolloutBatch, TaskAdvantagesCallback
from trl_grpo_ext.credit.baselines import (
    errors_of_guess,
    mean_of_others,
    scaled_advantages,
    shrunk_baseline,
    std_of_others,
)
from trl_grpo_ext.credit.groups import EPS, group_advantages
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.trainer.features import callbacks_of

NUMBERS = st.floats(-10, 10, width=32)
GROUPS = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4)


def flat(groups: list[list[float]]) -> tuple[Tensor, Tensor, int]:
    rewards = torch.tensor([value for group in groups for value in group])
    ids = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    return rewards, ids, len(groups)


def forms(rewards: Tensor, ids: Tensor, count: int) -> dict[str, Tensor]:
    """Every baseline, with statistics from earlier batches: `V = 0.3`, `s = 0.7`."""
    everywhere = torch.zeros_like(ids)
    low = mean_of_others(rewards, everywhere, 1) - 0.5 * 0.7
    floored = torch.fmin(torch.full_like(low, 0.3), low)
    return {
        "leave_one_out": mean_of_others(rewards, ids, count) - 0.5 * 0.7,
        "batch": low,
        "predicted": floored,
        "shrunk": shrunk_baseline(rewards, torch.full_like(low, 0.3), ids, count, within=0.4, between=0.2),
        "shrunk, low": shrunk_baseline(rewards, floored, ids, count, within=0.4, between=0.2),
    }


# Properties


@given(groups=GROUPS, position=st.integers(0, 15), change=NUMBERS)
def test_no_baseline_reads_its_own_reward(groups, position, change):
    rewards, ids, count = flat(groups)
    position %= len(rewards)
    before = forms(rewards, ids, count)
    rewards[position] += change
    for name, baseline in forms(rewards, ids, count).items():
        torch.testing.assert_close(baseline[position], before[name][position], equal_nan=True, msg=name)


@given(groups=GROUPS)
def test_mean_and_spread_of_the_others_are_those_of_the_rest(groups):
    rewards, ids, count = flat(groups)
    means, spread = mean_of_others(rewards, ids, count), std_of_others(rewards)
    for i in range(len(rewards)):
        others = (ids == ids[i]) & (torch.arange(len(ids)) != i)
        assert means[i].item() == pytest.approx(rewards[others].double().mean().item(), abs=1e-5, nan_ok=True)
        rest = torch.cat([rewards[:i], rewards[i + 1 :]]).double()
        assert spread[i].item() == pytest.approx(rest.std().item() if len(rest) > 1 else 0.0, abs=1e-4)


@given(rows=st.lists(st.tuples(NUMBERS, st.integers(0, 5)), min_size=2, max_size=8))
def test_weighted_by_tokens_each_token_of_the_others_counts_once(rows):
    rewards, tokens = (torch.tensor(values) for values in zip(*rows, strict=True))
    ids = torch.zeros(len(rewards), dtype=torch.long)
    means = mean_of_others(rewards, ids, 1, tokens)
    advantages = scaled_advantages(rewards, torch.zeros(len(rewards)), "batch", tokens)
    for i in range(len(rewards)):
        of_tokens = [rewards[j].item() for j in range(len(rewards)) if j != i for _ in range(tokens[j])]
        expected = sum(of_tokens) / len(of_tokens) if of_tokens else math.nan
        assert means[i].item() == pytest.approx(expected, abs=1e-5, nan_ok=True)
    spread = rewards.double().repeat_interleave(tokens).std(correction=0) if tokens.sum() else torch.tensor(0.0)
    torch.testing.assert_close(advantages.double() * (spread + EPS), rewards.double(), rtol=1e-4, atol=1e-4)


@given(rewards=st.lists(NUMBERS, min_size=3, max_size=8), change=NUMBERS)
def test_the_shift_of_the_first_batch_does_not_read_its_own_reward(rewards, change):
    args, baselines = SimpleNamespace(scale_rewards="none"), []
    for first in (rewards[0], rewards[0] + change):
        callback = set_up(BaselineCallback("batch", shift=0.5), args)
        batch = make_batch([first, *rewards[1:]], torch.zeros(len(rewards), 1))
        advantage = callback.on_advantages(args=args, batch=batch)[0]
        baselines.append(batch.rewards[0].item() - advantage.item())
    assert baselines[0] == pytest.approx(baselines[1], abs=1e-4)


@given(groups=GROUPS)
def test_missing_rewards_take_no_part(groups):
    rewards, ids, count = flat(groups)
    padded = torch.cat([rewards, torch.tensor([math.nan, math.nan])])
    padded_ids = torch.cat([ids, torch.tensor([0, 0])])
    for name, baseline in forms(padded, padded_ids, count).items():
        torch.testing.assert_close(baseline[:-2], forms(rewards, ids, count)[name], equal_nan=True, msg=name)
    advantages = scaled_advantages(padded, forms(padded, padded_ids, count)["batch"], "batch")
    assert advantages[-2:].tolist() == [0.0, 0.0]
    assert advantages.isfinite().all()


@given(groups=GROUPS)
def test_a_perfect_guess_needs_no_others_and_a_useless_one_leaves_them_alone(groups):
    rewards, ids, count = flat(groups)
    guess = torch.zeros(len(rewards))
    perfect = shrunk_baseline(rewards, guess, ids, count, within=1.0, between=0.0)
    assert torch.equal(perfect, guess.double())
    others = mean_of_others(rewards, ids, count)
    useless = shrunk_baseline(rewards, guess, ids, count, within=1e-9, between=1e9)
    torch.testing.assert_close(useless, others.nan_to_num(0.0), atol=1e-6, rtol=1e-6)


# The gradient, by exact enumeration


def expected(logits: Tensor, table: Tensor, sizes: list[int], credit, moved=None, epsilon=math.inf) -> Tensor:
    """
    E[sum of A_i d log pi(a_i)] per completion, over every outcome of prompts that share one policy of three actions.

    With `moved` logits, the gradient at these of the importance-weighted objective on samples of the old ones, with
    ratios clipped as in TRL's loss.
    """
    ids = torch.tensor([p for p, n in enumerate(sizes) for _ in range(n)])
    policy = logits.softmax(0)
    now = policy if moved is None else moved.softmax(0)
    total = torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=len(ids)):
        chosen = torch.tensor(actions)
        advantages = credit(table[ids, chosen], ids, len(sizes)).double()
        score = torch.nn.functional.one_hot(chosen, 3).double() - now
        weight = (now / policy)[chosen]
        is_clipped = ((weight > 1 + epsilon) & (advantages > 0)) | ((weight < 1 - epsilon) & (advantages < 0))
        weight = weight.masked_fill(is_clipped, 0.0)
        total += policy[chosen].prod() * (advantages * weight) @ score / len(ids)
    return total


LOGITS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)
TABLE = st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=2, max_size=2)


@given(logits=LOGITS, table=TABLE, sizes=st.sampled_from([[1, 1], [2, 2], [1, 3], [3, 2]]))
def test_every_form_but_the_groups_mean_has_the_gradient_of_the_policy(logits, table, sizes):
    logits, table = torch.tensor(logits, dtype=torch.float64), torch.tensor(table, dtype=torch.float64)
    ids = torch.tensor([p for p, n in enumerate(sizes) for _ in range(n)])
    policy = logits.softmax(0)
    true = torch.zeros(3, dtype=torch.float64)
    for p in ids.tolist():  # the gradient of the mean expected reward of the completions' prompts
        true += policy * (table[p] - policy @ table[p]) / len(ids)
    for name in ("leave_one_out", "batch", "predicted", "shrunk"):
        if name == "leave_one_out" and 1 in sizes:
            continue  # a completion without others has no baseline

        def credit(rewards, ids, count, name=name):
            return scaled_advantages(rewards, forms(rewards, ids, count)[name], "none")

        torch.testing.assert_close(expected(logits, table, sizes, credit), true, atol=1e-9, rtol=1e-7, msg=name)


@given(logits=LOGITS, table=TABLE, size=st.sampled_from([2, 3]))
def test_the_groups_mean_gives_a_share_that_depends_on_its_size(logits, table, size):
    logits, table = torch.tensor(logits, dtype=torch.float64), torch.tensor(table[:1], dtype=torch.float64)

    def credit(rewards, ids, count):
        return group_advantages(rewards, ids, count, "none")

    policy = logits.softmax(0)
    true = policy * (table[0] - policy @ table[0])
    torch.testing.assert_close(expected(logits, table, [size], credit), (size - 1) / size * true, atol=1e-6, rtol=1e-5)


def test_a_shift_changes_the_gradient_of_a_second_pass_only_where_the_ratio_is_clipped():
    logits = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    table = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    moved = logits + torch.tensor([0.35, 0.0, 0.0], dtype=torch.float64)

    def credit(shift):
        return lambda rewards, ids, count: rewards - shift

    plain = expected(logits, table, [1], credit(0.0))
    torch.testing.assert_close(expected(logits, table, [1], credit(0.5)), plain)
    weighted = expected(logits, table, [1], credit(0.0), moved)
    torch.testing.assert_close(expected(logits, table, [1], credit(0.5), moved), weighted)
    clipped = [expected(logits, table, [1], credit(shift), moved, epsilon=0.2) for shift in (0.0, 0.5)]
    # The success has been pushed up by more than the clip allows, so only failures still move: up, with the shift.
    assert clipped[0].abs().max() == 0
    assert clipped[1][1:].max() < 0 < clipped[1][0]


# Arithmetic by hand


def test_errors_of_a_guess_by_hand():
    # Groups (0, 2) and (4, 6) around a guess of 3: means 1 and 5, so 4 and 4, less within / 2 = 1; within 2.
    rewards, ids = torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 1])
    assert errors_of_guess(rewards, torch.full((4,), 3.0), ids, 2) == pytest.approx((2.0, 3.0))
    assert errors_of_guess(rewards, rewards, torch.arange(4), 4) is None


def test_the_scale_is_that_of_the_difference_and_keeps_the_shift():
    rewards = torch.tensor([0.0, 1.0])
    advantages = scaled_advantages(rewards, torch.tensor([-0.5, -0.5]), "batch")
    assert advantages.tolist() == pytest.approx([0.5 / 0.5, 1.5 / 0.5], abs=1e-3)


def make_batch(rewards: list[float], features: Tensor) -> RolloutBatch:
    return batch_of({prompt: [reward] for prompt, reward in enumerate(rewards)}, prompt_features=features)


def test_the_guess_is_made_before_the_batch_is_learnt(config):
    args = config(group_size="single", baseline="predicted", scale_rewards="none")
    features = torch.eye(2).repeat(8, 1)
    callback = set_up(BaselineCallback("predicted"), args)
    first = make_batch([1.0, 0.0] * 8, features)
    advantages = callback.on_advantages(args=args, batch=first)
    # Nothing is known yet: the mean of the others, 7/15 and 8/15.
    assert advantages[:2].tolist() == pytest.approx([1 - 7 / 15, -8 / 15], abs=1e-6)
    assert "baseline/explained_variance" not in first.metrics
    for _ in range(30):
        batch = make_batch([1.0, 0.0] * 8, features)
        advantages = callback.on_advantages(args=args, batch=batch)
    # Now both prompts are known: the one that fails has nothing to be blamed for, the other one is floored at the mean.
    assert advantages[1].item() == pytest.approx(0.0, abs=0.02)
    assert advantages[0].item() == pytest.approx(1 - 7 / 15, abs=0.02)
    assert batch.metrics["baseline/explained_variance"] > 0.99
    # Unscaled, the advantages are what the baseline leaves, and their spread is smaller than that of the rewards.
    assert batch.metrics["baseline/residual_std"] == pytest.approx(advantages.std().item(), abs=1e-4)
    assert batch.metrics["baseline/residual_std"] < 0.6 * batch.metrics["baseline/reward_std"]


def test_a_baseline_by_tokens_by_hand(config):
    args = config(group_size="single", baseline="batch", token_weighted_baseline=True)
    (callback,) = (set_up(c, args) for c in callbacks_of(args) if isinstance(c, BaselineCallback))
    batch = make_batch([1.0, 0.0, 0.0], torch.zeros(3, 1))
    batch.completion_lengths = torch.tensor([2, 1, 3])
    advantages = callback.on_advantages(args=args, batch=batch)
    # Of others' tokens: 0 of 4, 2 of 5 and 2 of 3 earn 1. The spread: tokens have 1, 1, -0.4, and three times -0.667.
    left = torch.tensor([1.0, -2 / 5, -2 / 3])
    spread = torch.tensor([1.0, 1.0, -2 / 5, *[-2 / 3] * 3]).std(correction=0)
    torch.testing.assert_close(advantages, left / (spread + EPS))


@pytest.mark.parametrize("kind", ["batch", "predicted", "shrunk"])
def test_a_batch_that_fails_as_a_whole_is_not_pushed_up(kind, config):
    args = config(group_size="single", baseline=kind, baseline_shift=0.5, scale_rewards="batch")
    features = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    callback = set_up(BaselineCallback(kind, 0.5), args)
    for _ in range(3):
        callback.on_advantages(args=args, batch=make_batch([1.0, 0.0] * 8, features))
    assert callback.on_advantages(args=args, batch=make_batch([0.0] * 16, features)).tolist() == [0.0] * 16
    one = callback.on_advantages(args=args, batch=make_batch([1.0] + [0.0] * 15, features))
    assert one[0] > 1
    assert callback.on_advantages(args=args, batch=make_batch([1.0] * 16, features)).min() > 0


@pytest.mark.parametrize("kind", ["batch", "predicted", "shrunk"])
def test_a_task_that_fails_as_a_whole_is_not_pushed_up(kind, config):
    args = config(group_size="single", baseline=kind, baseline_shift=0.5, scale_rewards="batch")
    features = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    callback = set_up(TaskAdvantagesCallback("task", kind, 0.5), args)

    def advantages(rewards: list[float]) -> Tensor:
        batch = make_batch(rewards, features)
        batch.task_names, batch.tasks = ["chat", "math"], torch.tensor([0, 1] * 8)
        return callback.on_advantages(args=args, batch=batch).view(8, 2)

    for _ in range(6):
        advantages([1.0, 2.0, 0.0, 1.0] * 4)
    chat, math_ = advantages([0.0, 2.0, 0.0, 1.0] * 4).T
    assert chat.tolist() == [0.0] * 8
    assert math_.unique().numel() > 1


@pytest.mark.parametrize("by_task", [False, True])
def test_a_batch_below_a_small_first_one_has_not_failed(by_task, config):
    args = config(group_size="single", baseline="batch", baseline_shift=0.5, scale_rewards="none")
    callback = set_up(TaskAdvantagesCallback("task", "batch", 0.5) if by_task else BaselineCallback("batch", 0.5), args)
    rewards = [0.1 * k for k in range(8)]  # of which the largest is the eighth smallest
    for _ in range(5):
        batch = make_batch(rewards, torch.zeros(8, 1))
        batch.task_names, batch.tasks = ["chat"], torch.zeros(8, dtype=torch.long)
        advantages = callback.on_advantages(args=args, batch=batch)
        # Half a standard deviation below the mean of the others, which lies at the mean of all in the mean.
        assert advantages.mean().item() > 0.45 * torch.tensor(rewards).std().item()


def test_state_round_trip(config):
    args = config(group_size="single", baseline="predicted", baseline_shift=0.5, scale_rewards="batch")
    features = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    one, other = (set_up(BaselineCallback("predicted", 0.5), args) for _ in range(2))
    for _ in range(3):
        one.on_advantages(args=args, batch=make_batch([1.0, 0.0] * 8, features))
    check_savable(one.state_dict())
    other.load_state_dict(one.state_dict())
    batches = [make_batch([0.5, 0.25] * 8, features) for _ in range(2)]
    assert torch.equal(*(c.on_advantages(args=args, batch=b) for c, b in zip((one, other), batches, strict=True)))


# Real runs


OPTIONS = {
    "single": {"group_size": "single", "scale_rewards": "group"},
    "single, batch": {"group_size": "single", "baseline": "batch", "baseline_shift": 0.5},
    "single, predicted": {"group_size": "single", "baseline": "predicted", "curriculum": "predicted"},
    "pairs, shrunk": {"num_generations": 2, "baseline": "shrunk"},
    "pairs, shrunk, by tokens": {"num_generations": 2, "baseline": "shrunk", "token_weighted_baseline": True},
    "sizes from one up": {"group_size": "variance", "min_group_size": 1, "baseline": "shrunk"},
    "leave one out": {"baseline": "leave_one_out", "baseline_shift": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains(name, make_trainer):
    options = {"scale_rewards": "batch", "num_iterations": 2, **OPTIONS[name]}
    trainer = make_trainer(reward_funcs=count_vowels, max_steps=6, **options)
    before = weights_of(trainer)
    trainer.train()
    assert not all(torch.equal(before[key], value) for key, value in weights_of(trainer).items())
    logged = logs_of(trainer)
    assert all(math.isfinite(entry["loss"]) for entry in logged)
    if "single" in name:
        assert logged[0]["group_size/max"] == 1
        assert logged[0]["rollouts/informative"] > 0.5


REFUSED = {
    "group_size='single' leaves": {"group_size": "single", "baseline": "leave_one_out"},
    "divides them by the spread of one group": {"baseline": "batch"},
    "has no effect on baseline='group'": {"baseline_shift": 0.5},
    "reads the mean of a group": {"token_weighted_baseline": True},
    "whose tokens are not kept": {
        "baseline": "batch",
        "scale_rewards": "batch",
        "token_weighted_baseline": True,
        "task_column": "task",
        "task_advantages": True,
    },
    "must be finite and not negative": {"baseline": "batch", "scale_rewards": "batch", "baseline_shift": -1.0},
    "is below 2": {"group_size": "variance", "min_group_size": 1},
    "no group has any": {
        "group_size": "single",
        "baseline": "batch",
        "scale_rewards": "batch",
        "dynamic_sampling_rounds": 1,
    },
    "num_iterations=1 makes none": {"reuse_drift_limit": 0.1},
    "must be positive: try 0.1": {"reuse_drift_limit": 0.0, "num_iterations": 2},
    "'exact' is unknown": {"baseline": "exact"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_with_its_remedy(message, config):
    with pytest.raises(ValueError, match=message):
        config(**REFUSED[message])
