"""Group sizes follow what a prompt's rewards did before, within bounds, in any unit of reward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import NAN, Record, args_of, batch_of, batches_of, has_answer, set_up, through_a_file

from trl_grpo_ext import (
    AdaptiveGRPOConfig,
    ThresholdGroupSizeCallback,
    VarianceGroupSizeCallback,
)
from trl_grpo_ext.plan.posterior import PromptPosterior


def bounded(low: int, high: int, **options) -> AdaptiveGRPOConfig:
    return args_of(min_group_size=low, max_group_size=high, per_device_train_batch_size=16, **options)


ARGS = bounded(2, 6)


def made(callback, num_prompts=8, args=ARGS):
    return set_up(callback, args, level=(["easy", "hard"] * num_prompts)[:num_prompts])


def sizes(callback, prompts, num_rows=16, args=ARGS) -> list[int]:
    index = torch.tensor(prompts)
    return callback.on_group_sizes(args=args, prompt_index=index, num_rows=num_rows).tolist()


# Threshold


def test_threshold_rule_by_hand_over_several_visits():
    callback = made(ThresholdGroupSizeCallback(std_threshold=0.5))
    assert sizes(callback, [0, 1, 2]) == [4, 4, 4]
    varies, flat = [0.0, 1.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]  # std 0.577 and 0
    for expected in ([5, 3, 4], [6, 2, 4], [6, 2, 4]):  # then at the bounds
        callback.on_rollouts(batch=batch_of({0: varies, 1: flat}))
        assert sizes(callback, [0, 1, 2]) == expected
    callback.on_rollouts(batch=batch_of({0: flat, 1: varies}))
    assert sizes(callback, [1, 0, 2]) == [3, 5, 4]


def test_threshold_is_in_units_of_the_reward_and_not_reached_by_equality():
    batch = batch_of({0: [0.0, 2.0, 1.0], 1: [0.0, 20.0, 10.0]})  # std exactly 1 and 10
    callback = made(ThresholdGroupSizeCallback(std_threshold=1.0))
    callback.on_rollouts(batch=batch)
    assert sizes(callback, [0, 1]) == [3, 5]


def test_threshold_learns_from_discarded_groups():
    callback = made(ThresholdGroupSizeCallback(std_threshold=0.5))
    callback.on_rollouts(batch=batch_of({0: [0.0, 2.0]}, discarded={1: [1.0, 1.0], 2: [0.0, 2.0]}))
    assert sizes(callback, [0, 1, 2, 3]) == [5, 3, 5, 4]


def test_threshold_leaves_a_group_alone_that_nothing_scored():
    callback = made(ThresholdGroupSizeCallback(std_threshold=0.5))
    callback.on_rollouts(batch=batch_of({0: [NAN] * 4, 1: [1.0, NAN, NAN, NAN]}))
    assert sizes(callback, [0, 1]) == [4, 4]


@given(st.lists(st.booleans(), max_size=20), st.integers(2, 4), st.integers(4, 9))
def test_threshold_sizes_are_a_walk_between_the_bounds(visits, low, high):
    args = bounded(low, high)
    callback = made(ThresholdGroupSizeCallback(std_threshold=0.5), args=args)
    expected = 4
    for varies in visits:
        callback.on_rollouts(batch=batch_of({3: [0.0, 2.0 * varies]}))
        expected = min(max(expected + (1 if varies else -1), low), high)
        assert sizes(callback, [3], args=args) == [expected]


def test_threshold_state_round_trip():
    first = made(ThresholdGroupSizeCallback(std_threshold=0.5))
    batch = batch_of({0: [0.0, 2.0], 1: [1.0, 1.0]})
    first.on_rollouts(batch=batch)
    second = made(ThresholdGroupSizeCallback(std_threshold=0.5))
    second.load_state_dict(through_a_file(first.state_dict()))
    for _ in range(2):
        assert sizes(second, range(8)) == sizes(first, range(8))
        for callback in (first, second):
            callback.on_rollouts(batch=batch)


# Posterior


@st.composite
def evidence(draw):
    """Some batches of (prompt, mean, std, count) with distinct prompts."""
    visit = st.tuples(st.integers(0, 4), st.floats(-1, 1, width=32), st.floats(0, 2, width=32), st.integers(2, 9))
    return draw(st.lists(st.lists(visit, min_size=1, max_size=4, unique_by=lambda v: v[0]), min_size=1, max_size=5))


def fed(posterior: PromptPosterior, batches, scale: float = 1.0) -> PromptPosterior:
    for batch in batches:
        index, mean, std, count = (torch.tensor(column) for column in zip(*batch, strict=True))
        posterior.update(index, mean * scale, std * scale, count)
    return posterior


@given(evidence(), st.floats(0, 1))
def test_posterior_without_a_pool_is_the_decayed_average(batches, decay):
    posterior = fed(PromptPosterior(5, decay=decay, prior=1e-12), batches)
    count, mean, variance = [0.0] * 5, [0.0] * 5, [0.0] * 5
    for batch in batches:
        for prompt, m, s, n in batch:
            old = decay * count[prompt]
            mean[prompt] = (old * mean[prompt] + n * m) / (old + n)
            variance[prompt] = (old * variance[prompt] + n * s**2) / (old + n)
            count[prompt] = old + n
    seen = sorted({visit[0] for batch in batches for visit in batch})
    actual = torch.stack([posterior.mean(torch.tensor(seen)), posterior.variance(torch.tensor(seen))])
    expected = torch.tensor([[mean[i] for i in seen], [variance[i] for i in seen]])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@given(evidence())
def test_posterior_lies_between_evidence_and_pool(batches):
    posterior = fed(PromptPosterior(6, decay=0.7, prior=3.0), batches)
    alone = fed(PromptPosterior(6, decay=0.7, prior=1e-12), batches)
    pool = posterior.variance(torch.tensor([5]))  # never drawn
    seen = torch.tensor(sorted({visit[0] for batch in batches for visit in batch}))
    low = torch.minimum(alone.variance(seen), pool)
    high = torch.maximum(alone.variance(seen), pool)
    variance = posterior.variance(seen)
    assert ((variance >= low - 1e-5) & (variance <= high + 1e-5)).all()


@given(evidence(), st.sampled_from([1e-3, 0.1, 100.0, 1e6]))
def test_posterior_variance_scales_with_the_square_of_the_reward(batches, scale):
    scaled = fed(PromptPosterior(5, prior=1.0), batches, scale).variance()
    torch.testing.assert_close(scaled / scale**2, fed(PromptPosterior(5, prior=1.0), batches).variance())


def test_posterior_by_hand():
    posterior = PromptPosterior(4, decay=0.5, prior=2.0)
    index, half = torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    posterior.update(index, mean=torch.tensor([0.0, 1.0]), std=torch.tensor([0.0, 1.0]), count=torch.tensor([4, 4]))
    # pool: mean 1/2 and variance 1/2; prompt 0: (4 * 0 + 2 / 2) / 6, prompt 1: (4 * 1 + 2 / 2) / 6
    assert posterior.variance().tolist() == pytest.approx([1 / 6, 5 / 6, 1 / 2, 1 / 2])
    assert posterior.mean().tolist() == pytest.approx([1 / 6, 5 / 6, 1 / 2, 1 / 2])
    assert posterior.variance(torch.tensor([1, 3])).tolist() == pytest.approx([5 / 6, 1 / 2])
    posterior.update(index, half, half.sqrt(), torch.tensor([2, 2]))
    # evidence decays from 4 to 2 completions of old and 2 of new: 0.25 and 0.75; the pool stays at 1/2
    assert posterior.variance().tolist() == pytest.approx([2 / 6, 4 / 6, 1 / 2, 1 / 2])


def test_prompt_drawn_twice_in_a_batch_counts_twice():
    twice, once = PromptPosterior(3), PromptPosterior(3)
    index = torch.tensor([1, 1])
    twice.update(index, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([2, 6]))
    once.update(index[:1], torch.tensor([0.75]), torch.tensor([0.75]).sqrt(), torch.tensor([8]))
    torch.testing.assert_close(twice.variance(), once.variance())
    torch.testing.assert_close(twice.mean(), once.mean())


def test_prompts_of_a_stratum_share_what_is_known():
    strata = torch.tensor([0, 0, 0, 1, 1, 2])
    posterior = PromptPosterior(6, decay=0.5, prior=2.0, strata=strata)
    assert posterior.variance().unique().numel() == 1
    for _ in range(20):
        posterior.update(torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([4, 4]))
    flat, unseen_flat, _, alive, unseen_alive, unseen_level = posterior.variance().tolist()
    assert 0 <= flat < unseen_flat < 0.2
    assert 0.8 < unseen_alive < alive <= 1
    assert unseen_level == pytest.approx(0.5)  # nothing seen of its level: the average of all prompts
    assert posterior.mean()[[1, 4, 5]].tolist() == pytest.approx([unseen_flat, unseen_alive, 0.5])


@given(evidence())
def test_one_stratum_is_the_same_as_none(batches):
    plain = fed(PromptPosterior(5, decay=0.7, prior=3.0), batches)
    strata = fed(PromptPosterior(5, decay=0.7, prior=3.0, strata=torch.zeros(5, dtype=torch.long)), batches)
    torch.testing.assert_close(strata.variance(), plain.variance())
    torch.testing.assert_close(strata.variance(torch.tensor([3, 1])), plain.variance(torch.tensor([3, 1])))


def test_groups_with_fewer_than_two_rewards_say_nothing():
    posterior = PromptPosterior(3)
    before = through_a_file(posterior.state_dict())
    posterior.update(torch.tensor([0, 1]), torch.tensor([5.0, NAN]), torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
    assert all(torch.equal(value, before[key]) for key, value in posterior.state_dict().items())


def test_posterior_learns_from_discarded_groups():
    posterior = PromptPosterior(4)
    posterior.observe(batch_of({0: [0.0, 2.0]}, discarded={1: [1.0, 1.0], 2: [0.0, 4.0]}))
    unseen, kept, flat, alive = posterior.variance(torch.tensor([3, 0, 1, 2])).tolist()
    assert flat < unseen < alive
    assert kept != unseen


def test_batches_of_trls_own_sampler_say_nothing():
    posterior, batch = PromptPosterior(2), batch_of({0: [0.0, 1.0]})
    batch.prompt_index = None
    posterior.observe(batch)
    assert posterior.count.tolist() == [0.0, 0.0]


def test_posterior_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="knows 3 prompts and the dataset has 4: resume with the dataset of the"):
        PromptPosterior(4).load_state_dict(PromptPosterior(3).state_dict())


def test_posterior_of_other_levels_is_refused():
    levels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="resume with"):
        PromptPosterior(3, strata=levels).load_state_dict(PromptPosterior(3).state_dict())


def test_threshold_sizes_of_another_dataset_are_refused():
    state = made(ThresholdGroupSizeCallback(), num_prompts=3).state_dict()
    with pytest.raises(ValueError, match="resume with the dataset"):
        made(ThresholdGroupSizeCallback(), num_prompts=4).load_state_dict(state)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"decay": -0.1}, {"prior": 0.0}, {"prior": -1.0}])
def test_posterior_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        PromptPosterior(3, **wrong)


def test_restored_posterior_does_not_share_memory():
    first, second = PromptPosterior(2), PromptPosterior(2)
    first.observe(batch_of({0: [0.0, 1.0]}))
    second.load_state_dict(first.state_dict())
    before = first.variance()
    second.observe(batch_of({0: [0.0, 9.0], 1: [0.0, 9.0]}))
    assert torch.equal(first.variance(), before)


# Variance


HARD, UNCERTAIN, EASY = [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]


def test_uncertain_prompts_get_more_of_the_same_number_of_rows():
    callback = made(VarianceGroupSizeCallback())
    assert sizes(callback, [0, 1, 2, 3]) == [4, 4, 4, 4]  # nothing known yet
    callback.on_rollouts(batch=batch_of({0: HARD, 1: UNCERTAIN, 2: EASY, 3: UNCERTAIN}))
    hard, uncertain, easy, also_uncertain = sizes(callback, [0, 1, 2, 3])
    assert hard + uncertain + easy + also_uncertain == 16
    assert 2 <= min(hard, easy) <= max(hard, easy) < min(uncertain, also_uncertain) <= 6


def test_a_prompt_that_becomes_certain_shrinks_again():
    callback = made(VarianceGroupSizeCallback())
    callback.on_rollouts(batch=batch_of({0: UNCERTAIN, 1: EASY, 2: EASY, 3: EASY}))
    before = sizes(callback, [0, 1, 2, 3])
    for _ in range(6):
        callback.on_rollouts(batch=batch_of({0: EASY, 1: UNCERTAIN, 2: EASY, 3: EASY}))
    after = sizes(callback, [0, 1, 2, 3])
    assert before[0] > before[1]
    assert after[0] < after[1]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=4, max_size=4),
    st.sampled_from([2.0**-20, 2.0**-4, 2.0**7, 2.0**20]),
)
def test_sizes_do_not_depend_on_the_unit_of_the_reward(rewards, scale):
    plain, scaled = made(VarianceGroupSizeCallback()), made(VarianceGroupSizeCallback())
    plain.on_rollouts(batch=batch_of(dict(enumerate([float(r) for r in g] for g in rewards))))
    scaled.on_rollouts(batch=batch_of(dict(enumerate([r * scale for r in g] for g in rewards))))
    assert sizes(scaled, [0, 1, 2, 3]) == sizes(plain, [0, 1, 2, 3])


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=8, max_size=8))
def test_variance_sizes_add_up_within_bounds_and_follow_the_posterior(rewards):
    callback = made(VarianceGroupSizeCallback())
    callback.on_rollouts(batch=batch_of(dict(enumerate(rewards))))
    prompts = [6, 2, 4, 0]
    chosen = sizes(callback, prompts)
    assert sum(chosen) == 16
    assert 2 <= min(chosen) <= max(chosen) <= 6
    variance = callback.posterior.variance(torch.tensor(prompts))
    in_order = torch.tensor(chosen)[variance.argsort()]
    spread = variance.sort().values.diff() > 1e-3 * variance.max()
    assert (in_order.diff()[spread] >= 0).all()


def test_variance_uses_as_many_prompts_as_with_a_fixed_size():
    assert len(sizes(made(VarianceGroupSizeCallback()), range(8))) == 4


def test_variance_learns_by_level_of_difficulty():
    args = bounded(2, 6, difficulty_column="level")
    callback = made(VarianceGroupSizeCallback(), args=args)  # even prompts are easy, odd ones hard
    callback.on_rollouts(batch=batch_of({0: EASY, 1: UNCERTAIN, 2: EASY, 3: UNCERTAIN}))
    easy, hard, also_easy, also_hard = sizes(callback, [4, 5, 6, 7], args=args)
    assert max(easy, also_easy) < min(hard, also_hard)


def test_variance_state_round_trip():
    first, second = made(VarianceGroupSizeCallback()), made(VarianceGroupSizeCallback())
    first.on_rollouts(batch=batch_of({0: HARD, 1: UNCERTAIN}, discarded={2: EASY}))
    second.load_state_dict(through_a_file(first.state_dict()))
    for batch in (batch_of({1: EASY, 3: UNCERTAIN}), batch_of({0: UNCERTAIN, 1: EASY})):
        assert sizes(second, [0, 1, 2, 3]) == sizes(first, [0, 1, 2, 3])
        for callback in (first, second):
            callback.on_rollouts(batch=batch)
    torch.testing.assert_close(second.posterior.variance(), first.posterior.variance(), rtol=0, atol=0)


# Real runs


def alternate(completions, prompts, **kwargs):
    """Flat for the first half of the alphabet, varying for the second."""
    return [float(i % 2) * (p[-1] > "m") for i, p in enumerate(prompts)]


@pytest.mark.parametrize("group_size", ["threshold", "variance"])
def test_real_run_grows_groups_whose_rewards_vary(group_size, trained, dataset):
    trainer = trained(
        dataset=dataset.select([0, 1, 2, 23, 24, 25]),
        reward_funcs=[alternate, has_answer],
        reward_weights=[1.0, 0.0],
        callbacks=[Record],
        group_size=group_size,
        max_steps=6,
        per_device_train_batch_size=16,
        max_completion_length=2,
    )
    varying, flat = [], []
    for batch in batches_of(trainer)[2:]:
        assert batch.group_sizes.sum() == 16
        assert batch.advantages.shape == (16,)
        for prompt, size in zip(batch.prompt_index.tolist(), batch.group_sizes.tolist(), strict=True):
            (flat if prompt < 3 else varying).append(size)
    assert sum(varying) / len(varying) > sum(flat) / len(flat) + 1
