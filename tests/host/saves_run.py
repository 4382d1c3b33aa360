"""Saves of which one part fails on one of two processes, and a resume; started by test_saves.py.

Errors are caught and written down, so that one launch can try all of them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from kit import logs_of, make_letters, trainer_of, weights_of
from transformers import Trainer, TrainerCallback, TrainerState
from trl import GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.host import checkpoints


class Keeper(GRPOCallback):
    def state_dict(self):
        return {"kept": 1}


# What may fail, as an object and the name of a function; for a function that writes several files, a part of a name.
PARTS = {
    "begin": (checkpoints, "begin"),
    "card": (GRPOTrainer, "create_model_card"),
    "model": (GRPOTrainer, "save_model"),
    "optimizer": (GRPOTrainer, "_save_optimizer_and_scheduler"),
    "scheduler file": (torch, "save", "scheduler.pt"),
    "scaler": (GRPOTrainer, "_save_scaler"),
    "random state": (GRPOTrainer, "_save_rng_state"),
    "random file": (torch, "save", "rng_state_"),
    "trainer state": (TrainerState, "save_to_json"),
    "state of a callback": (Keeper, "state_dict"),
    "callbacks file": (checkpoints, "write_whole", "grpo_callbacks"),
    "rollouts file": (checkpoints, "write_whole", "grpo_rollouts"),
    "complete": (checkpoints, "complete"),
}  # fmt: skip
# Where the writer of a file is the main process, the other one has no part that could fail.
OF_MAIN = {"begin", "scheduler file", "trainer state", "state of a callback", "callbacks file", "complete"}
LATER = {"push": (Trainer, "_push_from_checkpoint"), "delete": (checkpoints, "delete_old")}
AFTERWARDS = {"look": (checkpoints, "last_complete")}  # which is asked what to say of a failed save
CASES = [(part, rank) for part in PARTS for rank in ((0,) if part in OF_MAIN else (0, 1))]
CASES += [(part, 0) for part in LATER]


class Breaks(TrainerCallback):
    """From a step on, a part fails on one process."""

    def __init__(self, part: str, rank: int, step: int):
        self.where, self.rank, self.step = (PARTS | LATER | AFTERWARDS)[part], rank, step
        self.undo = lambda: None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and PartialState().process_index == self.rank:
            self.break_it()

    def break_it(self):
        owner, name, *fragments = self.where
        before = getattr(owner, name)
        self.undo = lambda: setattr(owner, name, before)

        def fails(*args, **kwargs):
            if not fragments or any(fragments[0] in str(arg) for arg in args if isinstance(arg, str | Path)):
                raise OSError(28, "No space left on device")
            return before(*args, **kwargs)

        setattr(owner, name, fails)


SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "ddp_timeout": 60}


def saving_trainer(model_path: str, out: str, callbacks=(), **options) -> AdaptiveGRPOTrainer:
    data, options = make_letters(), {**SAVING, **options}
    return trainer_of(
        model_path, data, out, callbacks=[Keeper(), *callbacks], eval_dataset=data.select(range(4)), **options
    )


def outcome(act) -> dict:
    """The error. A process that waits for another one in vain would have that of a collective, after a minute."""
    try:
        act()
    except Exception as raised:
        return {"error": f"{type(raised).__name__}: {raised}"}
    return {"error": None}


def failing_save(model_path: str, out: str, part: str, rank: int, also: Sequence[TrainerCallback] = ()) -> dict:
    """The third save fails. Evaluations choose a best checkpoint, since transformers then waits amid the save."""
    breaks = Breaks(part, rank, step=3)
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward"}
    trainer = saving_trainer(model_path, out, [breaks, *also], save_total_limit=2, per_device_eval_batch_size=4, **best)
    if part == "push":
        trainer.args.push_to_hub = True  # not before: a repository would be made
        trainer.push_to_hub = trainer._finish_current_push = lambda *args, **kwargs: None
        before, Trainer._push_from_checkpoint = Trainer._push_from_checkpoint, lambda self, folder: None
    try:
        return outcome(trainer.train)
    finally:
        breaks.undo()
        if part == "push":
            Trainer._push_from_checkpoint = before


def failing_twice(model_path: str, out: str, rank: int) -> dict:
    """The third save fails on process 0, and what to say of it fails on one of both."""
    look = Breaks("look", rank, step=3)
    try:
        return failing_save(model_path, out, "rollouts file", 0, [look])
    finally:
        look.undo()


def failing_again(model_path: str, out: str, part: str, rank: int) -> dict:
    """A step is saved a second time, over its complete checkpoint."""
    trainer = saving_trainer(model_path, out)
    trainer.train()
    breaks = Breaks(part, rank, step=3)
    if PartialState().process_index == rank:
        breaks.break_it()
    try:
        return outcome(lambda: trainer._save_checkpoint(trainer.model, None))
    finally:
        breaks.undo()


def damaged(model_path: str, out: str) -> dict:
    """One process cannot read its part of a checkpoint whose files all have their size."""
    saving_trainer(model_path, out).train()
    path = Path(out, "checkpoint-3", "grpo_rollouts_1.pt")
    if PartialState().process_index == 1:
        path.write_bytes(bytes(path.stat().st_size))
    return outcome(lambda: saving_trainer(model_path, out, max_steps=4).train(resume_from_checkpoint=True))


EVERYTHING = {
    "group_size": "variance",
    "curriculum": "target",
    "difficulty_column": "score",
    "dynamic_sampling_rounds": 1,
    "reward_clip_quantiles": [0.05, 0.95],
    "share_prompts": True,
    "monitor": True,
    "on_alarm": {"truncated": "cool_lr"},
    "kl_target": 0.1,
    "kl_horizon": 100.0,
    "beta": 0.04,
    "gradient_accumulation_steps": 2,
    "log_completions": True,
    "logging_steps": 2,
    "max_steps": 6,
}  # fmt: skip


def trained(model_path: str, out: str, resume: str | None = None) -> dict:
    """A run with everything on. It saves after step 3, which is between two logs and between two generations."""
    trainer = saving_trainer(model_path, out, save_steps=3, **EVERYTHING)
    trainer.train(resume_from_checkpoint=resume)
    logs = [{name: value for name, value in entry.items() if "time" not in name} for entry in logs_of(trainer)]
    return {"weights": weights_of(trainer), "logs": logs}


def runs(model_path: str, out: str) -> dict:
    return {
        **{(part, rank): failing_save(model_path, f"{out}/{part} {rank}", part, rank) for part, rank in CASES},
        **{("twice", rank): failing_twice(model_path, f"{out}/twice {rank}", rank) for rank in (0, 1)},
        "again": failing_again(model_path, f"{out}/again", "random file", 1),
        "damaged": damaged(model_path, f"{out}/damaged"),
        "whole": trained(model_path, f"{out}/whole"),
        "resumed": trained(model_path, f"{out}/resumed", resume=f"{out}/whole/checkpoint-3"),
    }
