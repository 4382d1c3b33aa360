"""What a reward is compared with: pure functions, and the callback behind the option `baseline`.

A baseline never reads the completion that it belongs to, so it leaves the expected gradient of the policy as it is
(Williams 1992). Three things do change the expected gradient, and are said where they stand: TRL's group mean, which
contains the completion itself; a pass over a batch that the policy has already been moved by; and dividing by a
standard deviation of the same batch.
"""

from typing import Any

import torch
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..hooks.segments import group_mean_std
from ..host.state import check_state
from ..plan.outliers import UsualRange
from ..plan.predictor import RidgePredictor, explained_variance
from .groups import EPS

MEMORY = 0.9  # weight of the past in running statistics, at each batch


def mean_of_others(values: Tensor, group_ids: Tensor, num_groups: int, weights: Tensor | None = None) -> Tensor:
    """
    Mean of the other finite values of the group, for each of them.

    Args:
        values (`torch.Tensor` of shape `(N,)`):
            Values, NaN where there is none.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each.
        num_groups (`int`):
            Number of groups `P`.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each value, such as the tokens of a completion.

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Means in float64, NaN where there is no other value.

    Example:

    ```python
    >>> import torch
    >>> mean_of_others(torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1]), num_groups=2).tolist()
    [1.5, 1.0, 0.5, nan]

    ```
    """
    valid = values.isfinite()
    weight = torch.where(
        valid, torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double(), 0
    )
    weighted = weight * torch.where(valid, values.double(), 0)
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    total, mass = zeros.index_add(0, group_ids, weighted), zeros.index_add(0, group_ids, weight)
    left = mass[group_ids] - weight
    means = (total[group_ids] - weighted) / left
    return means.masked_fill(left <= 1e-9 * mass[group_ids], torch.nan)


def std_of(values: Tensor) -> float:
    """
    Standard deviation of the finite values; 0 where there are fewer than two.

    Example:

    ```python
    >>> import torch
    >>> round(std_of(torch.tensor([0.0, 2.0, torch.nan])), 3)
    1.414

    ```
    """
    return group_mean_std(values, torch.zeros(len(values), dtype=torch.long), 1)[1].item()


def std_of_others(values: Tensor) -> Tensor:
    """
    Standard deviation of the other finite values, for each of them; 0 where there are fewer than two others.

    Example:

    ```python
    >>> import torch
    >>> [round(s, 3) for s in std_of_others(torch.tensor([0.0, 1.0, 3.0])).tolist()]
    [1.414, 2.121, 0.707]

    ```
    """
    return std_of_others_of(values, torch.zeros(len(values), dtype=torch.long), 1).nan_to_num(nan=0.0)


