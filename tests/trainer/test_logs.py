"""What is logged of a batch: by hand, for ragged groups and rows without a reward."""

import math

import pytest
import torch
from kit import NAN, batch_of

from trl_grpo_ext import RolloutBatch
from trl_grpo_ext.trainer.logs import added_metrics, metrics_of_merged


def make_batch() -> RolloutBatch:
    return batch_of(
        {7: [[0.0, NAN], [1.0, 2.0], [NAN, NAN]], 4: [[3.0, 2.0], [3.0, 2.0]]},
        weights=[1.0, 0.5],
        reward_names=["a", "b"],
        advantages=torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0]),
        completion_lengths=torch.tensor([2, 4, 0, 1, 3]),
        metrics={"mine": 5.0},
    )


def test_flat_completions_and_advantages():
    batch = make_batch()
    assert batch.flat_completions().tolist() == [False, False, False, True, True]
    assert batch.mean_advantages is batch.advantages
    batch.advantages = torch.arange(20.0).view(5, 4)
    assert batch.mean_advantages.tolist() == [0.5, 5.5, 0.0, 12.0, 17.0]  # the third row has no tokens


def test_metrics_of_a_merged_batch():
    metrics = metrics_of_merged(make_batch(), torch.tensor([1.0, 0.5]), with_lengths=True)
    totals = [0.0, 2.0, 4.0, 4.0]
    assert metrics.pop("reward") == 2.5
    assert metrics.pop("reward_std") == pytest.approx(math.sqrt(sum((t - 2.5) ** 2 for t in totals) / 3))
    assert metrics.pop("rewards/a/std") == pytest.approx(1.5)
    assert metrics == {
        "rewards/a/mean": 1.75,
        "rewards/b/mean": 2.0,
        "rewards/b/std": 0.0,
        "completions/mean_length": 2.0,
        "completions/min_length": 0.0,
        "completions/max_length": 4.0,
    }
    assert "completions/mean_length" not in metrics_of_merged(make_batch(), torch.ones(2), with_lengths=False)


def test_added_metrics():
    batch = make_batch()
    assert added_metrics(batch, False, None) == {"mine": 5.0, "rollouts/informative": 0.6}
    batch.discarded = batch.select(torch.tensor([True, False]))
    assert added_metrics(batch, True, 2) == {
        "mine": 5.0,
        "group_size/mean": 2.5,
        "group_size/min": 2.0,
        "group_size/max": 3.0,
        "rollouts/informative": 3 / 8,
        "dynamic_sampling/rounds": 2.0,
        "dynamic_sampling/discarded": 3.0,
    }
    assert batch.metrics == {"mine": 5.0}
