"""Started by test_live.py in a terminal: a run that is disturbed, and leaves training as it is told to."""

import logging
import os
import signal
import sys
import time
import warnings

from datasets import Dataset
from kit import config_kwargs, count_vowels
from transformers import PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.observe.live import LiveCallback
from trl_grpo_ext.rewards import Length, as_reward


class Disturb(GRPOCallback):
    def __init__(self, how: str):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("a line on standard output")
            warnings.warn("a warning", stacklevel=1)
            logging.getLogger("made_before").warning("a line of a handler that was made before")
        if state.global_step == 3 and self.how == "catch":
            raise RuntimeError("caught")
        if state.global_step == 3 and self.how in ("SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.how))
            time.sleep(1)


def main(model_path: str, out: str, how: str) -> None:
    # A shell that starts the tests in the background lets them ignore interrupts, and they their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("made_before").addHandler(logging.StreamHandler())
    logging.getLogger("made_before").propagate = False
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=as_reward(count_vowels) - 0.01 * Length(),
        args=AdaptiveGRPOConfig(**config_kwargs(out, max_steps=6, monitor=True)),
        train_dataset=Dataset.from_dict({"prompt": [f"say {a}" for a in "abcdefghijklmnopqrstuvwxyz"]}),
        callbacks=[Disturb(how)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LiveCallback)
    print("BEGIN")
    try:
        trainer.train()
    except RuntimeError:
        time.sleep(1.5)
        print("standard output is the one before:", sys.stdout is sys.__stdout__)
    print("END")


if __name__ == "__main__":
    main(*sys.argv[1:])