def std_of_others_of(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """
    Standard deviation of the other finite values of the group, for each of them; NaN where fewer than two are left.

    Example:

    ```python
    >>> import torch
    >>> spreads = std_of_others_of(torch.tensor([0.0, 1.0, 3.0, 9.0]), torch.tensor([0, 0, 0, 1]), num_groups=2)
    >>> [round(s, 3) for s in spreads.tolist()]
    [1.414, 2.121, 0.707, nan]

    ```
    """
    mean, _, count = group_mean_std(values, groups, num_groups)
    known = values.isfinite()
    x = torch.where(known, values.double() - mean[groups], 0.0)
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    others = count[groups] - known.double()
    total, squares = (zeros.index_add(0, groups, part)[groups] - part for part in (x, x.square()))
    variance = (squares - total.square() / others.clamp(min=1)) / (others - 1).clamp(min=1)
    return variance.clamp(min=0).sqrt().masked_fill(others < 2, torch.nan)


def largest_of_others_of(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """
    Largest of the other finite values of the group, for each of them; infinite where none is left.

    Example:

    ```python
    >>> import torch
    >>> largest_of_others_of(torch.tensor([0.0, 2.0, 1.0, 9.0]), torch.tensor([0, 0, 0, 1]), num_groups=2).tolist()
    [2.0, 1.0, 2.0, inf]

    ```
    """
    known = torch.where(values.isfinite(), values.double(), -torch.inf)
    empty = torch.full((num_groups,), -torch.inf, dtype=torch.float64)
    first = empty.scatter_reduce(0, groups, known, "amax")
    is_first = known == first[groups]
    second = empty.scatter_reduce(0, groups, known.masked_fill(is_first, -torch.inf), "amax")
    is_shared = torch.zeros(num_groups).index_add(0, groups, is_first.float()) > 1
    largest = torch.where(is_first & ~is_shared[groups], second[groups], first[groups])
    return largest.masked_fill(largest == -torch.inf, torch.inf)


def shrunk_baseline(
    rewards: Tensor, guess: Tensor, group_ids: Tensor, num_groups: int, within: float, between: float
) -> Tensor:
    """
    A guess for the prompt, corrected by the other completions of the group (James and Stein 1961, one level deep).

    `b_i = V_i + w (mean of the others' R - V_i)` with `w = between / (between + within / n)` for `n` other completions.
    Where the guess is exact, `between` is 0 and the others are not needed; where it is useless, `between` is large and
    `b_i` is the mean of the others. A group of one keeps the guess.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards, NaN where there is none.
        guess (`torch.Tensor` of shape `(N,)`):
            Guess `V` for the prompt of each completion.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each completion.
        num_groups (`int`):
            Number of groups `P`.
        within (`float`):
            Variance of rewards around the mean of their prompt.
        between (`float`):
            Variance of prompts' means around the guess.

    Returns:
        `torch.Tensor` of shape `(N,)`: baselines, in float64.

    Example:

    ```python
    >>> import torch
    >>> rewards, guess, ids = torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([0, 0])
    >>> shrunk_baseline(rewards, guess, ids, num_groups=1, within=1.0, between=1.0).tolist()
    [1.5, 0.5]

    ```
    """
    # And not the mean of what others missed: their guesses may have read the reward of this completion.
    others = mean_of_others(rewards, group_ids, num_groups) - guess.double()
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    count = zeros.index_add(0, group_ids, rewards.isfinite().double())[group_ids] - rewards.isfinite().double()
    noise = within / count.clamp(min=1)
    weight = between / (between + noise).clamp(min=1e-30)
    return guess.double() + torch.where(others.isnan(), 0.0, weight * others)


def errors_of_guess(rewards: Tensor, guess: Tensor, group_ids: Tensor, num_groups: int) -> tuple[float, float] | None:
    """
    `within` and `between` of [`shrunk_baseline`], from one batch: by the moments of an analysis of variance.

    Returns `None` for a batch without a group of two rewards.

    Example:

    ```python
    >>> import torch
    >>> rewards, ids = torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 1])
    >>> [round(error, 6) for error in errors_of_guess(rewards, torch.full((4,), 3.0), ids, num_groups=2)]
    [2.0, 3.0]

    ```
    """
    mean, std, count = group_mean_std(rewards.double() - guess.double(), group_ids, num_groups)
    several = count >= 2
    if not several.any():
        return None
    freedom = (count - 1).clamp(min=0)
    within = (std.square() * freedom).sum() / freedom.sum()
    known = count >= 1
    between = (mean[known].square() - within / count[known]).mean().clamp(min=0)
    return within.item(), between.item()


def scaled_advantages(rewards: Tensor, baseline: Tensor, scale_rewards: str, weights: Tensor | None = None) -> Tensor:
    """
    Reward minus baseline, in units of the standard deviation of that difference over the batch, or unscaled.

    The difference is not centred again: that would take a shift of the baseline out.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards, NaN where there is none.
        baseline (`torch.Tensor` of shape `(N,)`):
            Baselines, NaN where there is none.
        scale_rewards (`str`):
            `"batch"` or `"none"`.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each completion in the standard deviation, such as its tokens.

    Returns:
        `torch.Tensor` of shape `(N,)`: advantages in the dtype of `rewards`, 0 without reward or baseline.

    Example:

    ```python
    >>> import torch
    >>> scaled_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25]), "none").tolist()
    [0.75, -0.25]

    ```
    """
    advantages = rewards.double() - baseline.double()
    known = advantages.isfinite()
    if scale_rewards == "batch" and known.any():
        weight = torch.ones_like(advantages) if weights is None else weights.double()
        weight = torch.where(known, weight, 0.0)
        filled = torch.where(known, advantages, 0.0)
        mean = (weight * filled).sum() / weight.sum().clamp(min=1e-12)
        variance = (weight * (filled - mean).square()).sum() / weight.sum().clamp(min=1e-12)
        advantages = advantages / (variance.sqrt() + EPS)
    return torch.where(known, advantages, 0.0).to(rewards.dtype)


class BaselineCallback(GRPOCallback):
    """
    Compare each reward with another baseline than the mean of its group.

    With `V(x)` the guess for a prompt from earlier batches, `m` the mean of the other rewards of the batch, `g` that of
    the others of the group and `s` a running standard deviation of the rewards, the baseline is

    - `"leave_one_out"`: `g - shift * s` (RLOO, arXiv 2402.14740),
    - `"batch"`: `m - shift * s` (REINFORCE++, arXiv 2501.03262),
    - `"predicted"`: `min(V(x), m - shift * s)`,
    - `"shrunk"`: `"predicted"`, corrected by the others of the group as far as the guess was wrong in earlier batches.

    A baseline below what a prompt earns pushes successes up and failures hardly down (AsymRE, arXiv 2506.20520). Where
    all others of the batch have the lowest reward of the run, nothing lies below, and the baseline is that reward. The
    guess is a [`RidgePredictor`] on the policy's hidden state at the end of the prompt, `batch.prompt_features`. It
    learns from a batch only after it has guessed for it. Logs `baseline/mean`, `baseline/reward_std`,
    `baseline/residual_std` (of what the baseline leaves) and, with a guess, `baseline/explained_variance`: the share of
    the variance of prompts' rewards that the guess foresaw (1: all, 0: no more than the mean, below 0: worse).

    Args:
        baseline (`str`, *optional*, defaults to `"batch"`):
            One of the above.
        shift (`float`, *optional*, defaults to `0.0`):
            How far below, in running standard deviations of the rewards.
        forget (`float`, *optional*, defaults to `0.9`):
            Weight of the past at each batch, in the guess and in the running statistics.
        by_tokens (`bool`, *optional*, defaults to `False`):
            Whether `m` and the standard deviation that advantages are divided by weight each completion by its tokens,
            as a token-mean loss weights it in the gradient. `s` and `g` stay unweighted.
    """

    is_unique = True
    KINDS = ("leave_one_out", "batch", "predicted", "shrunk")

    def __init__(self, baseline: str = "batch", shift: float = 0.0, forget: float = MEMORY, *, by_tokens: bool = False):
        if baseline not in self.KINDS:
            raise ValueError(f"baseline={baseline!r} is unknown: use one of {', '.join(map(repr, self.KINDS))}")
        self.baseline, self.shift, self.forget, self.by_tokens = baseline, shift, forget, by_tokens

    @property
    def reads_prompt_features(self) -> bool:
        return self.baseline in ("predicted", "shrunk")

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        name = f"baseline={self.baseline!r}"
        return (
            Conflict("on_generate", f"{name} and {{other}} both turn rewards into advantages: leave one of them out"),
            Conflict("CriticBaseline", f"{name} and CriticBaseline are two baselines: leave one of them out"),
            Conflict(
                "normalize_then_sum",
                f"{name} compares total rewards, and multi_objective_aggregation='normalize_then_sum' has none: use "
                "'sum_then_normalize', or baseline='group'",
            ),
        )

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.predictor: RidgePredictor | None = None  # as wide as the features, which the first batch shows
        self.moments: dict[str, float] = {}  # running: std, within, between
        self.usual = UsualRange()

    def on_advantages(self, args: AdaptiveGRPOConfig, batch: RolloutBatch, **kwargs: Any) -> Tensor:
        rewards, everywhere = batch.rewards, torch.zeros_like(batch.group_ids)
        # What is remembered for later batches; this batch's own advantages are those of the rewards as they are.
        lowest = self.usual.lowest()  # of earlier batches, so that no baseline reads its own completion
        believed = self.usual.believed(rewards)
        if self.usual.is_spoilt():
            self.moments = {}
        weights = batch.completion_lengths if self.by_tokens else None
        others = mean_of_others(rewards, everywhere, 1, weights)
        # The first batch has no past, so each completion takes the others of its own batch.
        std = self.moments.get("std", std_of_others(rewards))
        low = others - self.shift * std
        if self.baseline == "leave_one_out":
            baseline = mean_of_others(rewards, batch.group_ids, batch.num_groups) - self.shift * std
        elif self.baseline == "batch":
            baseline = low
        else:
            usual_std = self.moments.get("std", std_of_others(believed))
            usual = mean_of_others(believed, everywhere, 1, weights) - self.shift * usual_std
            baseline = self._guessed(batch, low, believed, usual)
        # Else a batch that failed as a whole would be pushed up.
        has_failed = largest_of_others_of(rewards, everywhere, 1) <= lowest
        baseline = torch.where(has_failed, torch.maximum(baseline, others), baseline)
        self._remember("std", std_of(believed))
        batch.metrics["baseline/mean"] = baseline.nanmean().item()
        batch.metrics["baseline/reward_std"] = self.moments.get("std", 0.0)
        batch.metrics["baseline/residual_std"] = std_of(rewards.double() - baseline)
        return scaled_advantages(rewards, baseline, args.scale_rewards, weights)

    def _guessed(self, batch: RolloutBatch, low: Tensor, believed: Tensor, usual: Tensor) -> Tensor:
        features = batch.prompt_features
        if self.predictor is None:
            self.predictor = RidgePredictor(features.size(1), self.forget)
        guess = self.predictor.predict(features).double()
        place = (batch.group_ids, batch.num_groups)
        mean, _, _ = group_mean_std(believed, *place)
        explained = explained_variance(guess, mean)
        if explained is not None:
            batch.metrics["baseline/explained_variance"] = explained
        self.predictor.learn(features, mean)
        # fmin: as long as nothing is known of prompts, the batch alone decides.
        floored = torch.fmin(guess[batch.group_ids], low)
        if self.baseline == "predicted":
            return floored
        baseline = shrunk_baseline(
            batch.rewards, floored, *place, self.moments.get("within", 1.0), self.moments.get("between", 1.0)
        )
        errors = errors_of_guess(believed, torch.fmin(guess[batch.group_ids], usual), *place)
        if errors is not None:
            self._remember("within", errors[0])
            self._remember("between", errors[1])
        return baseline

    def _remember(self, name: str, value: float) -> None:
        before = self.moments.get(name, value)
        self.moments[name] = self.forget * before + (1 - self.forget) * value

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"moments": dict(self.moments), "usual": self.usual.state_dict()}
        if self.predictor is not None:
            state["predictor"] = self.predictor.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, moments=dict, usual=dict)
        names = {"std", "within", "between"} & set(state_dict["moments"])
        check_state(state_dict["moments"], **dict.fromkeys(names, float))
        self.moments = {name: float(state_dict["moments"][name]) for name in names}
        self.usual.load_state_dict(state_dict["usual"])
        if "predictor" in state_dict:
            check_state(state_dict, predictor=dict)
            self.predictor = RidgePredictor.from_state(state_dict["predictor"], self.forget)
