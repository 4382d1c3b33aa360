"""Gains with their noise, and pass@k: against enumeration, by hand, and by how often an interval holds the truth."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.observe.held_out import HeldOut
from trl_grpo_ext.observe.measures import values_of_tasks
from trl_grpo_ext.observe.paired import FEW_PROMPTS, NOISE, Difference, num_since_best, paired, pass_at_k

numbers = st.floats(-1e3, 1e3)


@st.composite
def samples(draw):
    count = draw(st.integers(1, 7))
    return count, draw(st.integers(0, count)), draw(st.integers(1, count))


@given(samples())
def test_pass_at_k_is_the_share_of_subsets_with_an_answer_that_passes(drawn):
    count, passed, k = drawn
    subsets = list(itertools.combinations([i < passed for i in range(count)], k))
    assert pass_at_k(count, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(samples())
def test_pass_at_k_rises_with_the_answers_that_pass_and_with_k(drawn):
    count, passed, k = drawn
    value = pass_at_k(count, passed, k)
    assert 0.0 <= value <= 1.0
    assert pass_at_k(count, passed, 1) == pytest.approx(passed / count)
    if passed < count:
        assert pass_at_k(count, passed + 1, k) >= value
    if k < count:
        assert pass_at_k(count, passed, k + 1) >= value


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_more_answers_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and the 4 answers"):
        pass_at_k(4, 1, k)


values = st.dictionaries(st.integers(0, 60), numbers, min_size=FEW_PROMPTS, max_size=40)


@given(values, numbers)
def test_what_differs_between_prompts_is_no_noise(before, shift):
    gain = paired(before, {prompt: value + shift for prompt, value in before.items()})
    assert gain.mean == pytest.approx(shift, abs=1e-9)
    assert gain.error == pytest.approx(0.0, abs=1e-9)
    assert gain.count == len(before)


@given(values, st.lists(numbers, min_size=40, max_size=40))
def test_gains_change_their_sign_with_the_direction(before, moved):
    after = {prompt: value + moved[place] for place, (prompt, value) in enumerate(before.items())}
    there, back = paired(before, after), paired(after, before)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high)
    assert {there.direction, back.direction} in ({"flat"}, {"up", "down"})


def test_a_gain_by_hand():
    before = dict.fromkeys(range(20), 0.0)
    after = {prompt: float(prompt % 2) for prompt in range(20)} | {99: 5.0}
    gain = paired(before, after)
    assert (gain.mean, gain.count) == (0.5, 20)
    assert gain.error == pytest.approx(math.sqrt(20 * 0.25 / 19 / 20))
    assert gain.low == pytest.approx(0.5 - NOISE * gain.error)
    assert gain.direction == "up"


@pytest.mark.parametrize("count", [0, 1, FEW_PROMPTS - 1])
def test_a_few_prompts_have_no_interval(count):
    gain = paired(dict.fromkeys(range(count), 0.0), dict.fromkeys(range(count), 1.0))
    assert (gain.low, gain.high, gain.direction) == (None, None, "few")
    assert math.isnan(gain.mean) if count == 0 else gain.mean == 1.0


def test_infinite_noise_is_no_direction():
    assert Difference(math.nan, math.nan, 30).direction == "flat"


def test_the_interval_holds_the_true_gain_as_often_as_it_says():
    chance, held = random.Random(0), 0
    for _ in range(2000):
        before = {prompt: chance.gauss(0, 5) for prompt in range(FEW_PROMPTS)}
        after = {prompt: value + 0.3 + chance.gauss(0, 1) for prompt, value in before.items()}
        gain = paired(before, after)
        held += gain.low <= 0.3 <= gain.high
    # Two standard errors of 20 normal differences: Student's t with 19 degrees of freedom says 0.940.
    assert held / 2000 == pytest.approx(0.940, abs=0.015)


@given(st.lists(numbers, max_size=12))
def test_values_since_the_best(drawn):
    waited, best = 0, -math.inf
    for value in drawn:
        waited = 0 if value > best else waited + 1
        best = max(best, value)
    assert num_since_best(drawn) == waited


# Tasks


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=60)
)
def test_what_is_told_of_a_task_is_what_its_own_prompts_tell(rows):
    tasks = [task for task, _, _ in rows]
    asked = [f"q{number}" for number in range(len(rows))]
    start, now = (HeldOut(asked, asked, {"total": [row[side] for row in rows]}) for side in (1, 2))
    found = values_of_tasks(now, start, tasks, [])
    for task in ("a", "b"):
        own = [number for number, other in enumerate(tasks) if other == task]
        assert (f"tasks/{task}/reward" in found) == bool(own)
        if own:
            mine = paired(*({n: held_out.scores["total"][n] for n in own} for held_out in (start, now)))
            assert found[f"tasks/{task}/reward"] == pytest.approx(sum(rows[n][2] for n in own) / len(own))
            assert found[f"tasks/{task}/reward/gain"] == pytest.approx(mine.mean)
            assert (f"tasks/{task}/reward/gain_low" in found) == (len(own) >= 20)
    assert not [name for name in found if "None" in name]
