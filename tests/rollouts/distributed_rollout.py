"""Started by test_distributed_rollouts.py under torchrun: one run of several turns, what it saw in a file."""

import json
import sys

import torch
from datasets import Dataset
from kit import config_kwargs
from rollout_helpers import Record, length_of_text, user

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, HierarchicalCallback, MultiTurnCallback
from trl_grpo_ext.host.processes import leave


def patient(history):
    """Goes on until it reads a vowel, so that processes have different numbers of turns."""
    return None if set("aeiou") & set(history[-1]["content"]) else user("more")


def main(model_path: str, out: str, options: str) -> None:
    options = json.loads(options)
    resume, kind = options.pop("resume", None), options.pop("kind")
    limit = options.pop("limit", None)
    generated = []

    class Counting(AdaptiveGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            generated.append(len(prompt_ids))
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    rows = [{"prompt": [user(f"say {chr(ord('a') + i)}")]} for i in range(20)]
    if kind == "scripted-best":  # of one to three turns, so that a process may have none where the other has some
        rows = [{**row, "turns": ["more"] * (i % 3)} for i, row in enumerate(rows)]
        callback = MultiTurnCallback(carry="best")
    elif kind == "hierarchical":
        callback = HierarchicalCallback(3, 2, "plan {prompt}", "do it", max_conversation_length=limit)
    else:
        history, _, carry = kind.partition("-")
        callback = MultiTurnCallback(history, user=patient, carry=carry or "random", max_turns=3)
    record = Record()
    trainer = Counting(
        model=model_path,
        reward_funcs=length_of_text,
        args=AdaptiveGRPOConfig(**config_kwargs(f"{out}/run", **options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        callbacks=[callback, record],
    )
    trainer.train(resume_from_checkpoint=resume)
    fields = ("rewards", "advantages", "turns", "parents", "group_ids", "completion_lengths", "prompt_index")
    weights = {
        name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    saved = {
        "batches": [{name: getattr(batch, name).tolist() for name in fields} for batch in record.batches],
        "weights": weights,
        "generated": generated,
        "own": [[(answer.turn, answer.text) for answer in row.answers] for row in trainer.rollout.sequences],
        "logs": trainer.state.log_history,
    }
    torch.save(saved, f"{out}/rank{trainer.accelerator.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
