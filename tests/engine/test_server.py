"""vLLM as a server: what comes back over HTTP belongs to the row that asked, and the weights are the policy's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from engine_cases import CASES, ON_TWO_PROCESSES, check, free_port, of_server, train, train_on_a_process
from gloo_transfer import metadata, use_gloo
from kit import PYTHONPATH, launch

COMMAND = "-m vllm.entrypoints.cli.main serve {model} --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
OPTIONS = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--weight-transfer-config"]
# `rollout_func` of these cases asks an engine in its own process.
NAMES = [name for name in CASES if name != "rollout_func"]


@pytest.fixture(scope="module")
def server(engine_model, tmp_path_factory):
    """A server's port."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    path = os.pathsep.join([str(metadata(folder)), PYTHONPATH, str(Path(__file__).parent)])
    settings = {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *COMMAND.format(model=engine_model, port=port).split(), *OPTIONS, '{"backend": "gloo"}']
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_sampled_is_what_the_policy_scores(name, is_greedy, server, engine_model, tmp_path):
    if name == "replaced, no correction" and not is_greedy:
        pytest.skip("without the correction, TRL keeps no log-probabilities of vLLM")
    use_gloo()
    check(name, train(name, engine_model, tmp_path, is_greedy, **of_server(server)), is_greedy)


@pytest.fixture(scope="module")
def found(server, engine_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    return launch(engine_model, out, train_on_a_process, processes=2, names=ON_TWO_PROCESSES, server=server)


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", ON_TWO_PROCESSES)
def test_each_of_two_processes_gets_its_own_rows(name, is_greedy, found):
    """Only the first process asks the server, for the rows of both."""
    for process in found:
        check(name, process[name][is_greedy], is_greedy)
