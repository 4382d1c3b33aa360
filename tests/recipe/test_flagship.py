"""All of the flagship, as the README starts it. `make flagship` runs it by itself: five minutes on two idle cores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from trl_grpo_ext.observe.report import read_run

ROOT = Path(__file__).parents[2]


@pytest.mark.training
@pytest.mark.flagship
def test_what_the_reward_names_moves_and_no_alarm_is_open(tmp_path):
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", str(ROOT / "recipes" / "helpful.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=2400
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Prompts: 192 to train on, 48 held out" in result.stdout
    assert "alarms open at the end: none" in result.stdout
    assert read_run(tmp_path).open_alarms == []
    assert "step 53/54 · reward" in result.stderr + result.stdout  # of two updates on a batch, the first logs it
    record = [json.loads(line) for line in (tmp_path / "monitor" / "metrics.jsonl").read_text().splitlines()]
    # At least 80 % of the sampled answers end by themselves.
    cut = [entry["completions/clipped_ratio"] for entry in record if "completions/clipped_ratio" in entry]
    assert mean(cut[-10:]) <= 0.2
    # What holds on every seed and every machine; parts gain more on some than on others (docs/measured/recipes.md).
    before, after = (
        {
            "total": entry["eval_reward"],
            "harmlessness": entry["eval_rewards/harmlessness/mean"],
            "finished": entry["eval_rewards/finished/mean"],
            "length": entry["eval_completions/mean_length"],
        }
        for entry in record
        if "eval_reward" in entry
    )
    assert after["finished"] >= 0.8 > before["finished"]
    assert after["harmlessness"] > before["harmlessness"]
    assert after["length"] < before["length"]
    repeated = re.search(r"│ repeat the question +│.*│ +(-?[\d.]+) │\n", result.stdout)
    assert repeated is not None
    assert after["total"] > max(before["total"], float(repeated[1])) + 0.1
