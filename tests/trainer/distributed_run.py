"""Started by test_distributed.py under torchrun: one training run, its plans and weights written to a file."""

import json
import sys

import torch
from accelerate import PartialState
from datasets import Dataset
from kit import config_kwargs, has_answer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, CriticBaseline, GRPOCallback
from trl_grpo_ext.host.processes import leave


class Record(GRPOCallback):
    """What each rank believes about each batch."""

    def __init__(self):
        self.batches = []

    def on_rollouts(self, args, state, control, batch, **kwargs):
        discarded = [] if batch.discarded is None else batch.discarded.prompt_index.tolist()
        self.batches.append(
            {
                "prompts": None if batch.prompt_index is None else batch.prompt_index.tolist(),
                "sizes": batch.group_sizes.tolist(),
                "rewards": batch.rewards.tolist(),
                "advantages": batch.advantages.tolist(),
                "lengths": batch.completion_lengths.tolist(),
                "own_prompts": [row["prompt"] for row in batch.rows],
                "discarded": discarded,
            }
        )


def main(model_path: str, out: str, options: str) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    dataset = Dataset.from_dict({"prompt": [f"say {a}" for a in letters], "answer": list(letters)})
    options = json.loads(options)
    resume = options.pop("resume", None)
    flat_rank = options.pop("flat_rank", None)
    critic = [CriticBaseline()] if options.pop("critic", False) else []

    def flat_on_one_rank(completion_ids, **kwargs):
        is_flat = PartialState().process_index == flat_rank
        return [0.0 if is_flat else float(ids[0] % 7) for ids in completion_ids]

    record = Record()
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=has_answer if flat_rank is None else flat_on_one_rank,
        args=AdaptiveGRPOConfig(**config_kwargs(f"{out}/run", **options)),
        train_dataset=dataset,
        callbacks=[record, *critic],
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {
        name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    states = [callback.state_dict() for callback in trainer.grpo_callbacks]
    saved = {"batches": record.batches, "weights": weights, "states": states, "logs": trainer.state.log_history}
    torch.save(saved, f"{out}/rank{trainer.accelerator.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
