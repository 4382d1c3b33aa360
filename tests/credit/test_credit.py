"""Credit of turns and trees: by hand, as properties, and unbiased where the policy decides when to stop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.credit.groups import EPS, group_advantages
from trl_grpo_ext.credit.turns import leave_one_out_advantages, plan_share, returns, spread_over_tokens, tree_advantages

NAN = math.nan

# By hand


def test_three_conversations_of_unequal_length():
    # Rewards of the turns: a = 1, 2, 3; b = 4, 0; c = 5.
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 5.0])
    parents = torch.tensor([-1, 0, 1, -1, 3, -1])
    turns = torch.tensor([0, 1, 2, 0, 1, 0])
    following = returns(rewards, parents)
    assert following.tolist() == [6.0, 5.0, 3.0, 4.0, 0.0, 5.0]
    advantages = leave_one_out_advantages(following, turns, num_groups=3)
    # Turn 1: 6 - (4 + 5) / 2, 4 - (6 + 5) / 2, 5 - (6 + 4) / 2. Turn 2: 5 - 0, 0 - 5. Turn 3: nobody else got there.
    assert advantages.tolist() == [1.5, 5.0, 0.0, -1.5, -5.0, 0.0]


def test_a_tree_of_two_by_two():
    # Plan 1 leads to 4 and 0, plan 2 to 1 and 3; both are worth 2.
    rewards = torch.tensor([NAN, NAN, 4.0, 0.0, 1.0, 3.0])
    parents = torch.tensor([-1, -1, 0, 0, 1, 1])
    levels, groups = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    values = returns(rewards, parents)
    assert values.tolist() == [2.0, 2.0, 4.0, 0.0, 1.0, 3.0]
    assert tree_advantages(values, levels, groups, 3, "none").tolist() == [0.0, 0.0, 2.0, -2.0, -1.0, 1.0]
    # Plan 2 leads to 1 and 5 now, and is worth 3: plans differ by 1, so their standard deviation is sqrt(1/2).
    values = returns(torch.tensor([NAN, NAN, 4.0, 0.0, 1.0, 5.0]), parents)
    scaled = tree_advantages(values, levels, groups, 3, "group")
    expected = [-0.5 / (0.5**0.5 + EPS), 0.5 / (0.5**0.5 + EPS), 2 / (8**0.5 + EPS), -2 / (8**0.5 + EPS)]
    torch.testing.assert_close(scaled[:4], torch.tensor(expected))
    # Scaled by batch, each level has its own standard deviation.
    scaled = tree_advantages(values, levels, groups, 3, "batch")
    assert scaled[1].item() == pytest.approx(0.5 / (values[:2].std().item() + EPS))
    assert scaled[5].item() == pytest.approx(2.0 / (values[2:].std().item() + EPS))


def test_rewards_that_do_not_apply():
    parents = torch.tensor([-1, 0, 1])
    assert returns(torch.tensor([NAN, NAN, 2.0]), parents).tolist() == [2.0, 2.0, 2.0]  # once, at the end
    assert returns(torch.tensor([1.0, NAN, 2.0]), parents).tolist() == [3.0, 2.0, 2.0]
    following = returns(torch.tensor([1.0, NAN, NAN]), parents)
    assert following[0] == 1.0
    assert following[1:].isnan().all()
    advantages = leave_one_out_advantages(torch.tensor([1.0, NAN, 4.0]), torch.tensor([0, 0, 0]), 1)
    assert advantages.tolist() == [-3.0, 0.0, 3.0]  # in no baseline, and with no advantage


# Properties


@st.composite
def trees(draw):
    """Two levels of any branching, rewards at the leaves, some of which do not apply."""
    rewards, parents, levels, groups = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        plans = draw(st.integers(2, 4))
        first, group = len(rewards), len(set(groups))
        rewards += [NAN] * plans
        parents += [-1] * plans
        levels += [0] * plans
        groups += [group] * plans
        for plan in range(first, first + plans):
            leaves = draw(st.lists(st.one_of(st.floats(-10, 10, width=32), st.just(NAN)), min_size=1, max_size=4))
            group += 1
            rewards += leaves
            parents += [plan] * len(leaves)
            levels += [1] * len(leaves)
            groups += [group] * len(leaves)
    return torch.tensor(rewards), torch.tensor(parents), torch.tensor(levels), torch.tensor(groups)


@given(trees(), st.sampled_from(["none", "group", "batch"]))
def test_credit_sums_to_zero_over_plans_and_within_each_plan(tree, scale):
    rewards, parents, levels, groups = tree
    num_groups = int(groups.max()) + 1
    advantages = tree_advantages(returns(rewards, parents), levels, groups, num_groups, scale)
    sums = torch.zeros(num_groups).index_add(0, groups, advantages)
    torch.testing.assert_close(sums, torch.zeros(num_groups), atol=1e-3, rtol=0)
    assert advantages.isfinite().all()


@given(trees())
def test_a_plan_is_worth_the_mean_of_its_implementations(tree):
    rewards, parents, levels, _ = tree
    values = returns(rewards, parents)
    for plan in (levels == 0).nonzero().flatten().tolist():
        torch.testing.assert_close(values[plan], rewards[parents == plan].nanmean(), equal_nan=True)
    torch.testing.assert_close(values[levels == 1], rewards[levels == 1], equal_nan=True)


conversations = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=4), min_size=1, max_size=6)


def flatten(rewards):
    flat = torch.tensor([reward for talk in rewards for reward in talk])
    turns = torch.tensor([turn for talk in rewards for turn in range(len(talk))])
    parents = torch.where(turns == 0, -1, torch.arange(len(turns)) - 1)
    return flat, parents, turns


@given(conversations)
def test_turns_are_credited_against_the_others_that_came_as_far(rewards):
    flat, parents, turns = flatten(rewards)
    following = returns(flat, parents)
    advantages = leave_one_out_advantages(following, turns, int(turns.max()) + 1)
    expected = []
    for talk in rewards:
        for turn in range(len(talk)):
            others = [sum(other[turn:]) for other in rewards if other is not talk and len(other) > turn]
            expected.append(sum(talk[turn:]) - sum(others) / len(others) if others else 0.0)
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-3, rtol=1e-4)


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=8), st.sampled_from(["group", "batch", "none"]))
def test_leave_one_out_is_a_multiple_of_the_group_mean_baseline(values, scale):
    values, ids = torch.tensor(values), torch.zeros(len(values), dtype=torch.long)
    expected = group_advantages(values, ids, 1, scale) * len(values) / (len(values) - 1)
    torch.testing.assert_close(leave_one_out_advantages(values, ids, 1, scale), expected, rtol=1e-4, atol=1e-4)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_advantages_reach_the_tokens_of_their_answers(lengths, per_token):
    width = max(sum(row) + len(row) for row in lengths)  # a token of glue before each answer
    tokens, expected, answer = torch.full((len(lengths), width), -1), torch.zeros(len(lengths), width), 0
    count, longest = sum(map(len, lengths)), max(map(max, lengths))
    advantages = torch.randn(count, longest) if per_token else torch.randn(count)
    for row, sizes in enumerate(lengths):
        position = 0
        for size in sizes:
            position += 1
            tokens[row, position : position + size] = answer
            expected[row, position : position + size] = advantages[answer, :size] if per_token else advantages[answer]
            position += size
            answer += 1
    assert torch.equal(spread_over_tokens(advantages, tokens), expected)


# Does the plan matter?


def test_plan_share_of_simulated_plans():
    generator = torch.Generator().manual_seed(0)
    plans, children = 4000, 4
    prompts = torch.arange(plans) // 4
    ids = torch.arange(plans).repeat_interleave(children)
    quality = torch.randn(plans, generator=generator)
    noise = torch.randn(plans * children, generator=generator)
    # Plans explain 1 / (1 + 4) of the variance here, although their means differ by noise as well.
    across, within, share = plan_share(quality[ids] + 2 * noise, ids, prompts)
    assert share.item() == pytest.approx(0.2, abs=0.03)
    assert within.item() == pytest.approx(2.0, abs=0.05)
    assert across.item() == pytest.approx((1 + 4 / children) ** 0.5, abs=0.05)
    assert plan_share(noise, ids, prompts)[2].item() == pytest.approx(0.0, abs=0.03)
    assert plan_share(torch.zeros(8), torch.arange(8) // 4, torch.tensor([0, 0]))[2].isnan()


# Unbiased where the policy decides when to stop

GO = 0.6  # how often the policy goes on, which pays 1 at the next turn, up to three turns


def simulate(num_groups: int, size: int, seed: int):
    """Conversations in which the answer decides whether there is another turn, and each turn after the first pays 1."""
    generator = torch.Generator().manual_seed(seed)
    goes = torch.rand(num_groups, size, 3, generator=generator) < GO
    reached = torch.ones_like(goes)
    reached[..., 1] = goes[..., 0]
    reached[..., 2] = goes[..., 0] & goes[..., 1]
    rewards = torch.tensor([0.0, 1.0, 1.0]).expand_as(goes).masked_fill(~reached, 0.0)
    # d log pi / d logit of going on, at each turn.
    score = torch.where(goes, 1 - GO, -GO).masked_fill(~reached, 0.0)
    return rewards.double(), reached, score.double()


def naive(rewards, reached):
    """The mean of each turn over those that reached it as a baseline, summed over the turns, for all tokens."""
    mean = rewards.sum(1, keepdim=True) / reached.sum(1, keepdim=True).clamp(min=1)
    total = ((rewards - mean) * reached).sum(-1, keepdim=True)
    return total.expand_as(rewards)


def ours(rewards, reached):
    groups, size, turns = rewards.shape
    ids = (torch.arange(groups)[:, None, None] * turns + torch.arange(turns)).expand(groups, size, turns)
    flat = reached.flatten()
    index = torch.full_like(flat, -1, dtype=torch.long)
    index[flat] = torch.arange(int(flat.sum()))
    before = torch.cat([torch.full((groups, size, 1), -1), index.view_as(reached)[..., :-1]], dim=-1)
    following = returns(rewards.flatten()[flat], before.flatten()[flat])
    advantages = torch.zeros(groups * size * turns, dtype=torch.float64)
    advantages[flat] = leave_one_out_advantages(following, ids.flatten()[flat], groups * turns)
    return advantages.view_as(rewards)


def exact():
    """Gradient of the expected return, GO + GO^2, in the logit of each turn: that of a turn counts if it is reached."""
    slope = GO * (1 - GO)
    return torch.tensor([slope * (1 + GO), GO * slope, 0.0], dtype=torch.float64)


def test_the_baseline_is_unbiased_and_the_naive_one_is_not():
    size, groups = 8, 20_000
    rewards, reached, score = simulate(groups, size, seed=0)
    expected = exact()
    # A turn that nobody else reached teaches nothing, which shrinks its gradient by the chance of that, and no more.
    alone = torch.tensor([0.0, (1 - GO) ** (size - 1), (1 - GO**2) ** (size - 1)], dtype=torch.float64)
    for method, is_unbiased in ((ours, True), (naive, False)):
        gradients = (method(rewards, reached) * score).mean(1)  # (groups, turns)
        mean, error = gradients.mean(0), gradients.std(0) / groups**0.5
        off = (mean - expected * (1 - alone)).abs() / error.clamp(min=1e-12)
        if is_unbiased:
            assert (off[:2] < 4).all(), off
            assert mean[2].abs() < 4 * error[2] + 1e-12
        else:
            assert off[0] > 20, off
            assert mean[0] < 0.5 * expected[0]  # going on pays, and the naive baseline hardly says so
