"""Rewards called as TRL calls them."""

import asyncio

from trl.trainer import utils

from trl_grpo_ext.host.calls import is_async

is_async_callable = getattr(utils, "is_async_callable", is_async)  # TRL 1.13 has none


class Logs:
    """TRL's `log_metric` and `log_extra`, which keep everything in its order."""

    def __init__(self):
        self.metrics, self.columns = [], []

    def kwargs(self):
        return {
            "log_metric": lambda name, value: self.metrics.append((name, value)),
            "log_extra": lambda name, values: self.columns.append((name, values)),
        }


def settle(value):
    """A value, awaited where it is async."""
    return asyncio.run(value) if asyncio.iscoroutine(value) else value


def ask(reward, *completions, **columns):
    """The values of these completions."""
    return settle(reward(prompts=["p"] * len(completions), completions=list(completions), **columns))
