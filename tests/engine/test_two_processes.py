"""Two processes, each with an engine of its own: every process gets the completions of its own rows."""

import pytest
from engine_cases import check, train_on_a_process
from kit import launch

NAMES = [
    "nothing",
    "ragged, replaced",
    "multi_turn, shared",
    "multi_turn, independent",
    "hierarchical",
    "shared prompts, skipped rows, ragged, replaced",
    "evaluation, multi_turn",
    "lora, ragged",
    "efficient",
]


@pytest.fixture(scope="module")
def found(engine_model, tmp_path_factory):
    return launch(engine_model, tmp_path_factory.mktemp("two") / "out", train_on_a_process, processes=2, names=NAMES)


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", NAMES)
def test_each_process_gets_its_own_rows(name, is_greedy, found):
    for process in found:
        check(name, process[name][is_greedy], is_greedy)
