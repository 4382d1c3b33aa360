"""Whole runs in processes of their own: with nothing on they are stock TRL's, and resumed ones go on as they were."""

import pytest
import torch
from engine_cases import RAGGED, REPLACED, SHARED, chats, conversations, free_port, sometimes, texts, vowels
from kit import config_kwargs, launch, logs_of, weights_of
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.host.engine import engine_for_cpu
from trl_grpo_ext.recipe.check import main

DATA = {"texts": texts, "chats": chats, "conversations": conversations}
REWARDS = {"vowels": vowels, "sometimes": sometimes}
TIMES = ("time", "runtime", "per_second", "num_tokens")


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Trainers of this process leave their place in its environment, and hold its port: a run gets none of both."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def run(model_path: str, out: str, stock: bool, data: str, reward: str, adapter: bool, resume: str | None, **options):
    """Called in a process of its own: weights and metrics of a run."""
    cls, config = (GRPOTrainer, GRPOConfig) if stock else (AdaptiveGRPOTrainer, AdaptiveGRPOConfig)
    defaults = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.02, "per_device_train_batch_size": 16}
    args = config(**config_kwargs(options.pop("output_dir", out), **{**defaults, **options}))
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    torch.manual_seed(0)  # of the adapter's weights
    with engine_for_cpu(args):
        trainer = cls(model_path, REWARDS[reward], args, DATA[data](), peft_config=peft)
    before = weights_of(trainer)
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
        for entry in logs_of(trainer)
    ]
    after = weights_of(trainer)
    moved = [(after[name] - before[name]).abs().max().item() for name in before if "lora_" not in name]
    return {"weights": after, "logs": logs, "frozen_moved": max(moved)}


def in_a_process(model, out, stock=False, data="texts", reward="vowels", adapter=False, resume=None, **options):
    given = {"stock": stock, "data": data, "reward": reward, "adapter": adapter, "resume": resume, **options}
    (result,) = launch(model, out, run, processes=1, **given)
    return result


def gap(one, other) -> float:
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"])


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter": True}, {"beta": 0.05, "num_iterations": 2}],
    ids=["plain", "lora", "beta"],
)
def test_nothing_on_is_stock_bit_for_bit(options, engine_model, tmp_path):
    stock = in_a_process(engine_model, tmp_path / "stock", stock=True, learning_rate=1e-3, **options)
    off = in_a_process(engine_model, tmp_path / "off", learning_rate=1e-3, **options)
    assert gap(stock, off) == 0
    if "adapter" in options:
        # Merging for vLLM and unmerging rounds the frozen weights, which docs/vllm.md says of resuming.
        assert 0 < stock["frozen_moved"] < 1e-6
    assert stock["logs"][-1]["sampling/sampling_logp_difference/max"] < 1e-3
    for theirs, ours in zip(stock["logs"], off["logs"], strict=True):
        assert {name: ours[name] for name in theirs} == theirs


RESUMED = {
    "ragged, replaced": {**RAGGED, **REPLACED, "reward": "sometimes"},
    "multi_turn, shared": {**SHARED, "data": "conversations"},
    "lora": {"adapter": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_one_that_went_through(name, engine_model, tmp_path):
    options = {**RESUMED[name], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    folder = tmp_path / "whole" / "run"
    whole = in_a_process(engine_model, tmp_path / "whole", output_dir=str(folder), **options)
    checkpoint = str(folder / "checkpoint-2")
    resumed = in_a_process(engine_model, tmp_path / "resumed", output_dir=str(folder), resume=checkpoint, **options)
    assert [entry["reward"] for entry in whole["logs"]] == [entry["reward"] for entry in resumed["logs"]]
    if name == "lora":
        # No checkpoint of an adapter holds the frozen weights, which merging has moved.
        assert 0 < gap(whole, resumed) < 1e-5
    else:
        assert gap(whole, resumed) == 0


def check_machine(model_path: str, out: str) -> int:
    """Called in a process of its own."""
    return main(["--use_vllm", "true", "--use_cpu", "true", "--checks", "stock", "ranks", "resume"])


def test_the_check_of_a_machine_passes_with_vllm(engine_model, tmp_path):
    assert launch(engine_model, tmp_path / "out", check_machine, processes=1) == [0]
