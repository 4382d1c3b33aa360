"""The study for a GPU runs in miniature on a CPU, goes on where it stopped, and says what failed."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).parents[2]


def options_of(folder: Path, minutes: float = 4.0) -> gpu.Options:
    return gpu.Options("cpu", folder, minutes, smoke=True)


def test_rollouts_are_as_the_workload_says():
    workload = gpu.Workload(20, 50, group=4, rows=16, spread=0.7, flat=0.5, shape="tiny")
    made = gpu.rollouts_of(workload, "cpu")
    lengths = made["completion_mask"].sum(1)
    assert lengths.max() == 50
    assert lengths.min() >= 4
    assert len(set(lengths.tolist())) > 4
    assert (made["completion_ids"][made["completion_mask"] == 0] == 0).all()
    assert torch.equal(made["prompt_ids"][0], made["prompt_ids"][3])
    assert not torch.equal(made["prompt_ids"][3], made["prompt_ids"][4])
    assert (made["advantages"] == 0).nonzero().flatten().tolist() == list(range(8))
    assert made["num_items_in_batch"] == lengths.sum()


def test_every_attention_and_precision_is_tried_on_a_gpu():
    names = list(gpu.checks_of(gpu.Options("cuda", Path(), 4.0, smoke=False)))
    for attention in ("sdpa", "eager", "flex_attention"):
        for dtype in ("float32", "bfloat16"):
            assert {f"gradient, {attention}, {dtype}, {kind}" for kind in ("full", "LoRA")} <= set(names)
    assert {"off equals stock", "resumed run", *gpu.LAUNCHERS} <= set(names)


def test_what_failed_and_what_did_not_run_is_said():
    about = {"torch": "2", "device": "none"}
    results = {
        "one": {"value": 0.5, "limit": 0.1},
        "two": {"error": "not run: deepspeed is not installed"},
        "three": {"error": "ValueError: broken"},
        "speed": {"value": 0.3, "limit": 0.4, "ratios": {"on": {"update": 0.3, "memory": 0.5}}, "note": "flex: no"},
    }
    assert [gpu.verdict(result) for result in results.values()] == ["FAILED", "-", "FAILED", "ok"]
    page = gpu.page_of(about, results)
    assert "| one | FAILED | 5.0e-01 | 1.0e-01 |  |" in page
    assert "| speed | on | 0.30 | - | 0.50 |" in page
    assert "flex: no" in page


@pytest.mark.training
def test_a_wrong_gradient_is_seen(tmp_path, monkeypatch):
    assert gpu.same_gradient(options_of(tmp_path), "float32", "sdpa", lora=False)["value"] < 1e-5
    monkeypatch.setattr(gpu, "ON", {"loss_type": "grpo"})
    assert gpu.same_gradient(options_of(tmp_path), "float32", "sdpa", lora=False)["value"] > 1e-2


@pytest.mark.training
def test_the_miniature_runs_and_goes_on(tmp_path):
    command = [sys.executable, "recipes/studies/gpu.py", "--smoke", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "FAILED" not in done.stdout
    saved = json.loads((tmp_path / "smoke" / "gpu.json").read_text())
    assert set(saved["machine"]) >= {"torch", "transformers", "trl", "device"}
    speeds = [result for result in saved["results"].values() if "ratios" in result]
    assert len(speeds) == len(gpu.MINIATURE)
    assert all(set(result["ratios"]) == {"off", "on"} for result in speeds)
    again = subprocess.run([*command, "--minutes", "0"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "no time left" not in again.stdout  # nothing is left to do
    assert (tmp_path / "smoke" / "gpu.md").read_text().splitlines()[-1] in again.stdout
