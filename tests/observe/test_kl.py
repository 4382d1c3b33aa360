"""Adaptive KL moves β towards its target by the published rule, alike on every rank, and through a restart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import Record, batches_of, count_vowels, have_same_weights, interrupt, logs_of
from trl import GRPOTrainer

from trl_grpo_ext import AdaptiveKLCallback
from trl_grpo_ext.observe.kl import adapt_beta

positive = st.floats(1e-4, 1e4)


# The rule


@given(positive, st.floats(0, 1e4), positive, st.floats(1, 1e4), st.floats(1, 100))
def test_beta_moves_towards_the_target_by_a_bounded_step(beta, kl, target, rollouts, factor):
    horizon = factor * rollouts
    new = adapt_beta(beta, kl, target, rollouts, horizon)
    assert new > 0
    assert (new >= beta) == (kl >= target) or new == beta
    assert abs(new / beta - 1) <= 0.2 * rollouts / horizon + 1e-12


@given(positive, positive, st.floats(1, 1e4))
def test_on_target_or_without_a_measurement_nothing_moves(beta, target, rollouts):
    assert adapt_beta(beta, target, target, rollouts, 1e4) == beta
    assert adapt_beta(beta, math.nan, target, rollouts, 1e4) == beta


def test_rule_by_hand():
    # error 0.1 / 0.08 - 1 = 0.25, clipped to 0.2; 0.2 * 512 / 10000 = 0.01024
    assert adapt_beta(0.04, 0.1, 0.08, 512, 10_000) == pytest.approx(0.04 * 1.01024)
    # error 0.09 / 0.1 - 1 = -0.1, not clipped
    assert adapt_beta(0.04, 0.09, 0.1, 512, 10_000) == pytest.approx(0.04 * (1 - 0.1 * 0.0512))


@pytest.mark.parametrize("beta", [0.01, 10.0])
def test_it_settles_where_the_kl_falls_with_beta(beta):
    target = 0.1
    for _ in range(400):
        kl = 0.05 / beta
        beta = adapt_beta(beta, kl, target, num_rollouts=64, horizon=640)
    assert 0.05 / beta == pytest.approx(target, rel=0.05)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_target": 0.1}, "kl_target=0.1 needs beta above 0, and beta=0.0: .* Set beta, for example to 0.04"),
        ({"kl_target": 0.0, "beta": 0.1}, "kl_target=0.0 must be positive and finite: try 0.05"),
        ({"kl_target": math.nan, "beta": 0.1}, "kl_target=nan must be positive"),
        ({"kl_target": 0.1, "kl_horizon": 0, "beta": 0.1}, "kl_horizon=0 must be positive and finite: try 10000"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.fixture
def make_trainer(make_trainer):
    return lambda out="run", **given: make_trainer(out, **{"reward_funcs": count_vowels, **given})


def test_a_horizon_shorter_than_a_step_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"kl_horizon=7 is shorter than one step of 8 rollouts.* to 160"):
        make_trainer(kl_target=0.1, kl_horizon=7, beta=0.1)


def test_a_callback_passed_by_hand_is_checked_too(make_trainer):
    with pytest.raises(ValueError, match="needs beta above 0"):
        make_trainer(callbacks=[AdaptiveKLCallback(0.1)])


# In the trainer


SHAPES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "iterations": {"num_iterations": 2},
    "slices": {"steps_per_generation": 2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_logged_beta_follows_the_rule_and_every_rollout_counts_once(name, trained):
    options = {"beta": 0.1, "kl_target": 0.02, "kl_horizon": 40, "max_steps": 6, **SHAPES[name]}
    trainer = trained(callbacks=[Record], **options)
    rollouts = next(c for c in trainer.grpo_callbacks if isinstance(c, AdaptiveKLCallback)).num_rollouts
    assert 6 * rollouts == sum(batch.rewards.numel() for batch in batches_of(trainer))
    beta = 0.1
    for entry in logs_of(trainer):
        assert entry["beta"] == pytest.approx(beta)
        assert entry["kl_target"] == 0.02
        beta = adapt_beta(beta, entry["kl"], 0.02, rollouts, 40)
    assert trainer.beta == pytest.approx(beta)
    assert trainer.beta != 0.1


def test_steps_count_and_not_logs(trained):
    options = {"beta": 0.1, "kl_target": 0.02, "kl_horizon": 40, "max_steps": 6}
    often = trained("a", **options)
    seldom = trained("b", logging_steps=3, **options)
    assert seldom.beta == often.beta
    betas, logged = ([entry["beta"] for entry in logs_of(trainer)] for trainer in (often, seldom))
    assert logged == pytest.approx([sum(betas[:3]) / 3, sum(betas[3:]) / 3])


def test_the_loss_uses_the_beta_of_the_moment(trained):
    options = {"beta": 0.5, "max_steps": 4}
    fixed = trained("a", **options)
    # Over an endless horizon β stays as it is, and so does all else.
    still = trained("b", kl_target=1e-6, kl_horizon=1e30, **options)
    assert have_same_weights(fixed, still)
    moved = trained("c", kl_target=1e-6, kl_horizon=8, **options)
    assert not have_same_weights(fixed, moved)


def test_beta_never_reaches_zero(make_trainer):
    callback = AdaptiveKLCallback(1e9, kl_horizon=8)
    trainer = make_trainer(callbacks=[callback], beta=0.1)
    trainer.model.train()
    for _ in range(200):
        trainer.log_metric("kl", 0.0)
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert trainer.beta == 0.1 / 1e4


def test_resume_equals_no_interruption(make_trainer):
    options = {"beta": 0.1, "kl_target": 0.02, "kl_horizon": 40, "logging_steps": 2, "group_size": "variance"}
    options |= {"max_steps": 8, "per_device_train_batch_size": 16}
    whole, _, resumed = interrupt(lambda out: make_trainer(out, **options), 3)
    assert resumed.beta == whole.beta
    assert have_same_weights(whole, resumed)


@pytest.mark.training
def test_benchmark_smoke(tmp_path):
    import adaptive_kl

    adaptive_kl.main(adaptive_kl.Options(smoke=True, output_dir=str(tmp_path)))
    curves = adaptive_kl.read(tmp_path / "curves.csv")
    assert len(curves) == 4 * 2 * 2  # steps, starts, fixed and one target
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split(" | ")[4] for row in table[2:]] == ["", "", "0 of 1", "0 of 1"]
    assert (tmp_path / "adaptive_kl.png").stat().st_size > 10_000


def test_benchmark_table_by_hand():
    import adaptive_kl

    def rows(seed, kl):
        cell = {"target": "0.1", "start": "5.0", "seed": seed, "beta": "1.0", "accuracy": "0.5"}
        return [{**cell, "kl": str(value)} for value in kl]

    # Last quarters 0.11, 0.09 (settled though no step is) and 0.2 (not settled).
    curves = rows("0", [9] * 6 + [0.11, 0.11]) + rows("1", [9] * 6 + [0.02, 0.16]) + rows("2", [9] * 6 + [0.2, 0.2])
    cells = adaptive_kl.make_table(curves).splitlines()[2].split(" | ")
    assert cells[3:6] == ["1.10 (0.90 to 2.00)", "2 of 3", "0.00 (0.00 to 1.00)"]


def test_stock_trainer_is_left_alone(trained, caplog):
    trainer = trained(cls=GRPOTrainer, beta=0.1, max_steps=1, callbacks=[AdaptiveKLCallback(0.1)])
    assert trainer.beta == 0.1
    assert "AdaptiveKLCallback is a GRPOCallback, and this trainer does not call its hooks" in caplog.text
