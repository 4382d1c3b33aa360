"""Started by test_compute_trials.py under torchrun: on one process the trial of the shared prefill goes wrong."""

import sys

import torch
from accelerate import PartialState
from datasets import Dataset
from kit import config_kwargs, count_vowels

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.compute import generation
from trl_grpo_ext.host.processes import leave


def main(model_path, out):
    state = PartialState(cpu=True)
    if state.process_index == 1:
        generation.dtype_of = None  # what is called in the trial alone
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=count_vowels,
        args=AdaptiveGRPOConfig(**config_kwargs(out, share_prompts=True, max_steps=1)),
        train_dataset=Dataset.from_dict({"prompt": [f"say {letter}" for letter in "abcdefgh"]}),
    )
    trainer.train()
    torch.save(trainer._shared_prefill.reason, f"{out}/rank{state.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
