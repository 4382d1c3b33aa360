"""Rollouts of several turns on two real processes: as many generation calls, and the same view of the batch."""

import math
from pathlib import Path

import pytest
import torch
from trainer.test_distributed import launch

SETTINGS = {
    "shared": {"kind": "shared"},
    "shared-best": {"kind": "shared-best"},
    "scripted-best": {"kind": "scripted-best"},
    "independent": {"kind": "independent"},
    "hierarchical": {"kind": "hierarchical", "per_device_train_batch_size": 18, "num_generations": 2},
}


def run(model_path, out, **options):
    defaults = {"per_device_train_batch_size": 12, "num_generations": 4, "max_steps": 3}
    return launch(
        model_path, out, script=str(Path(__file__).with_name("distributed_rollout.py")), **{**defaults, **options}
    )


def assert_same(one, two):
    """Equal, with NaN equal to NaN."""
    assert str(one) == str(two)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_agree_and_generate_in_step(name, model_path, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    first, second = run(model_path, tmp_path / "out", **SETTINGS[name], **options)
    assert first["generated"] == second["generated"]
    for one, two in zip(first["batches"], second["batches"], strict=True):
        assert_same(one, two)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert_same(first["logs"][0]["reward"], second["logs"][0]["reward"])
    rows = 36 if name == "hierarchical" else 24
    for batch in first["batches"]:
        assert batch["turns"].count(0) + batch["turns"].count(1) + batch["turns"].count(2) == len(batch["turns"])
        assert len(batch["turns"]) == rows if name != "independent" else len(batch["turns"]) >= rows
        assert any(turn > 0 for turn in batch["turns"])
        half = next(i for i in range(len(batch["turns"])) if batch["parents"][i] == -1 and 2 * i >= len(batch["turns"]))
        assert half
        # What an answer carries on from has one turn less.
        for turn, parent in zip(batch["turns"], batch["parents"], strict=True):
            assert (parent == -1) == (turn == 0)
            assert parent == -1 or batch["turns"][parent] == turn - 1


def test_ranks_hold_conversations_of_different_length(model_path, tmp_path):
    first, second = run(model_path, tmp_path / "out", kind="independent", max_steps=1, seed=3)
    counts = [sum(map(len, rank["own"])) for rank in (first, second)]
    assert sum(counts) == len(first["batches"][0]["turns"])
    assert counts[0] != counts[1]
    assert first["generated"][0] == 12
    assert first["generated"] == second["generated"]


def test_a_tree_without_room_on_two_ranks(model_path, tmp_path):
    options = {**SETTINGS["hierarchical"], "limit": 36}
    first, second = run(model_path, tmp_path / "out", max_steps=1, **options)
    assert first["generated"] == second["generated"]
    assert all(math.isnan(reward) for reward in first["batches"][0]["rewards"])


@pytest.mark.parametrize("name", ["shared", "independent", "hierarchical"])
def test_resume_on_two_ranks(name, model_path, tmp_path):
    options = {**SETTINGS[name], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(model_path, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = run(model_path, tmp_path / "resumed", **options, resume=checkpoint)
    assert_same(resumed[0]["batches"], whole[0]["batches"][2:])
    for rank in range(2):
        for key, value in whole[rank]["weights"].items():
            assert torch.equal(resumed[rank]["weights"][key], value), key
