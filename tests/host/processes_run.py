"""Runs in which the last process has a hard time, and one in which none has; started by test_processes.py.

Errors are caught and written down, so that one launch can try all of them.
"""

import time

from accelerate import PartialState
from kit import Record, batches_of, make_letters, trainer_of, weights_of
from rollout_helpers import first_turns, user

from trl_grpo_ext import MultiTurnCallback


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


def plan_of(batch) -> list:
    """What a process believes was planned and scored."""
    prompts = None if batch.prompt_index is None else batch.prompt_index.tolist()
    return [prompts, batch.group_sizes.tolist(), batch.rewards.tolist(), batch.advantages.tolist()]


def run(name: str, model_path: str, out: str, rows: int) -> dict:
    """One training run: plans and weights, or the error."""
    reward, options, *callback = RUNS[name]
    options = {"max_steps": 2, "per_device_train_batch_size": rows, **options}
    data = first_turns(26) if callback else make_letters().select_columns("prompt")
    trainer = trainer_of(model_path, data, f"{out}/{name}", reward, [Record, *(make() for make in callback)], **options)
    error = None
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "plans": [plan_of(batch) for batch in batches_of(trainer)], "weights": weights_of(trainer)}


def runs(model_path: str, out: str, names: list[str]) -> dict:
    return {name: run(name, model_path, out, rows=4) for name in names}
