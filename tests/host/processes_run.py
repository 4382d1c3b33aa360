"""Started by tests/host/test_processes.py: runs in which the last process has a hard time, and one in which none has.

Errors are caught and written down, so that one launch can try all of them.
"""

import json
import sys
import time

import torch
from accelerate import PartialState
from datasets import Dataset
from kit import config_kwargs
from rollout_helpers import user

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, MultiTurnCallback
from trl_grpo_ext.host.processes import leave

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Plans(GRPOCallback):
    """What each process believes was planned and scored."""

    def __init__(self):
        self.seen = []

    def on_rollouts(self, batch, **kwargs):
        prompts = None if batch.prompt_index is None else batch.prompt_index.tolist()
        self.seen.append([prompts, batch.group_sizes.tolist(), batch.rewards.tolist(), batch.advantages.tolist()])


def is_last() -> bool:
    return PartialState().process_index == PartialState().num_processes - 1


def by_copy(prompts, **kwargs) -> list[float]:
    """Depends on the prompt and on which of its copies a row is, so not on who sampled what."""
    return [float((3 * prompts[:i].count(prompt) + ord(prompt[-1])) % 5) for i, prompt in enumerate(prompts)]


def raises(prompts, **kwargs):
    if is_last():
        raise ValueError("no judge today")
    return by_copy(prompts)


async def raises_async(prompts, **kwargs):
    return raises(prompts)


def too_few(prompts, **kwargs):
    return by_copy(prompts)[: -1 if is_last() else None]


def slow(prompts, **kwargs):
    time.sleep(1.5 if is_last() else 0.0)
    return by_copy(prompts)


def none(prompts, **kwargs):
    return [None] * len(prompts) if is_last() else by_copy(prompts)


def flat(prompts, **kwargs):
    return [1.0] * len(prompts) if is_last() else by_copy(prompts)


def of_chat(prompts, turn, **kwargs):
    if turn[0] > 1 and is_last():
        raise ValueError("no judge today")
    return [float(i % 3) for i in range(len(prompts))]


def hangs_up(history):
    if is_last():
        raise ValueError("hung up")
    return user("more")


def goes_on(history):
    return user("more")


# Greedy answers, and a step in proportion to the gradient: then one process with all rows does the same.
SAME = {"top_k": 1, "optim": "sgd", "learning_rate": 0.1, "curriculum": "online", "max_steps": 3}
TURNS = {"per_device_train_batch_size": 8}
ADAPTIVE = {"group_size": "variance", "dynamic_sampling_rounds": 1, "share_prompts": True, "skip_zero_advantage": True}
RUNS: dict[str, tuple] = {
    "healthy": (by_copy, SAME),
    "adaptive": (by_copy, ADAPTIVE),
    "slow": (slow, {}),
    "none": (none, {}),
    "flat": (flat, {"skip_zero_advantage": True}),
    "raises": (raises, {}),
    "raises async": (raises_async, {}),
    "too few": (too_few, {}),
    "user raises": (by_copy, TURNS, lambda: MultiTurnCallback(user=hangs_up, max_turns=2)),
    "reward of a turn raises": (of_chat, TURNS, lambda: MultiTurnCallback(user=goes_on, carry="best", max_turns=2)),
}  # fmt: skip


def run(name: str, model_path: str, out: str, rows: int) -> dict:
    """One training run: plans and weights, or the error; and how long it took."""
    reward, options, *callback = RUNS[name]
    prompts = [f"say {letter}" for letter in LETTERS]
    plans = Plans()
    options = {"max_steps": 2, "per_device_train_batch_size": rows, **options}
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(f"{out}/{name}", **options)),
        train_dataset=Dataset.from_dict({"prompt": [[user(p)] for p in prompts] if callback else prompts}),
        callbacks=[plans, *(make() for make in callback)],
    )
    start = time.monotonic()
    error = None
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    return {"error": error, "plans": plans.seen, "weights": weights, "seconds": time.monotonic() - start}


def main(model_path: str, out: str, options: str) -> None:
    options = json.loads(options)
    outcomes = {name: run(name, model_path, out, options["rows"]) for name in options["names"]}
    torch.save(outcomes, f"{out}/rank{PartialState().process_index}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
