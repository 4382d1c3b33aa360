"""Plans: sizes that add up within bounds, prompts drawn once per epoch or by weight, the same on every rank."""

import signal
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kit import args_of, set_up, state_at
from trl.trainer.utils import RepeatSampler

from trl_grpo_ext import GRPOCallback, OnlineCurriculumCallback, VarianceGroupSizeCallback
from trl_grpo_ext.hooks import RolloutPlan
from trl_grpo_ext.plan.planner import Planner
from trl_grpo_ext.plan.sampler import PromptSampler
from trl_grpo_ext.plan.sizes import fit_group_sizes, num_groups_that_fit

wish = st.one_of(st.just(0.0), st.floats(0, 1e6), st.floats(0, 1e-6))


@st.composite
def fits(draw):
    """Wishes, a number of rows they can be fitted to, and the bounds."""
    low = draw(st.integers(1, 6))
    high = draw(st.integers(low, 16))
    wishes = draw(st.lists(wish, min_size=1, max_size=12))
    rows = draw(st.integers(low * len(wishes), high * len(wishes)))
    return torch.tensor(wishes, dtype=torch.float64), rows, low, high


@st.composite
def batches(draw):
    """Rows of a generation batch and bounds as the configuration allows them: `low <= num_generations <= high`."""
    num_generations = draw(st.integers(2, 8))
    low = draw(st.integers(2, num_generations))
    high = draw(st.integers(num_generations, 20))
    return num_generations * draw(st.integers(1, 12)), num_generations, low, high


# Group sizes


@given(fits())
@settings(max_examples=200)
def test_sizes_add_up_within_bounds(case):
    wishes, rows, low, high = case
    sizes = fit_group_sizes(wishes, rows, low, high)
    assert sizes.dtype == torch.int64
    assert sizes.sum() == rows
    assert sizes.min() >= low
    assert sizes.max() <= high


@given(fits())
@settings(max_examples=200)
def test_larger_wishes_get_no_smaller_groups(case):
    wishes, rows, low, high = case
    by_wish = sorted(zip(wishes.tolist(), fit_group_sizes(wishes, rows, low, high).tolist(), strict=True))
    for (smaller, its_size), (larger, size) in combinations(by_wish, 2):
        if larger - smaller > 1e-15 * wishes.max():  # else equal, and the first gets more
            assert its_size <= size


@given(st.integers(1, 20), st.data())
def test_equal_wishes_differ_by_at_most_one_and_the_first_get_more(num_groups, data):
    rows = data.draw(st.integers(2 * num_groups, 9 * num_groups))
    sizes = fit_group_sizes(torch.full((num_groups,), data.draw(wish)), rows, 2, 9).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(fits(), st.integers(0, 60))
def test_sizes_do_not_depend_on_the_unit_of_the_wishes(case, exponent):
    wishes, rows, low, high = case
    assert torch.equal(fit_group_sizes(wishes * 2.0**exponent, rows, low, high), fit_group_sizes(*case))


@given(fits(), st.data())
def test_sizes_follow_their_wishes_through_a_permutation(case, data):
    wishes, rows, low, high = case
    assume(wishes.unique().numel() == wishes.numel())
    order = torch.tensor(data.draw(st.permutations(range(len(wishes)))))
    sizes = fit_group_sizes(wishes[order], rows, low, high)
    assert (sizes - fit_group_sizes(*case)[order]).abs().max() <= 1  # nearly equal remainders may trade one row


@given(fits())
def test_sizes_that_already_add_up_are_kept(case):
    sizes = fit_group_sizes(*case)
    assert torch.equal(fit_group_sizes(sizes.float(), *case[1:]), sizes)
    assert num_groups_that_fit(sizes.float(), *case[1:]) == sizes.numel()


