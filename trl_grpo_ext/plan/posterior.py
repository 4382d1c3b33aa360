"""What is known of each prompt: a decayed mean and variance of its rewards, shrunk towards the pool."""

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .difficulty import as_levels, read_difficulty

logger = logging.getLogger(__name__)


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
        index, count = prompt_index[known], count[known].float()
        mean, variance = mean[known].float(), std[known].float() ** 2
        if index.numel() == 0:
            return
        self.pool *= 0.9
        stratum = torch.zeros_like(index) if self.strata is None else self.strata[index].long()
        self.pool.index_add_(0, stratum, torch.stack([count, count * mean, count * variance], dim=1).double())
        touched, slot = torch.unique(index, return_inverse=True)
        zeros = torch.zeros(touched.numel())
        old = self.decay * self.count[touched]
        new = zeros.index_add(0, slot, count)
        self._mean[touched] = (old * self._mean[touched] + zeros.index_add(0, slot, count * mean)) / (old + new)
        self._variance[touched] = (old * self._variance[touched] + zeros.index_add(0, slot, count * variance)) / (
            old + new
        )
        self.count[touched] = old + new

    def observe(self, batch: RolloutBatch) -> None:
        """Take in a finished batch, the groups that were thrown away included."""
        for part in batch.parts:
            if part.prompt_index is not None:
                self.update(part.prompt_index, *part.group_stats())

    def variance(self, prompt_index: Tensor | None = None) -> Tensor:
        """Posterior variance of the reward of one completion, shape `(P,)`, or `(D,)` for all prompts."""
        return self._posterior(self._variance, 2, prompt_index)

    def mean(self, prompt_index: Tensor | None = None) -> Tensor:
        """Posterior mean reward, shape `(P,)`, or `(D,)` for all prompts."""
        return self._posterior(self._mean, 1, prompt_index)

    def _posterior(self, values: Tensor, moment: int, prompt_index: Tensor | None) -> Tensor:
        weight, total = self.pool[:, 0], self.pool[:, moment]
        # Before anything is known, all prompts are alike: variance 1, mean 0.
        overall = total.sum() / weight.sum() if weight.sum() > 0 else torch.tensor(float(moment == 2))
        pools = ((total + self.prior * overall) / (weight + self.prior)).float()
        index = slice(None) if prompt_index is None else prompt_index
        pool = pools[0] if self.strata is None else pools[self.strata[index]]
        return torch.addcmul(self.prior * pool, self.count[index], values[index]).div_(self.count[index] + self.prior)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self._mean, "variance": self._variance, "pool": self.pool}

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
        }.items():
            if (part < 0).any():
                raise ValueError(f"{key!r} holds negative weights or variances")
        self.count, self._mean = state_dict["count"].clone(), state_dict["mean"].clone()
        self._variance, self.pool = state_dict["variance"].clone(), state_dict["pool"].clone()


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
    if args.difficulty_column is not None and args.difficulty_column in dataset.column_names:
        names = args.difficulty_levels
        strata = as_levels(read_difficulty(dataset, args.difficulty_column, names), names)
    elif args.difficulty_column is not None:
        logger.warning(f"No column {args.difficulty_column!r} in the training dataset: all prompts share one pool")
    return PromptPosterior(len(dataset), decay, prior, strata)
