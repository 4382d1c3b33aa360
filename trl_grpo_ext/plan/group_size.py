"""Adaptive group size: spend a fixed number of completions where the outcome is uncertain."""

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .posterior import check_same_dataset, posterior_of
from .predicted import PredictedCurriculumCallback
from .sizes import fit_group_sizes

logger = logging.getLogger(__name__)


class SingleGroupSizeCallback(GRPOCallback):
    """
    One completion for each prompt, so that a batch holds as many prompts as rows.

    Nothing is left to compare a completion with in its group: set `baseline` to `"batch"` or `"predicted"`. Where the
    dataset has fewer prompts than the batch has rows, some prompts get more.
    """

    is_unique = True

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        return (
            Conflict(
                "on_group_sizes", "group_size='single' and {other} both choose group sizes: leave one of them out"
            ),
            Conflict(
                "on_resample",
                "{other} replaces groups without spread, and with group_size='single' no group has any: leave it out, "
                "and use curriculum='predicted' to avoid hopeless prompts",
            ),
        )

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        if not any(callback.overrides("on_advantages") for callback in trainer.grpo_callbacks):
            raise ValueError(
                "group_size='single' leaves each completion alone in its group, and no callback gives it another "
                "baseline: set baseline='batch' or 'predicted'"
            )

    def on_group_sizes(self, num_rows: int, prompt_index: Tensor, **kwargs: Any) -> Tensor:
        return torch.ones(min(num_rows, prompt_index.numel()))


class ThresholdGroupSizeCallback(GRPOCallback):
    """
    One more completion at the next visit of a prompt whose reward varies, one fewer for one whose reward does not.

    Each prompt starts at `num_generations`. After a visit its size grows by one if the standard deviation of its
    rewards exceeds `std_threshold`, and shrinks by one otherwise, within `min_group_size` and `max_group_size`. The
    number of rows stays fixed: when groups shrink, a batch holds more prompts.

    Args:
        std_threshold (`float`, *optional*, defaults to `0.1`):
            Threshold in units of the reward.
    """

    is_unique = True
    reads_dataset = True
    sizes: Tensor

    def __init__(self, std_threshold: float = 0.1):
        self.std_threshold = std_threshold

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.bounds = args.group_size_bounds
        self.sizes = torch.full((len(trainer.train_dataset),), args.num_generations, dtype=torch.int16)

    def on_group_sizes(self, prompt_index: Tensor, **kwargs: Any) -> Tensor:
        return self.sizes[prompt_index].float()

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        for part in batch.parts:
            _, std, count = part.group_stats()
            # A group with fewer than two rewards tells nothing.
            step = torch.where(std > self.std_threshold, 1, -1).masked_fill(count < 2, 0)
            self.sizes[part.prompt_index] = (self.sizes[part.prompt_index] + step).clamp(*self.bounds).short()

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict)
        check_same_dataset(state_dict.get("sizes"), self.sizes)
        check_state(state_dict, sizes=self.sizes)
        self.sizes = state_dict["sizes"].clone()


class VarianceGroupSizeCallback(GRPOCallback):
    """
    Larger groups for prompts with an uncertain outcome, smaller ones for the rest, from a decayed posterior.

    The sizes of a batch are fixed before anything is sampled, so they do not depend on its rewards. Sizes are
    proportional to the posterior variance within `min_group_size` and `max_group_size`. The batch holds as many prompts
    as with a fixed size. With a `difficulty_column` in the configuration, prompts of one level share a pool, so sizes
    differ between levels before a prompt is seen again. With [`PredictedCurriculumCallback`] in the run, its guess
    stands in for the pool, so sizes differ between prompts that were never drawn.

    Args:
        decay (`float`, *optional*, defaults to `0.5`):
            Weight of the old evidence at each visit of a prompt.
        prior (`float`, *optional*, defaults to `2.0`):
            Weight of the pool's average, in completions.
    """

    is_unique = True
    reads_dataset = True

    def __init__(self, decay: float = 0.5, prior: float = 2.0):
        self.decay = decay
        self.prior = prior

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        args.check_variance_sizes()
        self.posterior = posterior_of(args, trainer.train_dataset, self.decay, self.prior)
        guessing = (other for other in trainer.grpo_callbacks if isinstance(other, PredictedCurriculumCallback))
        self.guess = next(guessing, None)

    def on_group_sizes(self, args: AdaptiveGRPOConfig, prompt_index: Tensor, num_rows: int, **kwargs: Any) -> Tensor:
        prompts = prompt_index[: num_rows // args.num_generations]
        expected = None if self.guess is None else self.guess.expected_variance(prompts)
        return fit_group_sizes(self.posterior.variance(prompts, expected), num_rows, *args.group_size_bounds)

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self.posterior.observe(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.posterior.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.posterior.load_state_dict(state_dict)