def test_sizes_by_hand():
    # proportional: 16 * (1, 2, 5) / 8
    assert fit_group_sizes(torch.tensor([1.0, 2.0, 5.0]), 16, 1, 16).tolist() == [2, 4, 10]
    # the third is cut to 6, the other 10 rows are shared 1 : 2 and rounded by largest remainder (3.33, 6.67)
    assert fit_group_sizes(torch.tensor([1.0, 2.0, 99.0]), 16, 2, 7).tolist() == [3, 6, 7]
    # nobody wishes: equal shares; one wishes and cannot hold all: the rest is shared
    assert fit_group_sizes(torch.zeros(3), 10, 2, 8).tolist() == [4, 3, 3]
    assert fit_group_sizes(torch.tensor([0.0, 1.0, 0.0]), 16, 2, 6).tolist() == [5, 6, 5]
    # NaN is no wish
    assert fit_group_sizes(torch.tensor([float("nan"), 1.0]), 8, 2, 6).tolist() == [2, 6]


@pytest.mark.parametrize(("rows", "bounds"), [(5, (2, 8)), (25, (2, 8))])
def test_rows_that_cannot_be_filled_are_refused(rows, bounds):
    with pytest.raises(ValueError, match=f"3 groups of 2 to 8 completions cannot add up to {rows} rows: change the"):
        fit_group_sizes(torch.ones(3), rows, *bounds)


@given(batches(), st.data())
@settings(max_examples=200)
def test_number_of_groups_is_always_feasible(batch, data):
    rows, num_generations, low, high = batch
    fewest, most = rows // num_generations, rows // low
    wishes = torch.tensor(data.draw(st.lists(wish, min_size=fewest, max_size=most + 2)))
    count = num_groups_that_fit(wishes, rows, low, high)
    assert 1 <= count <= len(wishes)
    assert fit_group_sizes(wishes[:count], rows, low, high).sum() == rows


def test_number_of_groups_by_hand():
    wishes = torch.tensor([2.0, 4.0, 8.0, 2.0, 2.0, 2.0])
    assert num_groups_that_fit(wishes, 14, 2, 8) == 3  # 2 + 4 + 8
    assert num_groups_that_fit(wishes, 15, 2, 8) == 4  # one more starts
    assert num_groups_that_fit(wishes, 14, 2, 4) == 5  # the 8 counts as 4: 2 + 4 + 4 + 2 + 2
    assert num_groups_that_fit(torch.ones(20), 8, 2, 4) == 4  # wishes below the bound count as 2
    assert num_groups_that_fit(torch.full((6,), 99.0), 12, 2, 8) == 2  # and those above as 8
    assert num_groups_that_fit(torch.full((6,), 2.0), 9, 2, 4) == 4  # 5 groups of 2 would be too many rows


def test_too_few_candidates_are_refused():
    message = "2 candidate prompts with at most 4 completions each cannot fill 12 rows: return sizes for more"
    with pytest.raises(ValueError, match=message):
        num_groups_that_fit(torch.ones(2), 12, 2, 4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_plan_repeats_each_group(sizes):
    plan = RolloutPlan(torch.tensor(sizes))
    assert plan.group_ids.tolist() == [group for group, size in enumerate(sizes) for _ in range(size)]
    assert plan.all_of_size(3) == (set(sizes) == {3})
    assert torch.equal(RolloutPlan.equal(12, 3).group_ids, torch.arange(12) // 3)


# Prompts: epochs


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=30), st.booleans(), st.integers(0, 99))
def test_draws_are_distinct_and_epochs_visit_each_prompt_once(num_prompts, counts, shuffle, seed):
    sampler = PromptSampler(num_prompts, seed, shuffle)
    visits = Counter(dict.fromkeys(range(num_prompts), 0))
    for count in counts:
        drawn = sampler.draw(min(count, num_prompts)).tolist()
        assert len(set(drawn)) == min(count, num_prompts)
        visits.update(drawn)
        assert set(visits) == set(range(num_prompts))
        assert max(visits.values()) - min(visits.values()) <= 1


