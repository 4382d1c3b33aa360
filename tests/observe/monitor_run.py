"""Started by test_monitor.py: a run in a process of its own, with trackers, or one of several under torchrun."""

import json
import sys

import torch
from datasets import Dataset
from kit import config_kwargs, has_answer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, MonitorCallback
from trl_grpo_ext.host.processes import leave
from trl_grpo_ext.observe.alarms import Alarm
from trl_grpo_ext.observe.readings import level


class RankMetric(GRPOCallback):
    """A metric that nobody gathered: on rank 0 it is 0, on rank 1 it is 1."""

    def on_setup(self, args, state, control, trainer, **kwargs):
        self.rank = trainer.accelerator.process_index

    def on_rollouts(self, args, state, control, batch, **kwargs):
        batch.metrics["rank"] = float(self.rank)


def main(model_path: str, out: str, options: str) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    options = json.loads(options)
    columns = {"difficulty": [("easy", "medium", "hard")[i % 3] for i in range(26)]}
    callbacks = []
    if options.pop("rank_metric", False):
        alarm = Alarm("rank", level("rank"), 0.5, 0.5, warmup=0, patience=1, calm=1, cause="c", remedy="r", source="s")
        callbacks = [RankMetric(), MonitorCallback({"rank": "adapt_beta"}, [alarm])]
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=has_answer,
        args=AdaptiveGRPOConfig(**config_kwargs(f"{out}/run", **options)),
        train_dataset=Dataset.from_dict({"prompt": [f"say {a}" for a in letters], "answer": list(letters), **columns}),
        callbacks=callbacks,
    )
    trainer.train()
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    saved = {
        "weights": [p.detach().clone() for p in unwrapped.parameters()],
        "states": [callback.state_dict() for callback in trainer.grpo_callbacks],
        "beta": trainer.beta,
        "logs": trainer.state.log_history,
    }
    torch.save(saved, f"{out}/rank{trainer.accelerator.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
