"""Every feature with vLLM in the trainer's own process: its tokens and log-probabilities are those of the policy."""

import pytest
from engine_cases import CASES, check, train
from kit import args_of

from trl_grpo_ext.host.engine import engine_for_cpu, one_engine


@pytest.fixture(scope="module")
def engine():
    with engine_for_cpu(args_of(use_vllm=True)), one_engine():
        yield


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_sampled_is_what_the_policy_scores(name, is_greedy, engine, engine_model, tmp_path):
    if name == "replaced, no correction" and not is_greedy:
        pytest.skip("without the correction, TRL keeps no log-probabilities of vLLM")
    check(name, train(name, engine_model, tmp_path, is_greedy), is_greedy)
