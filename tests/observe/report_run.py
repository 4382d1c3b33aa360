"""Started by tests/observe/test_report.py under torchrun: a run with a composed reward that logs its completions."""

import sys

from datasets import Dataset
from kit import config_kwargs, count_vowels, has_answer
from transformers import PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.host.processes import leave
from trl_grpo_ext.observe.live import LiveCallback
from trl_grpo_ext.rewards import as_reward

if __name__ == "__main__":
    model_path, out = sys.argv[1:]
    letters = "abcdefghijklmnopqrstuvwxyz"
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=as_reward(count_vowels) + as_reward(has_answer),
        args=AdaptiveGRPOConfig(
            **config_kwargs(out, log_completions=True, num_completions_to_print=0, group_size="variance", monitor=True)
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"say {a}" for a in letters], "answer": list(letters)}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LiveCallback)
    trainer.train()
    leave()
