"""Rollouts of several turns on two real processes: as many generation calls, and the same view of the batch."""

import math

import pytest
import torch
from kit import Record, batches_of, launch, trainer_of, weights_of
from rollout_helpers import Recorder, first_turns, length_of_text, patient

from trl_grpo_ext import HierarchicalCallback, MultiTurnCallback

SETTINGS = {
    "shared": {"kind": "shared"},
    "shared-best": {"kind": "shared-best"},
    "scripted-best": {"kind": "scripted-best"},
    "independent": {"kind": "independent"},
    "hierarchical": {"kind": "hierarchical", "per_device_train_batch_size": 18, "num_generations": 2},
}


class Counting(Recorder):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.generated = [*getattr(self, "generated", []), len(prompt_ids)]
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)


def train(model_path, out, kind, limit=None, resume=None, **options) -> dict:
    data = first_turns(20)
    if kind == "scripted-best":  # of one to three turns, so that a process may have none where the other has some
        data = data.add_column("turns", [["more"] * (i % 3) for i in range(20)])
        callback = MultiTurnCallback(carry="best")
    elif kind == "hierarchical":
        callback = HierarchicalCallback(3, 2, "plan {prompt}", "do it", max_conversation_length=limit)
    else:
        history, _, carry = kind.partition("-")
        callback = MultiTurnCallback(history, user=patient, carry=carry or "random", max_turns=3)
    given = {"callbacks": [callback, Record()], "cls": Counting, "eval_dataset": data.select(range(4))}
    options = {"per_device_train_batch_size": 12, "max_steps": 3, **options}
    trainer = trainer_of(model_path, data, f"{out}/run", length_of_text, **given, **options)
    trainer.train(resume_from_checkpoint=resume)
    fields = ("rewards", "advantages", "turns", "parents", "group_ids", "completion_lengths", "prompt_index")
    return {
        "batches": [{name: getattr(batch, name).tolist() for name in fields} for batch in batches_of(trainer)],
        "weights": weights_of(trainer),
        "generated": trainer.generated,
        "own": [[(answer.turn, answer.text) for answer in row.answers] for row in trainer.rollout.sequences],
        "logs": trainer.state.log_history,
    }


def assert_same(one, two):
    """Equal, with NaN equal to NaN."""
    assert str(one) == str(two)


def assert_same_weights(one, two):
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_agree_and_generate_in_step(name, model_path, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    first, second = launch(model_path, tmp_path / "out", train, **SETTINGS[name], **options)
    assert first["generated"] == second["generated"]
    assert_same(first["batches"], second["batches"])
    assert_same_weights(first, second)
    assert_same(first["logs"][0]["reward"], second["logs"][0]["reward"])
    rows = 36 if name == "hierarchical" else 24
    for batch in first["batches"]:
        assert set(batch["turns"]) <= {0, 1, 2}
        assert len(batch["turns"]) == rows if name != "independent" else len(batch["turns"]) >= rows
        assert any(turn > 0 for turn in batch["turns"])
        half = next(i for i in range(len(batch["turns"])) if batch["parents"][i] == -1 and 2 * i >= len(batch["turns"]))
        assert half
        # What an answer carries on from has one turn less.
        for turn, parent in zip(batch["turns"], batch["parents"], strict=True):
            assert (parent == -1) == (turn == 0)
            assert parent == -1 or batch["turns"][parent] == turn - 1


def test_ranks_hold_conversations_of_different_length(model_path, tmp_path):
    first, second = launch(model_path, tmp_path / "out", train, kind="independent", max_steps=1, seed=3)
    counts = [sum(map(len, rank["own"])) for rank in (first, second)]
    assert sum(counts) == len(first["batches"][0]["turns"])
    assert counts[0] != counts[1]
    assert first["generated"][0] == 12
    assert first["generated"] == second["generated"]


def test_a_tree_without_room_on_two_ranks(model_path, tmp_path):
    options = {**SETTINGS["hierarchical"], "limit": 36}
    first, second = launch(model_path, tmp_path / "out", train, max_steps=1, **options)
    assert first["generated"] == second["generated"]
    assert all(math.isnan(reward) for reward in first["batches"][0]["rewards"])


@pytest.mark.parametrize("name", ["shared", "independent", "hierarchical"])
def test_resume_on_two_ranks(name, model_path, tmp_path):
    options = {**SETTINGS[name], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = launch(model_path, tmp_path / "whole", train, **options)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = launch(model_path, tmp_path / "resumed", train, **options, resume=checkpoint)
    assert_same(resumed[0]["batches"], whole[0]["batches"][2:])
    for one, other in zip(whole, resumed, strict=True):
        assert_same_weights(one, other)
