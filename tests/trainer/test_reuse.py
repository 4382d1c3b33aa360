"""Further passes over a batch end where the policy has moved too far: that step changes nothing."""

from functools import partial

import pytest
import torch
from kit import count_vowels, have_same_weights, logs_of, weights_of

from trl_grpo_ext import AdaptiveGRPOTrainer
from trl_grpo_ext.trainer.reuse import ReuseGuardCallback, squared_log_ratio


@pytest.fixture
def passes(trained):
    return partial(trained, reward_funcs=count_vowels, max_steps=6, num_iterations=3)


def test_the_drift_counts_the_tokens_of_the_mask():
    logps, old = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 9.0]])
    assert squared_log_ratio(logps, old, torch.tensor([[1, 1], [1, 0]])).tolist() == [5.0, 3.0]


def test_a_generous_limit_changes_nothing(passes):
    guarded = passes(reuse_drift_limit=1e9)
    assert have_same_weights(passes(), guarded)
    logs = logs_of(guarded)
    drifts = [entry["reuse/drift"] for entry in logs]
    assert drifts[0] == pytest.approx(0.0, abs=1e-9)
    assert drifts[1] > drifts[0]
    assert {entry["reuse/skipped"] for entry in logs} == {0.0}


def test_beyond_the_limit_no_weight_moves_until_the_next_batch(passes):
    guarded = passes(reuse_drift_limit=1e-9)
    assert [entry["reuse/skipped"] for entry in logs_of(guarded)] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    # The same weights as one pass over each of the same two batches, at the learning rates of those steps.
    states = guarded.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {2}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        # Of the three passes over each batch, the second finds the drift, and the third is not computed.
        ({}, [False, False, True] * 2),
        # One update from two micro-batches.
        ({"gradient_accumulation_steps": 2}, [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2),
        # Two updates a pass: the second one of the first pass is beyond the limit already.
        ({"steps_per_generation": 2}, [False] * 3 + [True] * 3),
        # A step that spans three batches is a part of several passes: all is computed.
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 9, "max_steps": 1}, [False] * 9),
    ],
)
def test_what_can_change_nothing_is_not_computed(make_trainer, monkeypatch, options, left_out):
    """... and weights and logs are those of a run that computes all of it."""

    def run() -> tuple[AdaptiveGRPOTrainer, list[bool]]:
        trainer = make_trainer(
            reward_funcs=count_vowels, **{"max_steps": 6, "num_iterations": 3, "reuse_drift_limit": 1e-9} | options
        )
        computed, seen = trainer._compute_loss, []
        monkeypatch.setattr(trainer, "_compute_loss", lambda *args: seen.append(trainer._step) or computed(*args))
        trainer.train()
        return trainer, [step not in seen for step in range(trainer._step)]

    spared, seen = run()
    assert seen == left_out
    monkeypatch.setattr(ReuseGuardCallback, "is_over", False)
    whole, seen = run()
    assert not any(seen)
    assert have_same_weights(spared, whole)
    for one, other in zip(logs_of(spared), logs_of(whole), strict=True):
        timed = {"step_time", "grad_norm"}  # of what is computed
        assert {**one, **dict.fromkeys(timed)} == pytest.approx({**other, **dict.fromkeys(timed)})


def test_a_batch_of_the_run_before_is_over_for_no_other_run(make_trainer):
    options = {"max_steps": 5, "num_iterations": 3, "reuse_drift_limit": 1e-9}
    trainer = make_trainer(reward_funcs=count_vowels, save_strategy="steps", save_steps=3, **options)
    trainer.train()  # ends where the third pass over the second batch would not be computed
    ended = weights_of(trainer)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert all(torch.equal(ended[name], value) for name, value in weights_of(trainer).items())


def test_the_callback_passed_by_hand_guards_as_the_option_does(passes):
    runs = (passes(reuse_drift_limit=1e-9), passes(callbacks=[ReuseGuardCallback(1e-9)]))
    by_option, by_hand = ([entry["reuse/skipped"] for entry in logs_of(run)] for run in runs)
    assert by_option == by_hand == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_a_limit_that_is_no_limit_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        ReuseGuardCallback(0.0)
