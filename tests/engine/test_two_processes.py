"""Two processes, each with an engine of its own: every process gets the completions of its own rows."""

import pytest
from engine_cases import ON_TWO_PROCESSES, check, train_on_a_process
from kit import launch


@pytest.fixture(scope="module")
def found(engine_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    return launch(engine_model, out, train_on_a_process, processes=2, names=ON_TWO_PROCESSES)


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", ON_TWO_PROCESSES)
def test_each_process_gets_its_own_rows(name, is_greedy, found):
    for process in found:
        check(name, process[name][is_greedy], is_greedy)
