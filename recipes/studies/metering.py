"""What the comparisons share: counting rollouts where none can be missed, measuring on the way, medians with ranges."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

OKABE_ITO = ["#000000", "#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#0072B2", "#F0E442"]


class Meter:
    """
    A reward function that counts. Every rollout passes here once, whatever the trainer does with it later.

    Args:
        reward (`Callable`):
            Reward function.
        signal (`Callable`, *optional*):
            Reward function whose differences within a group make its rollouts informative. Defaults to `reward`.
    """

    def __init__(self, reward: Callable[..., list[float]], signal: Callable[..., list[float]] | None = None):
        self.reward, self.signal = reward, signal
        self.__name__ = reward.__name__
        self.calls: list[tuple[int, int, int]] = []  # rollouts, how many of them in groups that differ, prompts

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        rewards = self.reward(prompts=prompts, completions=completions, **kwargs)
        signal = rewards
        if self.signal is not None:
            signal = self.signal(prompts=prompts, completions=completions, **kwargs)
        groups: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, signal, strict=True):
            groups.setdefault(str(prompt), []).append(value)
        informative = sum(len(group) for group in groups.values() if min(group) < max(group))
        self.calls.append((len(rewards), informative, len(groups)))
        return rewards

    @property
    def rollouts(self) -> int:
        return sum(call[0] for call in self.calls)

    @property
    def prompts(self) -> int:
        """Prompts that rollouts were sampled for; one that comes again in a later batch counts again."""
        return sum(call[2] for call in self.calls)

    def informative_share(self, start: float, end: float = float("inf")) -> float:
        """Of the rollouts that began between two counts, the share in groups whose rewards differ."""
        total = informative = seen = 0
        for count, useful, _ in self.calls:
            if start <= seen < end:
                total, informative = total + count, informative + useful
            seen += count
        return informative / max(total, 1)


class Evaluator(TrainerCallback):
    """
    Measures the policy at fixed intervals of rollouts, and ends the run when the budget is spent.

    Where a batch is trained on several times (`num_iterations`), the policy is measured after the last pass over it.

    Args:
        meter ([`Meter`]):
            Counts the rollouts.
        measure (`Callable[[model], Any]`):
            What to measure. It must not draw from the random generators of the training.
        every (`int`), budget (`int`):
            In rollouts.
    """

    def __init__(self, meter: Meter, measure: Callable[[PreTrainedModel], Any], every: int, budget: int):
        self.meter, self.measure = meter, measure
        self.every, self.budget = every, budget
        self.curve: list[tuple[int, Any]] = []  # rollouts, value
        self.prompts: list[int] = []  # at each point of the curve
        self.seconds = 0.0  # of CPU time, spent on measuring

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        self.look(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        if state.global_step % getattr(args, "num_iterations", 1) > 0:
            return
        done = self.meter.rollouts >= self.budget
        control.should_training_stop = control.should_training_stop or done
        if done or self.meter.rollouts >= self.curve[-1][0] + self.every:
            self.look(model)

    def look(self, model: PreTrainedModel) -> None:
        start = time.process_time()
        self.curve.append((self.meter.rollouts, self.measure(model)))
        self.prompts.append(self.meter.prompts)
        self.seconds += time.process_time() - start


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with a header if it is the first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spread(values: list[float], digits: int) -> str:
    """Median and range; a value that was never reached is infinite, and `-` stands for no values."""
    if not values:
        return "-"

    def show(value: float) -> str:
        return "not reached" if value == float("inf") else f"{value:.{digits}f}"

    return f"{show(median(values))} ({show(min(values))} to {show(max(values))})"
