"""Run folders made by hand, as MonitorCallback and TRL write them."""

import json
import math
import random
import re
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

START = 1_700_000_000.0
TOTAL = "helpful+harmless-length"

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src="x" onerror="window.pwned = 2">',
    "</script><script>window.pwned = 3</script>",
    "javascript:window.pwned=4",
    '<a href="javascript:window.pwned=5">link</a>',
    "<!--<script>",
    "\u202egnissim\u202c \x1b[2J\x00\x07\u2028\u2066 \ud800",
    "']}; window.pwned = 6; //",
    '"><svg onload=alert(7)>',
    "@data@ @js@ &lt;b&gt; \\u003cscript\\u003e ${alert(8)} $\\frac{$",
    "<iframe src='http://127.0.0.1:9/'></iframe><link rel=stylesheet href=http://127.0.0.1:9/x.css>",
]


def data_of(page: Path) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(block)


def fabricate(
    folder: Path, steps: int = 40, logged: int | None = None, gain: float = 0.3, seed: int = 0, **info
) -> Path:
    """A run of `steps` steps, of which `logged` are done, whose reward rises by about `gain`; 3 seconds a step."""
    chance = random.Random(seed)
    logged = steps if logged is None else logged
    monitor = folder / "monitor"
    monitor.mkdir(parents=True)
    started = datetime.fromtimestamp(START, timezone.utc).isoformat(timespec="seconds")
    description = {
        "started": started,
        "config": {
            "output_dir": str(folder),
            "learning_rate": 5e-6,
            "beta": 0.04,
            "top_p": 1,
            "group_size": "variance",
        },
        "versions": {"trl": "1.16.0", "torch": "2.13.0"},
        "num_processes": 2,
        "model": "tiny",
        "reward_names": [TOTAL],
        "reward_weights": [1.0],
        "max_steps": steps,
        "status": "finished" if logged == steps else "running",
        "resumed_at_steps": [],
        **info,
    }
    (monitor / "run.json").write_text(json.dumps(description))
    lines = []
    for step in range(1, logged + 1):
        share = step / steps
        reward = 0.5 + gain * share + chance.gauss(0, 0.02)
        entry = {
            "step": step,
            "epoch": share,
            "time": START + 3 * step,
            "loss": chance.gauss(0, 0.1),
            "grad_norm": 1 + chance.random(),
            "learning_rate": 5e-6 * (1 - share),
            "reward": reward,
            "reward_std": 0.3,
            f"rewards/{TOTAL}/mean": reward,
            f"rewards/{TOTAL}/std": 0.3,
            "rewards/helpful/mean": reward - 0.3,
            "rewards/harmless/mean": 0.9,
            "rewards/length/mean": 120.0 + 40 * share,
            "kl": 0.01 + 0.05 * share,
            "beta": 0.04,
            "entropy": 2 - share,
            "completions/mean_length": 120.0 + 40 * share,
            "completions/min_length": 20.0,
            "completions/max_length": 256.0,
            "completions/clipped_ratio": 0.1 + 0.1 * share,
            "num_tokens": 9000.0 * step,
            "frac_reward_zero_std": 0.3,
            "group_size/mean": 8.0,
            "group_size/min": 2.0,
            "group_size/max": 16.0,
            "rollouts/informative": 0.5 + 0.4 * share,
            "rollouts/total": 64.0 * step,
            "curriculum/position": share,
            "advantage/mean": 0.0,
            "advantage/abs_mean": 0.7,
            "time/generate": 2.0,
            "time/score": 0.2,
            "time/update": 0.8,
            "my/metric": math.sin(step),
        }
        lines.append(json.dumps(entry) + "\n")
    (monitor / "metrics.jsonl").write_text("".join(lines))
    return folder


def with_tasks(folder: Path, **levels: float) -> Path:
    """The same run with tasks, whose rewards lie at these levels: those of even tasks rise, the others stay."""
    path = folder / "monitor" / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        for number, (name, level) in enumerate(levels.items()):
            moved = entry["epoch"] * (number % 2 == 0) + 0.05 * math.sin(entry["step"] * (number + 1))
            values = {"reward": level * (1 + moved), "reward_std": abs(level) / 2, "share": 1 / len(levels)}
            values |= {"length": 40.0 * (number + 1), "truncated": 0.1 * number, "informative": 0.8 - 0.3 * number}
            entry |= {f"tasks/{name}/{metric}": value for metric, value in values.items()}
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))
    return folder


def alarm(step: int, name: str = "kl_spike", state: str = "raised", **texts) -> dict:
    texts = {"evidence": "kl is 0.9", "cause": "steps too large", "remedy": "lower the learning rate", **texts}
    return {"step": step, "time": START + 3 * step, "name": name, "state": state, "action": None, **texts}


def write_alarms(folder: Path, *alarms: dict) -> None:
    (folder / "monitor" / "alarms.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in alarms))


def write_table(folder: Path, step: int, rows: list[dict]) -> Path:
    """TRL's completions table of one log."""
    (folder / "completions").mkdir(exist_ok=True)
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    pq.write_table(pa.Table.from_pylist([{"step": step, **row} for row in rows]), path)
    return path


def group(prompt: str, rewards: list[float], completions: list[str] | None = None, **columns) -> list[dict]:
    """Rows of one group, with advantages that are the rewards less their mean."""
    mean = sum(rewards) / len(rewards)
    texts = completions or [f"answer {i} to {prompt}" for i in range(len(rewards))]
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": text}],
            TOTAL: reward,
            "helpful": reward - 0.3,
            "harmless": 0.9,
            "length": float(len(text)),
            "advantage": reward - mean,
            **columns,
        }
        for text, reward in zip(texts, rewards, strict=True)
    ]
