"""The real vLLM engine, where it is installed: `make vllm`. One engine for each process of tests."""

import importlib.util
import os
import socket

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# TRL's choice of a port is the same in two processes that begin at once, and workers of tests inherit their starter's.
with socket.socket() as free:
    free.bind(("", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])

import pytest
from engine_cases import make_model

HAS_VLLM = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/engine" in item.path.as_posix():
            item.add_marker(pytest.mark.training)
            item.add_marker(pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: make vllm installs it"))


@pytest.fixture(scope="session")
def engine_model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("engine-model"))
