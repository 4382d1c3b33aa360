"""Four processes on one node and on two: they agree, do what one process does, and stop together when one fails."""

import processes_run
import pytest
import torch
from kit import launch


@pytest.fixture(scope="module")
def four(model_path, tmp_path_factory):
    """What each of four processes saw of every run."""
    out = tmp_path_factory.mktemp("four")
    return launch(model_path, out, processes_run.runs, processes=4, names=list(processes_run.RUNS))


def assert_processes_agree(ranks: list[dict]) -> None:
    for other in ranks[1:]:
        assert str(other["plans"]) == str(ranks[0]["plans"])  # NaN equals NaN
        assert all(torch.equal(value, other["weights"][key]) for key, value in ranks[0]["weights"].items())


def assert_as_one_process(ranks: list[dict], alone: dict) -> None:
    for one, two in zip(ranks[0]["plans"], alone["plans"], strict=True):
        assert one[:3] == two[:3]
        assert one[3] == pytest.approx(two[3], abs=1e-5)
    for key, value in alone["weights"].items():
        assert torch.allclose(ranks[0]["weights"][key], value, atol=1e-6), key


@pytest.fixture(scope="module")
def alone(model_path, tmp_path_factory):
    return processes_run.run("healthy", model_path, str(tmp_path_factory.mktemp("alone")), rows=16)


@pytest.mark.parametrize("name", ["healthy", "adaptive", "slow", "none", "flat"])
def test_four_processes_agree(name, four):
    ranks = [rank[name] for rank in four]
    assert [rank["error"] for rank in ranks] == [None] * 4
    assert len(ranks[0]["plans"]) == (3 if name == "healthy" else 2)
    assert_processes_agree(ranks)


def test_four_processes_do_what_one_does(four, alone):
    assert_as_one_process([rank["healthy"] for rank in four], alone)
    assert len({str(plan) for plan in alone["plans"]}) == 3


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", "ValueError: no judge today"),
        ("raises async", "ValueError: no judge today"),
        ("too few", "ValueError: The reward function 'too_few' returned 3 rewards, but 4 were expected"),
        ("user raises", "RolloutError: user, row "),
        ("reward of a turn raises", "ValueError: no judge today"),
    ],
)
def test_an_error_on_one_process_stops_all_with_its_message(name, error, four):
    ranks = [rank[name] for rank in four]
    assert ranks[3]["error"].startswith(error)
    for rank in ranks[:3]:
        assert rank["error"] == f"OtherProcessError: Process 3 failed with {ranks[3]['error']}"


def test_two_nodes_do_what_one_process_does_and_stop_together(model_path, tmp_path, alone):
    ranks = launch(model_path, tmp_path, processes_run.runs, processes=2, nodes=2, names=["healthy", "raises"])
    assert_processes_agree([rank["healthy"] for rank in ranks])
    assert_as_one_process([rank["healthy"] for rank in ranks], alone)
    assert ["no judge today" in rank["raises"]["error"] for rank in ranks] == [True] * 4
