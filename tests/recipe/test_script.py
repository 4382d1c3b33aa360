"""The command line of recipes: configurations and checkpoints are found, or it is said where they were looked for."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from kit import ROOT, config_kwargs
from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, parse_arguments, script
from trl_grpo_ext.recipe.flags import flags_with_config
from trl_grpo_ext.recipe.launch import use_all_cores
from trl_grpo_ext.recipe.script import checkpoint_of

CPU = ["--bf16", "false", "--use_cpu", "true"]


def parse(monkeypatch, *flags):
    script = ROOT / "recipes" / "helpful.py"
    monkeypatch.setattr(sys, "argv", [str(script), *CPU, *flags])
    monkeypatch.syspath_prepend(str(script.parent))
    return parse_arguments(importlib.import_module("helpful").HelpfulArguments, str(script))


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_configuration_is_named_in_both_forms(form, monkeypatch, tmp_path):
    (tmp_path / "other.yaml").write_text("model_name_or_path: mine\nmax_steps: 77\n")
    flags = form.format(tmp_path / "other.yaml").split()
    _, args, model_args = parse(monkeypatch, *flags, "--learning_rate=0.5")
    assert (args.max_steps, args.learning_rate, model_args.model_name_or_path) == (77, 0.5, "mine")
    assert parse(monkeypatch)[1].max_steps != 77


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_vllm_gets_a_share_of_a_machine_without_a_gpu(monkeypatch):
    assert parse(monkeypatch)[1].vllm_gpu_memory_utilization == 0.1
    assert parse(monkeypatch, "--vllm_gpu_memory_utilization", "0.2")[1].vllm_gpu_memory_utilization == 0.2


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--config"], "--config names no file"),
        (["--config="], "--config names no file"),
        (["--config", "--max_steps", "3"], "--config names no file"),
        (["--config=nope.yaml"], r"--config nope.yaml: there is no such file \(looked for /.*/nope.yaml and /.*\)"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is there twice"),
    ],
)
def test_configurations_that_are_not_there(flags, problem, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(monkeypatch, *flags)
    assert re.fullmatch(rf"helpful\.py: error: {problem}.*\n", capsys.readouterr().err)


def test_a_script_without_a_configuration_is_told_where_it_belongs(tmp_path):
    path = f"{tmp_path}/configs/mine.yaml"
    with pytest.raises(ValueError, match=rf"no such file \(looked for {path}\)"):
        flags_with_config([], path)
    assert flags_with_config(["--help"], path) == ["--help"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ("", None), (False, None), ("false", None), (True, True), ("true", True), ("True", True)],
)
def test_what_resuming_means(given, expected, tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path))
    args.resume_from_checkpoint = given
    assert checkpoint_of(args) is expected


def test_a_checkpoint_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = AdaptiveGRPOConfig(**config_kwargs("runs/a"))
    for name in ("last", "checkpoint-3", "yes", "/no/such"):
        args.resume_from_checkpoint = name
        with pytest.raises(ValueError, match=rf"='{name}' is no folder \(looked for /.*runs/a/checkpoint-10, or true"):
            checkpoint_of(args)
    (tmp_path / "checkpoint-3").mkdir()
    args.resume_from_checkpoint = "checkpoint-3"
    assert checkpoint_of(args) == "checkpoint-3"


@pytest.mark.parametrize("line", ["resume_from_checkpoint: last", "resume_from_checkpoint: 'latest'"])
def test_a_configuration_that_resumes_from_nowhere_is_refused_at_once(line, monkeypatch, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"model_name_or_path: mine\n{line}\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(monkeypatch, "--config", str(tmp_path / "a.yaml"))
    assert re.fullmatch(r"helpful\.py: error: .* is no folder .*\n", capsys.readouterr().err)
    (tmp_path / "a.yaml").write_text("model_name_or_path: mine\nresume_from_checkpoint: true\n")
    assert parse(monkeypatch, "--config", str(tmp_path / "a.yaml"))[1].resume_from_checkpoint is True


def test_recipes_are_short_and_leave_the_path_alone():
    for path in [*(ROOT / "recipes").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "sys." + "path." not in text, path
        if path.parent.name == "recipes":
            assert len(text.splitlines()) <= 110, path


def test_every_recipe_has_a_configuration_and_help():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"check"}
    assert {path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml")} == recipes
    assert all(field.metadata.get("help") for field in DataArguments.__dataclass_fields__.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("launcher", "threads"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 3),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_a_single_launched_process_takes_all_cores(launcher, threads, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    use_all_cores()
    assert taken == ([threads] if threads else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_launcher_leaves_one_thread_unless_it_is_told(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch\nfrom trl_grpo_ext.recipe.launch import use_all_cores\n"
        "before = torch.get_num_threads()\nuse_all_cores()\nprint(before, torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script)]
    output = subprocess.check_output(command, env=environment | {"PYTHONPATH": str(ROOT)}, text=True)
    assert output.split() == ["1", str(len(os.sched_getaffinity(0)))]


@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_recipe_that_merges_adapters_samples_with_vllm(use_vllm, model_path, tmp_path, monkeypatch):
    """TRL hands vLLM merged weights anyway, and the trainer refuses both."""
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, merge_adapter=True, use_vllm=use_vllm))
    built = []
    monkeypatch.setattr(script, "AdaptiveGRPOTrainer", lambda args, **rest: built.append(args) or 1 / 0)
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    with pytest.raises(ZeroDivisionError):
        script.make_trainer(
            {"train": rows, "test": rows}, lambda **call: [0.0], args, ModelConfig(model_name_or_path=model_path)
        )
    assert built[0].merge_adapter is not use_vllm
