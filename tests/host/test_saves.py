"""Of two processes, both write a checkpoint or none does, whatever fails on one; resuming equals never stopping."""

import pytest
import saves_run
import torch
from kit import launch

from trl_grpo_ext.host.checkpoints import checkpoints_in, last_complete, why_incomplete


@pytest.fixture(scope="module")
def two(model_path, tmp_path_factory):
    """The folder of all runs, and what each of the two processes saw."""
    out = tmp_path_factory.mktemp("two")
    return out, launch(model_path, out, saves_run.runs)


@pytest.mark.parametrize(("part", "rank"), [case for case in saves_run.CASES if case[0] in saves_run.PARTS])
def test_a_save_that_fails_on_one_process_fails_on_all_and_leaves_no_checkpoint(part, rank, two):
    out, ranks = two
    folder = out / f"{part} {rank}"
    one, other = (outcomes[part, rank] for outcomes in ranks)
    assert one["error"] == other["error"]
    message = f"CheckpointError: {folder / 'checkpoint-3'} could not be written (process {rank}: OSError: [Errno 28] No"
    assert one["error"].startswith(message)
    assert one["error"].endswith(f"the last complete checkpoint is {folder / 'checkpoint-2'}")
    assert not (folder / "checkpoint-3").exists()
    assert last_complete(folder) == (folder / "checkpoint-2", [])


def test_what_also_fails_after_a_failed_save_keeps_no_process_from_the_error(two):
    _, ranks = two
    for rank, remedy in enumerate(("no complete checkpoint was found, since", "the last complete checkpoint is")):
        one, other = (outcomes["twice", rank]["error"] for outcomes in ranks)
        assert one == other
        assert one.startswith("CheckpointError: ")
        assert "could not be written (process 0: OSError: [Errno 28] No space left" in one
        assert f"): {remedy}" in one


def test_a_failed_save_over_a_complete_checkpoint_leaves_none(two):
    out, ranks = two
    assert len({outcomes["again"]["error"] for outcomes in ranks}) == 1
    assert "checkpoint-3 could not be written (process 1: OSError" in ranks[0]["again"]["error"]
    assert last_complete(out / "again") == (out / "again" / "checkpoint-2", [])


@pytest.mark.parametrize("part", saves_run.LATER)
def test_what_fails_after_a_checkpoint_is_complete_stops_all_and_leaves_it(part, two):
    out, ranks = two
    assert ranks[0][part, 0]["error"] == "OSError: [Errno 28] No space left on device"
    assert ranks[1][part, 0]["error"] == f"OtherProcessError: Process 0 failed with {ranks[0][part, 0]['error']}"
    assert why_incomplete(out / f"{part} 0" / "checkpoint-3") is None
    assert len(checkpoints_in(out / f"{part} 0")) == 3  # or 2, had the oldest been deleted


def test_what_one_process_cannot_read_stops_all(two):
    _, ranks = two
    error = ranks[1]["damaged"]["error"]
    assert "grpo_rollouts_1.pt cannot be read" in error
    assert ranks[0]["damaged"]["error"] == f"OtherProcessError: Process 1 failed with {error}"


def test_two_processes_with_everything_on_resume_as_if_never_stopped(two):
    _, ranks = two
    whole, resumed = ranks[0]["whole"], ranks[0]["resumed"]
    assert [entry["step"] for entry in whole["logs"]] == [2, 4, 6]
    assert resumed["logs"] == whole["logs"]
    for outcomes in ranks:
        for key, value in whole["weights"].items():
            assert torch.equal(value, outcomes["whole"]["weights"][key]), key
            assert torch.equal(value, outcomes["resumed"]["weights"][key]), key
