"""
Soak: train on the scores of a judge that fails, hangs and answers nonsense, and count what becomes of every row.

    python recipes/studies/judge.py            # 10 000 rollouts
    python recipes/studies/judge.py --smoke    # 320, only to see that it runs

The judge is a local server (`judge_server.py`). A second reward with weight 0 knows the right score of each row, so
that every score that arrives can be checked. Prints the counts of both sides and the memory of the training process.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

import httpx  # comes with the extra `test`
import psutil  # comes with accelerate
from judge_server import score
from skills import MAX_COMPLETION, as_dataset, make_examples, make_tokenizer
from transformers import HfArgumentParser, PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, RolloutBatch
from trl_grpo_ext.recipe.tiny import tiny_model
from trl_grpo_ext.rewards import as_reward
from trl_grpo_ext.rewards.scoring import TALLIES


@dataclass
class Options:
    rollouts: int = field(default=10_000, metadata={"help": "Rows to score."})
    rows: int = field(default=200, metadata={"help": "Rows per step."})
    fail: float = field(default=0.2, metadata={"help": "Share of requests that fail."})
    hang: float = field(default=0.02, metadata={"help": "Share that is never answered."})
    garbage: float = field(default=0.05, metadata={"help": "Share answered with nonsense."})
    timeout: float = field(default=2.0, metadata={"help": "Seconds for one attempt."})
    retries: int = field(default=2, metadata={"help": "Retries of a row."})
    concurrency: int = field(default=16, metadata={"help": "Rows at once."})
    seed: int = field(default=0, metadata={"help": "Of the model, the data, the training and the judge."})
    output_dir: str = field(default="runs/judge", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "320 rollouts."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.rollouts, self.rows = 320, 80


class Judge:
    """The reward: one request for each row."""

    __name__ = "judge"

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/"
        self.client: httpx.AsyncClient | None = None

    async def __call__(self, completions: list[str], **kwargs: Any) -> list[object]:
        if self.client is None:  # in the event loop of the training
            self.client = httpx.AsyncClient(timeout=None)  # .timeout() sees to that
        answers = [await self.client.post(self.url, content=text) for text in completions]
        return [parse(answer.raise_for_status().text) for answer in answers]


def parse(text: str) -> object:
    """The score in an answer, or else the answer: what is no number is counted as garbage."""
    try:
        return json.loads(text)["score"]
    except (ValueError, KeyError, TypeError):
        return text


class Ledger(GRPOCallback):
    """What arrived in the training: rows by outcome, wrong scores, and the memory in use."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.memory: list[int] = []

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        judged, right = batch.raw_rewards_per_func.unbind(1)
        missing = judged.isnan()
        self.counts["rows"] += missing.numel()
        self.counts["without a score"] += int(missing.sum())
        self.counts["with a wrong score"] += int((judged != right)[~missing].sum())
        self.memory.append(psutil.Process().memory_info().rss)


def right_score(completions: list[str], **kwargs: Any) -> list[float]:
    return [score(text) for text in completions]


def train(options: Options, judge: Judge, ledger: Ledger) -> list[dict[str, Any]]:
    tokenizer = make_tokenizer()
    trainer = AdaptiveGRPOTrainer(
        model=tiny_model(tokenizer, options.seed),
        reward_funcs=[
            as_reward(judge)
            .timeout(options.timeout)
            .retry(options.retries, wait=0.05, max_wait=0.5)
            .concurrency(options.concurrency),
            right_score,
        ],
        args=AdaptiveGRPOConfig(
            output_dir=options.output_dir,
            reward_weights=[1.0, 0.0],
            per_device_train_batch_size=options.rows,
            num_generations=8,
            max_completion_length=MAX_COMPLETION,
            max_steps=-(-options.rollouts // options.rows),
            logging_steps=1,
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_dataset(make_examples({"translate": 512}, options.seed)),
        processing_class=tokenizer,
        callbacks=[ledger],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(options: Options) -> dict[str, float]:
    warnings.filterwarnings("ignore", category=FutureWarning)
    shares = [f"--{name}={getattr(options, name)}" for name in ("fail", "hang", "garbage", "seed")]
    script = Path(__file__).with_name("judge_server.py")
    server = subprocess.Popen([sys.executable, str(script), *shares], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        judge, ledger = Judge(int(server.stdout.readline())), Ledger()
        start = time.perf_counter()
        logs = train(options, judge, ledger)
        seconds = time.perf_counter() - start
        there = httpx.get(judge.url + "counts").json()
    finally:
        server.kill()
        server.wait()
    names = (*TALLIES, "errors")
    found = {f"logged {name}": sum(round(entry[f"rewards/judge/{name}"]) for entry in logs) for name in names}
    found |= {f"rows {name}" if name != "rows" else name: count for name, count in ledger.counts.items()}
    found |= {f"requests that the judge {name}": count for name, count in there.items()}
    for fifth in range(1, 6):
        found[f"MB after {fifth} of 5 parts"] = ledger.memory[len(ledger.memory) * fifth // 5 - 1] / 1e6
    found["seconds"] = seconds
    for name, value in found.items():
        print(f"{name:40} {value:10.1f}" if isinstance(value, float) else f"{name:40} {value:10}", flush=True)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(options.output_dir) / "counts.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