@pytest.mark.parametrize("shuffle", [True, False])
@given(num_prompts=st.integers(1, 40), count=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_first_epoch_is_in_the_order_of_trl(shuffle, num_prompts, count, seed):
    sampler = PromptSampler(num_prompts, seed, shuffle)
    ours = [i for _ in range(num_prompts // count) for i in sampler.draw(count).tolist()]
    assert ours == list(RepeatSampler(range(num_prompts), 1, batch_size=count, shuffle=shuffle, seed=seed))


def test_epochs_are_shuffled_differently():
    sampler = PromptSampler(50, seed=3)
    epochs = [sampler.draw(50).tolist() for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=12))
def test_prompts_that_are_not_kept_come_back(num_prompts, draws):
    sampler, frugal = PromptSampler(num_prompts, seed=5), PromptSampler(num_prompts, seed=5)
    for count, kept in draws:
        count = min(count, num_prompts)
        kept = min(kept, count)
        drawn = sampler.draw(count)
        sampler.keep(kept)
        assert torch.equal(drawn[:kept], frugal.draw(kept))


def test_prompts_that_are_not_kept_come_next():
    sampler = PromptSampler(6, seed=0, shuffle=False)
    assert sampler.draw(4).tolist() == [0, 1, 2, 3]
    sampler.keep(2)
    assert sampler.draw(3).tolist() == [2, 3, 4]


@given(st.integers(2, 12), st.data())
@settings(max_examples=200)
def test_excluded_prompts_are_drawn_only_when_others_run_out(num_prompts, data):
    sampler = PromptSampler(num_prompts, data.draw(st.integers(0, 99)))
    sampler.draw(data.draw(st.integers(1, num_prompts)))
    excluded = data.draw(st.sets(st.integers(0, num_prompts - 1), max_size=num_prompts - 1))
    count = data.draw(st.integers(1, num_prompts))
    weights = torch.rand(num_prompts) if data.draw(st.booleans()) else None
    drawn = sampler.draw(count, weights, exclude=torch.tensor(sorted(excluded), dtype=torch.long)).tolist()
    assert len(set(drawn)) == len(drawn) == count
    assert len(set(drawn) & excluded) == max(0, count - (num_prompts - len(excluded)))


@given(st.integers(2, 10), st.integers(0, 99), st.data())
@settings(max_examples=200)
def test_as_many_prompts_as_asked_for_after_any_history(num_prompts, seed, data):
    """Batches of nearly the whole dataset, replaced groups, prompts that come back: what is pending piles up."""
    sampler = PromptSampler(num_prompts, seed)
    for _ in range(data.draw(st.integers(1, 12))):
        count = data.draw(st.integers(max(1, num_prompts - 2), num_prompts))
        drawn = sampler.draw(count)
        assert len(set(drawn.tolist())) == len(drawn) == count
        if data.draw(st.booleans()):
            sampler.keep(data.draw(st.integers(1, count)))
        asked = data.draw(st.integers(1, count))
        fresh = sampler.draw(asked, exclude=drawn)
        assert fresh.numel() == fresh.unique().numel() == asked
        sampler.put_back(fresh[data.draw(st.integers(0, fresh.numel())) :])


def test_excluded_prompts_that_had_to_be_drawn_are_not_owed_another_visit():
    sampler = PromptSampler(4, seed=0, shuffle=False)
    assert sampler.draw(2).tolist() == [0, 1]
    assert sorted(sampler.draw(3, exclude=torch.tensor([0, 1])).tolist()) == [0, 2, 3]
    assert sorted(sampler.draw(3).tolist()) == [1, 2, 3]


# Prompts: weights


def test_weighted_draws_without_replacement_match_the_weights():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sampler, trials = PromptSampler(4, seed=0), 20_000
    seen = Counter(tuple(sampler.draw(2, weights).tolist()) for _ in range(trials))
    p = (weights / weights.sum()).tolist()
    expected = {(i, j): trials * p[i] * p[j] / (1 - p[i]) for i, j in permutations(range(4), 2)}
    chi_square = sum((seen[pair] - n) ** 2 / n for pair, n in expected.items())
    assert chi_square < 24.7  # 99 % quantile with 11 degrees of freedom; the seed is fixed


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=20), st.integers(0, 999))
def test_prompts_of_weight_zero_come_last(weights, seed):
    weights = torch.tensor(weights)
    drawn = PromptSampler(len(weights), seed).draw(len(weights), weights)
    positive = int((weights > 0).sum())
    assert (weights[drawn[:positive]] > 0).all()
    assert sorted(drawn.tolist()) == list(range(len(weights)))


