"""
Do alarms tell ill runs from healthy ones? Nine short runs of the tiny model, each healthy or ill in its own way.

    python recipes/studies/alarms.py            # 9 runs of 80 steps
    python recipes/studies/alarms.py --smoke    # only to see that it runs

Prints, for each run, the alarms that were raised and cleared, with their steps, and writes the table to `output_dir`.
"""

import json
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

from skills import MAX_COMPLETION, as_dataset, is_right, make_examples, make_tokenizer, warm_start
from transformers import HfArgumentParser, PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.recipe.tiny import tiny_model

HALF_LEARNT = {"translate": 512}
MIXED = {"greet": 128, "hopeless": 256, "translate": 128}
# Run -> prompts and options.
RUNS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "healthy": (HALF_LEARNT, {}),
    "healthy, no KL": (HALF_LEARNT, {"beta": 0.0}),
    "half of the prompts hopeless": (MIXED, {}),
    "the same, online curriculum": (MIXED, {"curriculum": "online", "group_size": "variance"}),
    "all prompts mastered": ({"greet": 512}, {}),
    "all prompts hopeless": ({"hopeless": 512}, {}),
    "learning rate 3e-2": (HALF_LEARNT, {"learning_rate": 3e-2}),
    "learning rate 1e-2, num_iterations 4": (HALF_LEARNT, {"learning_rate": 1e-2, "num_iterations": 4}),
    "completions cut after 3 tokens": (HALF_LEARNT, {"max_completion_length": 3}),
}


@dataclass
class Options:
    seed: int = field(default=100, metadata={"help": "Of model, data and training."})
    steps: int = field(default=80, metadata={"help": "Optimizer steps per run, 64 rows each."})
    warm_start_steps: int = field(default=350, metadata={"help": "Steps of supervised training."})
    output_dir: str = field(default="runs/alarms", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "2 steps per run."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.steps, self.warm_start_steps = 2, 5


def main(options: Options) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path(options.output_dir)
    tokenizer = make_tokenizer()
    model = warm_start(
        tiny_model(tokenizer, options.seed), tokenizer, seed=options.seed, steps=options.warm_start_steps
    )
    start = str(folder / "warm_start")
    model.save_pretrained(start)  # a path, because TRL loads the reference model from it
    lines = ["| run | alarms (steps) |", "| --- | --- |"]
    for number, (name, (counts, extra)) in enumerate(RUNS.items()):
        settings = {
            "output_dir": str(folder / str(number)),
            "monitor": True,
            "beta": 0.1,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 64,
            "num_generations": 8,
            "max_completion_length": MAX_COMPLETION,
            "max_steps": options.steps,
            "seed": options.seed,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        trainer = AdaptiveGRPOTrainer(
            model=start,
            reward_funcs=is_right,
            args=AdaptiveGRPOConfig(**{**settings, **extra}),
            train_dataset=as_dataset(make_examples(counts, options.seed)),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        events = [json.loads(line) for line in (folder / str(number) / "monitor" / "alarms.jsonl").open()]
        told = []
        for event in events:
            if event["state"] == "raised":
                over = [e["step"] for e in events if e["name"] == event["name"] and e["step"] > event["step"]]
                told.append(f"`{event['name']}` ({event['step']}{f' to {over[0]}' if over else ''})")
        lines.append(f"| {name} | {', '.join(told) or 'none'} |")
        print(lines[-1], flush=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    logging.getLogger("trl_grpo_ext.observe.monitor").setLevel(logging.ERROR)  # the table says it
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
