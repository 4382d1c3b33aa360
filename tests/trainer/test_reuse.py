"""Further passes over a batch end where the policy has moved too far: that step changes nothing."""

from functools import partial

import pytest
import torch
from kit import count_vowels, have_same_weights, logs_of

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


def test_the_callback_passed_by_hand_guards_as_the_option_does(passes):
    runs = (passes(reuse_drift_limit=1e-9), passes(callbacks=[ReuseGuardCallback(1e-9)]))
    by_option, by_hand = ([entry["reuse/skipped"] for entry in logs_of(run)] for run in runs)
    assert by_option == by_hand == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_a_limit_that_is_no_limit_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        ReuseGuardCallback(0.0)