def test_draws_are_uniform_when_all_weights_are_zero():
    sampler, excluded = PromptSampler(20, seed=0), torch.arange(10)
    draws = [sampler.draw(5, torch.zeros(20), exclude=excluded) for _ in range(20)]
    assert set(torch.cat(draws).tolist()) == set(range(10, 20))
    assert all(draw.unique().numel() == 5 for draw in draws)


def test_weights_matter_only_relative_to_each_other():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
    for exponent in (-110, -50, 50, 100):
        scaled = weights * 2.0**exponent
        for seed in range(50):
            expected = PromptSampler(6, seed).draw(6, weights)
            assert torch.equal(PromptSampler(6, seed).draw(6, scaled), expected), exponent


def test_draws_differ_from_each_other_and_between_seeds():
    sampler, weights = PromptSampler(100, seed=1), torch.ones(100)
    draws = [sampler.draw(10, weights).tolist() for _ in range(5)]
    draws.append(PromptSampler(100, seed=2).draw(10, weights).tolist())
    assert len({tuple(draw) for draw in draws}) == 6


def test_keep_leaves_weighted_draws_alone():
    sampler, frugal, weights = PromptSampler(9, seed=1), PromptSampler(9, seed=1), torch.ones(9)
    sampler.draw(5)
    frugal.draw(5)
    for s in (sampler, frugal):
        s.draw(4, weights)
    sampler.keep(2)
    assert torch.equal(sampler.draw(9), frugal.draw(9))
    assert torch.equal(sampler.draw(9, weights), frugal.draw(9, weights))


# State

step = st.tuples(st.integers(0, 10), st.booleans(), st.booleans())


