"""Curricula: easy prompts first, prompts where learning is possible now, or a difficulty that moves with the reward."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .difficulty import as_levels, as_numbers, check_levels, read_difficulty
from .posterior import posterior_of


def staged_weights(levels: Tensor, num_levels: int, progress: float, smoothing: float = 0.5) -> Tensor:
    """
    Weights of prompts when training moves from the lowest to the highest difficulty level.

    Level `l` is in the middle of its stage at progress `(l + 1/2) / L`; around it, weights fall off as a Gaussian whose
    width is `smoothing` levels. A level's weight is shared by its prompts, so a level with many prompts gets no more.

    Args:
        levels (`torch.Tensor` of shape `(D,)`):
            Level of each prompt, integers in `[0, L)`.
        num_levels (`int`):
            Number of levels `L`.
        progress (`float`):
            Position in training, from 0 to 1.
        smoothing (`float`, *optional*, defaults to `0.5`):
            Width of the transition in levels. 0 switches at once.

    Returns:
        `torch.Tensor` of shape `(D,)`:
            Weights that add up to 1.

    Example:

    ```python
    >>> import torch
    >>> levels = torch.tensor([0, 0, 1, 2])
    >>> [round(w, 2) for w in staged_weights(levels, num_levels=3, progress=0.0, smoothing=0.5).tolist()]
    [0.44, 0.44, 0.12, 0.0]

    ```
    """
    position = min(max(num_levels * progress - 0.5, 0.0), num_levels - 1.0)
    count = torch.bincount(levels, minlength=num_levels)
    # Relative to the nearest level that has prompts, so that the weights do not all vanish.
    distance = (torch.arange(num_levels) - position).abs().masked_fill(count == 0, torch.inf)
    if smoothing > 0:
        weight_of_level = torch.exp(-0.5 * (distance**2 - distance.min() ** 2) / max(smoothing, 1e-6) ** 2)
    else:
        weight_of_level = torch.nn.functional.one_hot(distance.argmin(), num_levels).float()
    weights = (weight_of_level / count.clamp(min=1))[levels]
    return weights / weights.sum()


def move_target(
    target: float, reward: float, goal: float, step_size: float, sensitivity: float, low: float, high: float
) -> float:
    """
    AdaRFT's moving target difficulty, `clip(T + eta * tanh(alpha * (reward - beta)))` (arXiv 2504.05520).

    Args:
        target (`float`):
            Current target `T`, in units of difficulty.
        reward (`float`):
            Mean reward of the batch.
        goal (`float`):
            Reward `beta` at which the target rests.
        step_size (`float`):
            Largest move `eta`, in units of difficulty.
        sensitivity (`float`):
            Slope `alpha`.
        low (`float`):
            Smallest difficulty.
        high (`float`):
            Largest difficulty.

    Returns:
        `float`:
            The next target.

    Example:

    ```python
    >>> move_target(50.0, reward=0.5, goal=0.5, step_size=5.0, sensitivity=2.0, low=0.0, high=100.0)
    50.0
    >>> round(move_target(50.0, reward=1.0, goal=0.5, step_size=5.0, sensitivity=2.0, low=0.0, high=100.0), 2)
    53.81

    ```
    """
    return min(max(target + step_size * math.tanh(sensitivity * (reward - goal)), low), high)


def with_exploration(weights: Tensor, exploration: float) -> Tensor:
    """
    Mix weights with the uniform distribution, so that every prompt keeps a chance.

    Args:
        weights (`torch.Tensor` of shape `(D,)`):
            Non-negative weights.
        exploration (`float`):
            Share of the uniform distribution, in `[0, 1]`.

    Returns:
        `torch.Tensor` of shape `(D,)`:
            Weights that add up to 1.

    Example:

    ```python
    >>> import torch
    >>> with_exploration(torch.tensor([3.0, 0.0]), exploration=0.5).tolist()
    [0.75, 0.25]

    ```
    """
    total = weights.sum().item()
    if not total > 0:
        return torch.full_like(weights, 1 / weights.numel())
    return weights.mul((1 - exploration) / total).add_(exploration / weights.numel())


class Curriculum(GRPOCallback):
    """What the curricula share: the difficulty column, the floor of exploration, the logged position."""

    is_unique = True
    reads_dataset = True
    exploration: float
    difficulty: Tensor = torch.empty(0)  # (D,), where there is a difficulty column

    def _check(self) -> None:
        if not 0 <= self.exploration <= 1:
            raise ValueError(
                f"exploration={self.exploration} must be between 0 (never leave the curriculum) and 1 (no curriculum): "
                "try 0.1"
            )

    def _log_difficulty(self, batch: RolloutBatch) -> None:
        if self.difficulty.numel() > 0:
            drawn = self.difficulty[batch.prompt_index].float()
            batch.metrics["curriculum/difficulty"] = drawn.mean().item()


class StagedCurriculumCallback(Curriculum):
    """
    Easy prompts first, then medium, then hard ones, with a smooth transition and a floor of exploration.

    Logs `curriculum/position` (0 easiest level, 1 hardest) and `curriculum/difficulty`, the mean level of the prompts
    drawn.

    Args:
        column (`str`):
            Dataset column with the difficulty: level names, or numbers, which are cut into levels of equal size.
        levels (`Sequence[str]`, *optional*, defaults to `("easy", "medium", "hard")`):
            Names from easy to hard. Their number is also the number of levels that numbers are cut into.
        smoothing (`float`, *optional*, defaults to `0.5`):
            Width of the transition, in levels. 0 switches at once.
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts drawn from the whole dataset.
    """

    def __init__(
        self,
        column: str | None,
        levels: Sequence[str] = ("easy", "medium", "hard"),
        smoothing: float = 0.5,
        exploration: float = 0.1,
    ):
        self.column = column
        self.levels = list(levels)
        self.smoothing = smoothing
        self.exploration = exploration
        self._check()
        check_levels(self.levels)
        if smoothing < 0:
            raise ValueError(f"smoothing={smoothing} must not be negative: use 0 to switch levels at once")

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        values = read_difficulty(trainer.train_dataset, self.column, self.levels)
        self.difficulty = as_levels(values, self.levels)

    def on_prompt_weights(self, state: TrainerState, weights: Tensor, **kwargs: Any) -> Tensor:
        progress = state.global_step / state.max_steps
        mine = staged_weights(self.difficulty, len(self.levels), progress, self.smoothing)
        return weights * with_exploration(mine, self.exploration)

    def on_rollouts(self, state: TrainerState, batch: RolloutBatch, **kwargs: Any) -> None:
        self._log_difficulty(batch)
        last = len(self.levels) - 1
        position = (state.global_step / state.max_steps * (last + 1) - 0.5) / last
        batch.metrics["curriculum/position"] = min(max(position, 0.0), 1.0)


class OnlineCurriculumCallback(Curriculum):
    """
    Draw the prompts on which learning is possible now: those whose rewards vary.

    Keeps a decayed posterior of the reward variance of each prompt ([`PromptPosterior`]) and draws prompts with
    probability proportional to a power of it. A prompt that always fails or always succeeds is drawn less and less, and
    comes back through the floor of exploration. Logs `curriculum/effective_prompts`, the number of prompts over which
    the draw spreads, `1 / sum(p^2)` for probabilities `p`.

    Args:
        power (`float`, *optional*, defaults to `3.0`):
            Exponent. 0 is uniform; the larger, the sharper.
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts drawn from the whole dataset.
        decay (`float`, *optional*, defaults to `0.5`):
            Weight of the old evidence at each visit of a prompt.
        prior (`float`, *optional*, defaults to `2.0`):
            Weight of the pool's average, in completions.

    With a `difficulty_column` in the configuration, prompts of one level share a pool.
    """

    def __init__(self, power: float = 3.0, exploration: float = 0.1, decay: float = 0.5, prior: float = 2.0):
        if not power >= 0:
            raise ValueError(f"power={power} must not be negative: use 0 to draw all prompts alike")
        self.power = power
        self.exploration = exploration
        self.decay = decay
        self.prior = prior
        self._check()

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.posterior = posterior_of(args, trainer.train_dataset, self.decay, self.prior)
        self._effective = float(len(trainer.train_dataset))

    def on_prompt_weights(self, weights: Tensor, **kwargs: Any) -> Tensor:
        variance = self.posterior.variance()
        # In units of the largest, so that no power of it leaves the range of float32.
        mine = with_exploration(variance.div_(variance.max()).pow_(self.power), self.exploration)
        self._effective = 1 / mine.square().sum().item()
        return mine.mul_(weights)

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self.posterior.observe(batch)
        batch.metrics["curriculum/effective_prompts"] = self._effective

    def state_dict(self) -> dict[str, Any]:
        return self.posterior.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.posterior.load_state_dict(state_dict)


class TargetCurriculumCallback(Curriculum):
    """
    AdaRFT (arXiv 2504.05520): draw prompts near a target difficulty that rises while the reward is above a goal.

    The source takes the prompts nearest to the target, which repeats the same ones; here they are drawn with weights
    that fall off as a Gaussian around the target, with a floor of exploration. Difficulties are scaled to 0..1. Logs
    `curriculum/position` (the target) and `curriculum/difficulty` (mean of the prompts drawn).

    Args:
        column (`str`):
            Dataset column with the difficulty: numbers, or level names.
        levels (`Sequence[str]`, *optional*, defaults to `("easy", "medium", "hard")`):
            Names from easy to hard.
        goal (`float`, *optional*, defaults to `0.5`):
            Mean reward at which the target rests, in units of the reward.
        step_size (`float`, *optional*, defaults to `0.05`):
            Largest move per generation batch, as a share of the range of difficulty.
        sensitivity (`float`, *optional*, defaults to `2.0`):
            How fast the move saturates with the distance from the goal.
        width (`float`, *optional*, defaults to `0.15`):
            Width of the weights around the target, as a share of the range of difficulty.
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts drawn from the whole dataset.
    """

    def __init__(
        self,
        column: str | None,
        levels: Sequence[str] = ("easy", "medium", "hard"),
        goal: float = 0.5,
        step_size: float = 0.05,
        sensitivity: float = 2.0,
        width: float = 0.15,
        exploration: float = 0.1,
    ):
        self.column = column
        self.levels = list(levels)
        self.goal = goal
        self.step_size = step_size
        self.sensitivity = sensitivity
        self.width = width
        self.exploration = exploration
        self._check()
        check_levels(self.levels)
        if width <= 0:
            raise ValueError(f"width={width} must be positive: try 0.15")

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        values = read_difficulty(trainer.train_dataset, self.column, self.levels)
        numbers = as_numbers(values, self.levels)
        spread = (numbers.max() - numbers.min()).item()
        self.difficulty = ((numbers - numbers.min()) / spread).float()
        self.target = 0.0

    def on_prompt_weights(self, weights: Tensor, **kwargs: Any) -> Tensor:
        mine = torch.exp(-0.5 * ((self.difficulty - self.target) / self.width) ** 2)
        return weights * with_exploration(mine, self.exploration)

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self._log_difficulty(batch)
        # Of all that was sampled: groups that are replaced are the ones that pull the mean to an end.
        reward = torch.cat([part.rewards for part in batch.parts]).nanmean().item()
        if not math.isnan(reward):
            self.target = move_target(
                self.target, reward, self.goal, self.step_size, self.sensitivity, low=0.0, high=1.0
            )
        batch.metrics["curriculum/position"] = self.target

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, target=float)
        if not 0 <= state_dict["target"] <= 1:
            raise ValueError(f"'target' is {state_dict['target']}: not between 0 and 1")
        self.target = state_dict["target"]
