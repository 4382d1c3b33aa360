"""What is known of each prompt: a decayed mean and variance of its rewards, shrunk towards the pool."""

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .columns import known_names
from .difficulty import as_levels, read_difficulty

logger = logging.getLogger(__name__)

RECENT = 256  # groups whose variances say what is usual
ENOUGH = 16  # as soon as there are so many of them
OUTLIER = 100.0  # a group whose variance is above so many times their median is left out
LARGEST = 1e30  # whatever the rewards are, float32 holds it


class PromptPosterior:
    """
    What is known of each prompt's rewards: a decayed mean and within-group variance, shrunk towards the pool's.

    At each visit the old evidence is multiplied by `decay`, so that the estimate follows the policy. A prompt with
    evidence `c` and observed variance `v` has the posterior variance `(c * v + prior * v_pool) / (c + prior)`; one that
    was never drawn has `v_pool`, the decayed average over the groups seen lately. Prompts of one stratum, such as a
    level of difficulty, share a pool, itself shrunk towards that of all prompts. For 0/1 rewards the variance is
    `p(1 - p)`, the quantity that decides how much a group can teach (arXiv 2602.01601); nothing here assumes 0/1.

    Args:
        num_prompts (`int`):
            Size of the dataset `D`. Memory is 12 bytes a prompt.
        decay (`float`, *optional*, defaults to `0.5`):
            Weight of the old evidence at each visit, in `[0, 1]`.
        prior (`float`, *optional*, defaults to `2.0`):
            Weight of the pool, in completions.
        strata (`torch.Tensor` of shape `(D,)`, *optional*):
            Stratum of each prompt, integers from 0. One pool for all when `None`.

    Example:

    ```python
    >>> import torch
    >>> posterior = PromptPosterior(num_prompts=3)
    >>> posterior.update(torch.tensor([0, 1]), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5]), torch.tensor([4, 4]))
    >>> [round(v, 3) for v in posterior.variance().tolist()]  # always fails, uncertain, unseen
    [0.042, 0.208, 0.125]

    ```
    """

    def __init__(self, num_prompts: int, decay: float = 0.5, prior: float = 2.0, strata: Tensor | None = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} must be between 0 (only the last visit) and 1 (never forget): try 0.5")
        if not prior > 0:
            raise ValueError(f"prior={prior} must be positive, or one flat group would rule a prompt out: try 2.0")
        self.decay = decay
        self.prior = prior
        self.strata = None if strata is None else strata.to(torch.int32)
        self.count = torch.zeros(num_prompts)
        self._mean = torch.zeros(num_prompts)
        self._variance = torch.zeros(num_prompts)
        # Variances of the last groups that had any, which say what an outlier is.
        self.recent = torch.zeros(RECENT, dtype=torch.float64)
        # Pools: sums of weight, mean and variance over the groups of each stratum seen lately.
        self.pool = torch.zeros(1 if strata is None else int(strata.max()) + 1, 3, dtype=torch.float64)

    def update(self, prompt_index: Tensor, mean: Tensor, std: Tensor, count: Tensor) -> None:
        """
        Take in the groups of one batch.

        Args:
            prompt_index (`torch.Tensor` of shape `(P,)`):
                Dataset row of each group. A row that occurs twice is taken in twice.
            mean (`torch.Tensor` of shape `(P,)`):
                Mean reward.
            std (`torch.Tensor` of shape `(P,)`):
                Standard deviation of the rewards.
            count (`torch.Tensor` of shape `(P,)`):
                Number of rewards. Groups with fewer than two tell nothing about the variance and are left out.
        """
        known = (count >= 2) & ~mean.isnan()
        self.learn(prompt_index[known], mean[known], std[known].double().square(), count[known])

    def observe(self, batch: RolloutBatch) -> None:
        """
        Take in a finished batch, the groups that were thrown away included.

        A group of one has no spread of its own: what counts is how far its reward was from what was expected of it.
        """
        for part in batch.parts:
            if part.prompt_index is None:
                continue
            mean, std, count = part.group_stats()
            is_alone = (count == 1) & (part.group_sizes == 1)
            surprise = (mean - self.mean(part.prompt_index)).abs()
            self.learn(part.prompt_index[is_alone], mean[is_alone], surprise[is_alone].square(), count[is_alone])
            self.update(part.prompt_index, mean, std, count)

    def learn(self, index: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Take in finite means and variances `(P,)` of the groups of prompts, with the number of their rewards."""
        if index.numel() == 0:
            return
        seen = variance[variance > 0].clamp(max=LARGEST)
        self.recent = torch.cat([self.recent, seen])[-RECENT:]
        limit = self._limit()
        # One reward far from all others, or a broken one, must not decide what is expected of every prompt.
        if self.pool[:, 2].sum() > limit * self.pool[:, 0].sum():
            self.pool.zero_()
            self.count[self._variance > limit] = 0.0
        is_outlier = variance > limit
        index, mean, variance, count = (x[~is_outlier] for x in (index, mean, variance, count))
        mean = mean.double().clamp(-LARGEST, LARGEST)
        variance = variance.clamp(max=LARGEST)
        if index.numel() == 0:
            return
        self.pool *= 0.9
        stratum = torch.zeros_like(index) if self.strata is None else self.strata[index].long()
        weight = count.double()
        self.pool.index_add_(0, stratum, torch.stack([weight, weight * mean, weight * variance], dim=1))
        touched, slot = torch.unique(index, return_inverse=True)
        zeros = torch.zeros(touched.numel(), dtype=torch.float64)
        old = (self.decay * self.count[touched]).double()
        new = zeros.index_add(0, slot, weight)
        for values, sums in ((self._mean, weight * mean), (self._variance, weight * variance)):
            values[touched] = ((old * values[touched] + zeros.index_add(0, slot, sums)) / (old + new)).float()
        self.count[touched] = (old + new).float()

    def _limit(self) -> float:
        """The largest variance of a group that is believed: many times the usual one."""
        known = self.recent[self.recent > 0]
        return OUTLIER * known.median().item() if known.numel() >= ENOUGH else LARGEST

    def variance(self, prompt_index: Tensor | None = None, expected: Tensor | None = None) -> Tensor:
        """
        Posterior variance of the reward of one completion, shape `(P,)`, or `(D,)` for all prompts.

        `expected`, of the same shape, stands in for the pool where something is known of prompts never drawn.
        """
        return self._posterior(self._variance, 2, prompt_index, expected).clamp(max=self._limit())

    def mean(self, prompt_index: Tensor | None = None, expected: Tensor | None = None) -> Tensor:
        """Posterior mean reward, shape `(P,)`, or `(D,)` for all prompts; `expected` as in [`variance`]."""
        return self._posterior(self._mean, 1, prompt_index, expected)

    def _posterior(self, values: Tensor, moment: int, prompt_index: Tensor | None, expected: Tensor | None) -> Tensor:
        index = slice(None) if prompt_index is None else prompt_index
        pool = self._pools(moment) if expected is None else expected.float()
        if expected is None:
            pool = pool[0] if self.strata is None else pool[self.strata[index]]
        return torch.addcmul(self.prior * pool, self.count[index], values[index]).div_(self.count[index] + self.prior)

    def _pools(self, moment: int) -> Tensor:
        weight, total = self.pool[:, 0], self.pool[:, moment]
        # Before anything is known, all prompts are alike: variance 1, mean 0.
        overall = total.sum() / weight.sum() if weight.sum() > 0 else torch.tensor(float(moment == 2))
        return ((total + self.prior * overall) / (weight + self.prior)).float()

    def state_dict(self) -> dict[str, Any]:
        known = {"count": self.count, "mean": self._mean, "variance": self._variance}
        return {**known, "pool": self.pool, "recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict)
        check_same_dataset(state_dict.get("count"), self.count)
        pool: Any = state_dict.get("pool")
        if isinstance(pool, Tensor) and pool.dim() == 2 and len(pool) != len(self.pool):
            raise ValueError(
                f"The checkpoint knows {len(pool)} levels of difficulty and the dataset has "
                f"{len(self.pool)}: resume with the difficulty_column of the interrupted run"
            )
        check_state(state_dict, **self.state_dict())
        for key, part in {
            "count": state_dict["count"],
            "variance": state_dict["variance"],
            "pool": pool[:, ::2],
            "recent": state_dict["recent"],
        }.items():
            if (part < 0).any():
                raise ValueError(f"{key!r} holds negative weights or variances")
        self.count, self._mean = state_dict["count"].clone(), state_dict["mean"].clone()
        self._variance, self.pool = state_dict["variance"].clone(), state_dict["pool"].clone()
        self.recent = state_dict["recent"].clone()


def check_same_dataset(saved: Any, current: Tensor) -> None:
    """Raise `ValueError` for a state of as many prompts as another dataset has."""
    if isinstance(saved, Tensor) and saved.shape != current.shape:
        raise ValueError(
            f"The checkpoint knows {saved.numel()} prompts and the dataset has {current.numel()}: "
            "resume with the dataset of the interrupted run"
        )


def posterior_of(args: "AdaptiveGRPOConfig", dataset: Dataset, decay: float, prior: float) -> PromptPosterior:
    """A posterior over the prompts of a dataset, in strata by difficulty where it has the configured column."""
    strata = None
    if args.difficulty_column is not None and args.difficulty_column in known_names(dataset):
        names = args.difficulty_levels
        strata = as_levels(read_difficulty(dataset, args.difficulty_column, names), names)
    elif args.difficulty_column is not None:
        logger.warning(f"No column {args.difficulty_column!r} in the training dataset: all prompts share one pool")
    return PromptPosterior(len(dataset), decay, prior, strata)