def play(sampler: PromptSampler, steps) -> list[list[int]]:
    drawn = []
    for count, weighted, excludes in steps:
        weights = torch.arange(10.0) if weighted else None
        drawn.append(sampler.draw(count, weights, torch.tensor([1, 2]) if excludes else None).tolist())
        sampler.keep(count // 2)
    return drawn


@given(st.lists(step, max_size=8), st.lists(step, max_size=8))
def test_restored_sampler_continues_identically(before, after):
    sampler = PromptSampler(10, seed=4)
    play(sampler, before)
    state = dict(sampler.state_dict())
    restored = PromptSampler(10, seed=4)
    play(restored, after)  # what it did before must not show
    for _ in range(2):  # the state is not used up
        restored.load_state_dict(state)
        played = play(restored, after)
    assert played == play(sampler, after)


# Planner


class Wishes(GRPOCallback):
    """Wishes by prompt, for all candidates or only the first few."""

    def __init__(self, wishes, first=None):
        self.wishes = torch.tensor(wishes)
        self.first = first

    def on_group_sizes(self, prompt_index, **kwargs):
        return self.wishes[prompt_index[: self.first]]


class Weights(GRPOCallback):
    def __init__(self, factor=None):
        self.factor = factor
        self.seen = None

    def on_prompt_weights(self, weights, **kwargs):
        self.seen = weights.clone()
        return None if self.factor is None else weights * self.factor


STATE = state_at(0)


def planner(num_prompts, rows=16, num_generations=4, low=2, high=8) -> Planner:
    options = {"num_generations": num_generations, "min_group_size": low, "max_group_size": high}
    args = args_of(per_device_train_batch_size=rows, seed=0, **options)
    return Planner(args, Dataset.from_dict({"prompt": torch.zeros(num_prompts, dtype=torch.int8).numpy()}))


@given(batches(), st.data())
@settings(max_examples=80)
def test_plans_fill_the_rows_with_distinct_prompts(batch, data):
    rows, num_generations, low, high = batch
    num_prompts = rows // num_generations + data.draw(st.integers(0, 40))
    callbacks = [Wishes(data.draw(st.lists(wish, min_size=num_prompts, max_size=num_prompts)))]
    if data.draw(st.booleans()):
        callbacks.append(Weights(torch.rand(num_prompts)))
    ours = planner(num_prompts, rows, num_generations, low, high)
    for _ in range(3):
        plan = ours.plan(callbacks, STATE, None)
        assert plan.group_sizes.sum() == rows
        assert low <= plan.group_sizes.min() <= plan.group_sizes.max() <= high
        assert plan.prompt_index.unique().numel() == plan.prompt_index.numel() == plan.group_sizes.numel()


def test_sizes_are_fixed_unless_a_callback_chooses():
    for callbacks in ([], [Weights()]):
        plan = planner(10).plan(callbacks, STATE, None)
        assert plan.group_sizes.tolist() == [4, 4, 4, 4]
        assert plan.prompt_index.unique().numel() == 4


def test_smaller_wishes_bring_more_prompts():
    # two completions each: 8 prompts; eight each: 2 prompts
    assert planner(20).plan([Wishes([2.0] * 20)], STATE, None).group_sizes.tolist() == [2] * 8
    assert planner(20).plan([Wishes([8.0] * 20)], STATE, None).group_sizes.tolist() == [8, 8]


def test_candidates_that_are_not_used_come_next():
    ours, reference = planner(30), PromptSampler(30, seed=0)
    sizes = Wishes([8.0] * 30)
    for _ in range(5):
        assert torch.equal(ours.plan([sizes], STATE, None).prompt_index, reference.draw(2))


def test_only_the_first_candidates_may_be_sized():
    plan = planner(20).plan([Wishes([5.0] * 20, first=4)], STATE, None)
    assert plan.group_sizes.tolist() == [4, 4, 4, 4]
    with pytest.raises(ValueError, match=r"1 candidate prompts .* cannot fill 16 rows"):
        planner(20).plan([Wishes([5.0] * 20, first=1)], STATE, None)


def test_the_last_answer_of_the_hooks_counts():
    class Silent(GRPOCallback):
        def on_group_sizes(self, **kwargs):
            return None

    assert planner(20).plan([Silent()], STATE, None).group_sizes.tolist() == [4] * 4
    assert planner(20).plan([Wishes([8.0] * 20), Silent()], STATE, None).group_sizes.tolist() == [8, 8]
    assert planner(20).plan([Wishes([8.0] * 20), Wishes([2.0] * 20)], STATE, None).group_sizes.tolist() == [2] * 8


class Lays(GRPOCallback):
    """One group for each of the first prompts, of the wished sizes."""

    def on_plan(self, prompt_index, num_rows, sizes, **kwargs):
        if sizes is None:
            return None
        count = int((sizes.cumsum(0) <= num_rows).sum())
        return RolloutPlan(sizes[:count].long(), prompt_index[:count])


class LaysBlindly(GRPOCallback):
    def on_plan(self, prompt_index, num_rows, **kwargs):
        return RolloutPlan(torch.full((2,), num_rows // 2), prompt_index[:2])


def test_a_plan_is_laid_out_by_the_sizes_that_another_callback_wishes():
    assert planner(20).plan([Wishes([8.0] * 20), Lays()], STATE, None).group_sizes.tolist() == [8, 8]
    assert planner(20).plan([Lays(), Wishes([2.0] * 20)], STATE, None).group_sizes.tolist() == [2] * 8
    assert planner(20).plan([Lays()], STATE, None).group_sizes.tolist() == [4] * 4  # nobody wished, so it lays out none


def test_sizes_that_a_plan_does_not_read_are_refused():
    assert planner(20).plan([LaysBlindly()], STATE, None).group_sizes.tolist() == [8, 8]
    with pytest.raises(ValueError, match=r"Wishes chooses group sizes, and LaysBlindly.*take the argument `sizes`"):
        planner(20).plan([LaysBlindly(), Wishes([2.0] * 20)], STATE, None)


def test_weights_pass_from_hook_to_hook():
    first, silent, last = Weights(torch.arange(20.0)), Weights(), Weights(torch.tensor(2.0))
    ours = planner(20)
    for _ in range(20):
        assert 0 not in ours.plan([first, silent, last], STATE, None).prompt_index
    assert first.seen.tolist() == [1.0] * 20
    assert silent.seen.tolist() == last.seen.tolist() == list(range(20))


@pytest.fixture
def no_hang():
    """Fail instead of waiting for a draw that never ends."""

    def stop(*args):
        raise TimeoutError("the draw did not end")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_weights_that_are_none_are_refused(value, no_hang):
    factor = torch.ones(20)
    factor[7] = value
    with pytest.raises(ValueError, match="on_prompt_weights"):
        planner(20).plan([Weights(factor)], STATE, None)


def test_weights_of_another_length_are_refused(no_hang):
    class Short(GRPOCallback):
        def on_prompt_weights(self, weights, **kwargs):
            return weights[:5]

    with pytest.raises(ValueError, match="on_prompt_weights"):
        planner(20).plan([Short()], STATE, None)


def test_ranks_agree():
    def play(ours: Planner, steps=6):
        callbacks = [Weights(torch.arange(1.0, 31.0)), Wishes([float(i % 7) for i in range(30)])]
        plans = []
        for i in range(steps):
            plan = ours.plan(callbacks[i % 2 :], STATE, None)
            replaced = torch.arange(plan.group_sizes.numel()) % 2 == 0
            again = ours.replace(callbacks[i % 2 :], plan, replaced, STATE, None)
            plans += [plan.prompt_index, plan.group_sizes, again.prompt_index, again.group_sizes]
        return [tensor.tolist() for tensor in plans]

    first, second = planner(30), planner(30)
    assert play(first) == play(second)
    restored = planner(30)
    restored.load_state_dict(first.state_dict())
    assert play(restored) == play(first) != play(planner(30))


@pytest.mark.parametrize("weighted", [False, True])
@given(data=st.data())
def test_replace_replaces_only_what_is_asked(weighted, data):
    ours = planner(12)
    callbacks = [Weights(torch.arange(1.0, 13.0))] if weighted else []
    for _ in range(data.draw(st.integers(1, 6))):
        plan = ours.plan(callbacks, STATE, None)
    replaced = torch.tensor(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    again = ours.replace(callbacks, plan, replaced, STATE, None)
    assert torch.equal(again.group_sizes, plan.group_sizes)
    assert torch.equal(again.prompt_index[~replaced], plan.prompt_index[~replaced])
    assert not torch.isin(again.prompt_index[replaced], plan.prompt_index).any()
    assert again.prompt_index.unique().numel() == 4


def test_prompts_are_distinct_after_replacing_from_a_small_dataset():
    for num_prompts in (4, 5, 6, 7):
        ours = planner(num_prompts)
        for _ in range(40):
            plan = ours.plan([], STATE, None)
            plan = ours.replace([], plan, torch.tensor([True, True, True, False]), STATE, None)
            assert plan.prompt_index.unique().numel() == 4, num_prompts


# Scale


def test_a_million_prompts_are_planned_with_little_state():
    num_prompts = 1_000_000
    ours, column = planner(num_prompts, rows=64, num_generations=8, low=4, high=16), torch.zeros(num_prompts).numpy()
    callbacks = [OnlineCurriculumCallback(), VarianceGroupSizeCallback()]
    for callback in callbacks:
        set_up(callback, ours.args, prompt=column)
    for chosen in (callbacks, callbacks[1:]):
        plan = ours.plan(chosen, STATE, None)
        assert plan.group_sizes.sum() == 64
        assert plan.prompt_index.unique().numel() == plan.prompt_index.numel()
    states = [ours.state_dict(), *(callback.state_dict() for callback in callbacks)]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert any(tensor.numel() == num_prompts for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) < 100e6
    assert all(isinstance(value, torch.Tensor | int | float | list) for state in states for value in state.values())
