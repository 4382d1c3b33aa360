"""The recipes as a user starts them, on the real SmolLM2, only shorter; and the pieces that they print with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import config_kwargs
from peft import AutoPeftModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.evaluation import evaluate_held_out, print_comparison
from trl_grpo_ext.rewards import Length, as_reward

ROOT = Path(__file__).parents[1]


def test_helpful_runs_as_the_readme_says(tmp_path):
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", str(ROOT / "recipes" / "helpful.py")]
    short = ["--max_steps", "2", "--max_completion_length", "8", "--per_device_train_batch_size", "8"]
    # The model comes from the package index or the cache, never from a hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, *short, "--output_dir", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for expected in (
        "Model:",
        "Prompts: 192 to train on, 48 held out",
        "helpfulness",
        "harmlessness",
        "length",
        "total",
    ):
        assert expected in result.stdout
    assert "step 2/2 · reward" in result.stderr + result.stdout
    assert f"report of the run to {tmp_path / 'report.html'}" in result.stdout
    assert (tmp_path / "report.html").stat().st_size > 30_000
    record = [json.loads(line) for line in (tmp_path / "monitor" / "metrics.jsonl").read_text().splitlines()]
    assert len([entry for entry in record if "eval_reward" in entry and "eval_rewards/helpfulness/mean" in entry]) == 2
    assert (tmp_path / "report_figures" / "reward.png").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("[!c]*.yaml")), ids=lambda path: path.stem)
def test_configs_parse(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from helpful import HelpfulArguments
    from trl import ModelConfig

    parser = TrlParser((HelpfulArguments, AdaptiveGRPOConfig, ModelConfig))
    _, args, _ = parser.parse_args_and_config(["--config", str(path), "--bf16", "False", "--use_cpu", "True"])
    assert args.group_size in ("fixed", "threshold", "variance")


def test_held_out_answers_are_greedy_and_leave_training_alone(model_path, conversational, tmp_path, capsys):
    def first_letter(completions, **kwargs):
        return [None if i == 0 else float(len(c[0]["content"])) for i, c in enumerate(completions)]

    reward = as_reward(first_letter) - 0.5 * Length()
    trainer = GRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=GRPOConfig(**config_kwargs(tmp_path)),
        train_dataset=conversational,
    )
    trainer.model.train()
    once = evaluate_held_out(trainer, conversational, reward, batch_size=7)
    again = evaluate_held_out(trainer, conversational, reward, batch_size=26)
    assert trainer.model.training
    assert once.questions == [f"say {chr(ord('a') + i)}" for i in range(26)]
    assert once.answers == again.answers
    assert once.scores["first_letter"][0] is None
    for letters, length, total in list(
        zip(*(once.scores[k] for k in ("first_letter", "length", "total")), strict=True)
    )[1:]:
        assert total == pytest.approx(letters - 0.5 * length)
    print_comparison(once, again)
    printed = capsys.readouterr().out
    assert "+0.000" in printed
    assert "say a" in printed


def test_markup_in_an_answer_is_printed_as_text(capsys):
    from trl_grpo_ext.evaluation import HeldOut

    held_out = HeldOut(["[bold]q[/bold]"], ["[red]x[/nothing]"], {"total": [1.0]})
    print_comparison(held_out, held_out)
    assert "[red]x[/nothing]" in capsys.readouterr().out
