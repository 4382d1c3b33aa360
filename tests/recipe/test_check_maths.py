"""What a few answers say about groups and budgets: estimators without bias, bounds that hold, arithmetic by hand."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trl_grpo_ext.recipe.run_check.maths import (
    component_of,
    ended_share,
    enough_budget,
    flat_probability,
    histogram,
    informative_share,
    informative_share_of_beta,
    informative_shares,
)

rewards = st.lists(st.sampled_from([0.0, 1.0, 0.5, None]), min_size=1, max_size=7)
rates = st.fractions(min_value=0, max_value=1, max_denominator=20).map(float)


def is_flat(values):
    return len({value for value in values if value is not None}) <= 1


@given(rewards, st.data())
def test_the_estimate_is_the_mean_over_all_groups_that_could_have_been_sampled(values, data):
    size = data.draw(st.integers(1, len(values)))
    groups = list(itertools.combinations(values, size))
    assert flat_probability(values, size) == pytest.approx(sum(map(is_flat, groups)) / len(groups))


@given(rates, st.integers(2, 5), st.integers(0, 2))
def test_the_estimate_is_unbiased_for_zero_one_rewards(rate, size, more):
    count = size + more
    expected = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=count):
        passed = sum(outcome)
        probability = rate**passed * (1 - rate) ** (count - passed)
        expected += probability * informative_share([outcome], size)[0]
    assert expected == pytest.approx(1 - rate**size - (1 - rate) ** size)


@given(rates, st.integers(2, 4), st.integers(1, 3))
def test_the_bound_for_larger_groups_is_a_bound(rate, count, more):
    size = count + more
    chances = {0.0: 0.5 * (1 - rate), 1.0: 0.5 * rate, 2.0: 0.3, None: 0.2}
    expected = 0.0
    for outcome in itertools.product(chances, repeat=count):
        graded = informative_share([outcome, [0.0, 1.0, 2.0, None]], size)
        assert graded == (pytest.approx(informative_share([outcome, [0.0, 1.0, 2.0, None]], count)[0]), "at least")
        expected += math.prod(chances[value] for value in outcome) * informative_share([outcome], count)[0]
    present = [chance for value, chance in chances.items() if value is not None]
    flat = sum((chance + 0.2) ** size for chance in present) - (len(present) - 1) * 0.2**size
    assert expected <= 1 - flat + 1e-9


def test_a_larger_group_is_at_least_as_informative():
    graded = [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.5]]
    assert informative_share(graded, 3) == (pytest.approx(2 / 3), "unbiased")
    assert informative_share(graded, 8) == (pytest.approx(2 / 3), "at least")


@given(st.integers(2, 12), st.integers(1, 11), st.integers(2, 9))
def test_prompts_that_are_all_alike_need_no_distribution(total, passed, size):
    assume(passed < total)
    # Two prompts whose counts leave no variance between them once the noise of sampling is taken off.
    share = informative_share_of_beta([(passed, total)] * 3, size)
    rate = passed / total
    assert share == pytest.approx(1 - rate**size - (1 - rate) ** size)


def test_a_beta_distribution_is_found_again():
    # Uniform pass rates: of 3 answers 0, 1, 2 or 3 pass, each for a quarter of the prompts.
    passed = [(0, 3), (1, 3), (2, 3), (3, 3)]
    for size in (2, 4, 8):
        assert informative_share_of_beta(passed, size) == pytest.approx(1 - 2 / (size + 1))


def test_prompts_that_always_pass_or_always_fail_teach_nothing():
    assert informative_share([[1.0, 1.0], [0.0, 0.0]], 16) == (0.0, "fitted")
    assert informative_share([[1.0, 1.0], [1.0, 1.0]], 16)[0] == 0.0


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_larger_groups_are_informative_more_often_and_intervals_hold_the_estimate(groups):
    shares = informative_shares(groups, [2, 3])
    assert all(0 <= share.low <= share.share <= share.high <= 1 for share in shares)
    assert shares[0].share <= shares[1].share + 1e-9
    assert informative_shares(groups, [2, 3]) == shares


def test_more_answers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="size=3 is not between 1 and the 2 answers"):
        flat_probability([1.0, 0.0], 3)


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=12))
def test_budgets(pairs):
    lengths, ended = [length for length, _ in pairs], [ends for _, ends in pairs]
    shares = [ended_share(lengths, ended, budget) for budget in range(31)]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] <= 1 + 1e-9
    if all(ended):
        for budget in range(31):
            assert shares[budget] == pytest.approx(sum(length <= budget for length in lengths) / len(lengths))
    enough = enough_budget(lengths, ended, 0.5)
    if enough is not None:
        assert shares[enough] >= 0.5 - 1e-6 > shares[enough - 1] - 1e-6
    else:
        assert max(shares) < 0.5


def test_what_was_cut_counts_as_later():
    # Half end at 4, the others were cut there; of two longer ones, one ends at 6.
    assert ended_share([4, 4, 6, 8], [True, False, True, False], 6) == pytest.approx(1 - 0.75 * 0.5)


def test_components_by_hand():
    part = component_of("right", [[1.0, 3.0], [2.0, 2.0], [None, None]])
    assert (part.applies, part.low, part.high, part.mean) == (4 / 6, 1.0, 3.0, 2.0)
    assert part.spread == pytest.approx(math.sqrt(2) / 3)
    assert part.constant == pytest.approx(2 / 3)
    assert component_of("dead", [[None]]).is_constant
    assert component_of("one", [[2.0], [2.0]]).is_constant


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 9))
def test_a_histogram_counts_each_value_once(values, bins):
    assert sum(histogram(values, 0.0, 1.0, bins)) == len(values)
