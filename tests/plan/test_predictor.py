"""The guess for prompts never seen: it learns what features say, forgets, ignores units, and switches itself off."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import Record, args_of, batch_of, batches_of, set_up

from trl_grpo_ext import (
    GRPOCallback,
    PredictedCurriculumCallback,
    VarianceGroupSizeCallback,
)
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.plan.posterior import PromptPosterior
from trl_grpo_ext.plan.predictor import RidgePredictor, prompt_text, text_features


def drawn(seed: int, count: int, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# The predictor


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), seed=st.integers(0, 9))
def test_units_of_features_and_targets_have_no_effect(scale, shift, seed):
    one, other = RidgePredictor(4), RidgePredictor(4)
    for batch in range(3):
        features = drawn(seed + batch, 16)
        targets = features @ torch.tensor([1.0, -2.0, 0.0, 0.5])
        one.learn(features, targets)
        other.learn(scale * features.double() + shift, scale * targets.double() + shift)
    unseen = drawn(99, 8)
    predicted = other.predict(scale * unseen.double() + shift)
    torch.testing.assert_close(predicted, scale * one.predict(unseen) + shift, rtol=1e-3, atol=1e-2 * scale)


def test_it_learns_a_line_and_follows_when_it_turns():
    predictor, weights = RidgePredictor(4), torch.tensor([1.0, -1.0, 0.0, 2.0])
    unseen = drawn(1000, 64)
    for sign in (1.0, -1.0):
        for batch in range(40):
            features = drawn(batch, 32)
            predictor.learn(features, sign * features @ weights)
        error = (predictor.predict(unseen) - sign * unseen @ weights).square().mean()
        assert error < 0.02 * (unseen @ weights).var()


def test_where_features_say_nothing_it_becomes_the_mean():
    predictor = RidgePredictor(30)
    noise = torch.Generator().manual_seed(1)
    for batch in range(60):
        predictor.learn(drawn(batch, 16, 30), torch.randn(16, generator=noise) + 3)
    predicted = predictor.predict(drawn(1000, 200, 30))
    assert predicted.mean().item() == pytest.approx(3, abs=0.3)
    assert predicted.var() < 0.15  # of targets with variance 1


def test_missing_targets_and_broken_features_are_left_out():
    predictor, clean = RidgePredictor(2), RidgePredictor(2)
    features, targets = drawn(0, 6, 2), torch.arange(6.0)
    clean.learn(features[:4], targets[:4])
    features[4, 0], targets[5] = math.inf, math.nan
    predictor.learn(features, targets)
    assert torch.equal(predictor.predict(features[:4]), clean.predict(features[:4]))
    predictor.learn(features[:0], targets[:0])
    assert predictor.count == 4


def test_state_round_trip_and_a_wrong_one_is_refused_by_key():
    one, other = RidgePredictor(3), RidgePredictor(3)
    for batch in range(4):
        one.learn(drawn(batch, 8, 3), drawn(batch, 8, 3)[:, 0])
    check_savable(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.predict(drawn(9, 5, 3)), other.predict(drawn(9, 5, 3)))
    with pytest.raises(ValueError, match="'sum_xx'"):
        RidgePredictor(4).load_state_dict({**one.state_dict(), "sum_x": torch.zeros(4, dtype=torch.float64)})


# Features of a text


@given(st.lists(st.text(max_size=40), max_size=5))
def test_features_of_any_text_are_finite_and_its_own(texts):
    features = text_features(texts)
    assert features.shape == (len(texts), 64)
    assert features.isfinite().all()
    assert torch.equal(text_features(texts[::-1]), features.flip(0))


def test_texts_of_messages():
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert prompt_text([{"role": "user", "content": parts}]) == "What is it?"
    assert prompt_text("plain") == "plain"


# The posterior


@pytest.mark.parametrize("size", [1e3, 1e6, 1e20, 1e30])
def test_one_broken_reward_does_not_decide_what_is_expected_of_all(size):
    clean, hit = PromptPosterior(8), PromptPosterior(8)
    index, count = torch.arange(4), torch.full((4,), 4.0)
    for batch in range(10):
        mean, std = torch.full((4,), 0.5), torch.full((4,), 0.5)
        clean.update(index, mean, std, count)
        hit.update(index, mean.clone(), std.clone(), count)
        if batch == 4:
            hit.update(torch.tensor([7]), torch.tensor([size]), torch.tensor([size]), torch.tensor([4.0]))
    check_savable(hit.state_dict())
    torch.testing.assert_close(hit.variance(), clean.variance())
    torch.testing.assert_close(hit.mean(), clean.mean())


def test_a_broken_reward_in_the_first_batch_is_forgotten_as_soon_as_others_are_known():
    posterior = PromptPosterior(4)
    posterior.update(torch.tensor([3]), torch.tensor([1e20]), torch.tensor([1e25]), torch.tensor([4.0]))
    assert posterior.variance().isfinite().all()
    for _ in range(8):
        posterior.update(torch.arange(3), torch.full((3,), 0.5), torch.full((3,), 0.5), torch.full((3,), 4.0))
    assert posterior.variance().max() <= 0.5
    assert posterior.mean().abs().max() <= 1


# The curriculum


def test_hopeless_prompts_never_drawn_are_avoided():
    texts = [f"translate {a}" for a in "abcdefgh"] + [f"guess {a}" for a in "abcdefgh"]
    callback = set_up(PredictedCurriculumCallback(), prompt=texts)
    seen = [0, 1, 2, 3, 8, 9, 10, 11]
    for batch in range(6):
        rewards = [float(batch % 2 == i % 2) for i in range(4)] + [0.0] * 4
        made = batch_of({prompt: [reward] for prompt, reward in zip(seen, rewards, strict=True)})
        callback.on_rollouts(batch=made)
    weights = callback.on_prompt_weights(weights=torch.ones(16))
    assert weights[4:8].min() > 3 * weights[12:].max()  # none of these was ever drawn
    assert made.metrics["curriculum/effective_prompts"] <= 16


def test_prompts_never_drawn_get_sizes_by_the_guess():
    texts = [f"translate {a}" for a in "abcdefgh"] + [f"guess {a}" for a in "abcdefgh"]
    options = {"num_generations": 4, "min_group_size": 1, "baseline": "batch", "scale_rewards": "batch"}
    args = args_of(per_device_train_batch_size=32, **options)
    guess = set_up(PredictedCurriculumCallback(), args, prompt=texts)
    sized = set_up(VarianceGroupSizeCallback(), args, others=[guess], prompt=texts)
    unseen = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    assert sized.on_group_sizes(args=args, prompt_index=unseen, num_rows=32).tolist() == [4] * 8
    for _ in range(6):
        made = batch_of({prompt: [0.0, 1.0] if prompt < 8 else [0.0, 0.0] for prompt in (0, 1, 2, 3, 8, 9, 10, 11)})
        guess.on_rollouts(batch=made)
        sized.on_rollouts(batch=made)
    sizes = sized.on_group_sizes(args=args, prompt_index=unseen, num_rows=32)
    assert sizes.sum() == 32
    assert sizes[:4].min() > 2 * sizes[4:].max()


def test_what_the_guess_foresees_of_prompts_never_drawn_is_logged_apart():
    texts = [f"translate {a}" for a in "abcdefgh"] + [f"guess {a}" for a in "abcdefgh"]
    callback = set_up(PredictedCurriculumCallback(), prompt=texts)
    for _ in range(6):
        seen = batch_of({0: [1.0], 1: [1.0], 8: [0.0], 9: [0.0]})
        callback.on_rollouts(batch=seen)
    assert "curriculum/explained_variance_unseen" not in seen.metrics  # each was drawn before
    mixed = batch_of({0: [0.0], 8: [1.0], 2: [1.0], 10: [0.0]})  # those drawn before surprise
    callback.on_rollouts(batch=mixed)
    assert mixed.metrics["curriculum/explained_variance_unseen"] > 0.5
    assert mixed.metrics["curriculum/explained_variance"] < mixed.metrics["curriculum/explained_variance_unseen"]


def test_weights_of_none_keep_the_epochs(trained):
    class Silent(GRPOCallback):
        def on_prompt_weights(self, **kwargs):
            return None

    runs = [trained(callbacks=[*more, Record], max_steps=4, group_size="threshold") for more in ([], [Silent])]
    one, other = ([batch.prompt_index.tolist() for batch in batches_of(run)] for run in runs)
    assert one == other
