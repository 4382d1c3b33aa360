"""The hook protocol: [`GRPOCallback`], and the record that travels through it, [`RolloutBatch`]."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..plan.sampler import RolloutPlan
from ..rollouts.answers import RolloutRow

if TYPE_CHECKING:
    from ..config import AdaptiveGRPOConfig
    from ..trainer.adaptive import AdaptiveGRPOTrainer

logger = logging.getLogger(__name__)


@dataclass
class RolloutBatch:
    """
    One generation batch: what was sampled, how it scored, what it is worth.

    A row is one answer of the model. Where a rollout has several turns, each of them is a row, also when several lie
    in one sequence of the loss.

    All tensors are on the CPU and cover **all** processes, in rank order, so a callback that keeps state keeps the
    same state on every rank. Only `rows` and `tokens` are this process's own. Axis suffixes: `N` rows (completions),
    `P` groups (prompts), `K` reward functions.

    Args:
        step (`int`):
            Optimizer step at which the batch was sampled.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row.
        group_sizes (`torch.Tensor` of shape `(P,)`):
            Number of rows of each group.
        prompt_index (`torch.Tensor` of shape `(P,)`, *optional*):
            Row of the training dataset behind each group. `None` when TRL's own sampler chose the prompts, which is so
            as long as no callback asks for prompts, group sizes or resampling.
        rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            Reward of each function after the `on_rewards` hooks, NaN where it does not apply.
        raw_rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            The same as the functions returned it.
        reward_names (`list[str]`):
            Names of the `K` reward functions.
        rewards (`torch.Tensor` of shape `(N,)`):
            Weighted total; there from `on_total_rewards` on.
        advantages (`torch.Tensor` of shape `(N,)` or `(N, T)`):
            Advantages, per row or per token of it; there from `on_advantages` on.
        completion_lengths (`torch.Tensor` of shape `(N,)`):
            Tokens that the model generated and that are trained on, so 0 where `mask_truncated_completions` masks a
            row; there from `on_advantages` on.
        rows (`list[dict]`):
            This process's dataset rows, one per completion.
        tokens (`dict[str, torch.Tensor]`):
            This process's sequences, on its device: `prompt_ids` and `prompt_mask` of shape `(B, L)`, padded on the
            left, `completion_ids` and `completion_mask` of shape `(B, C)`, padded on the right. One per completion,
            unless a rollout puts several turns into one. There from `on_advantages` on; read only.
        turns (`torch.Tensor` of shape `(N,)`):
            Turn of the conversation, or level of the tree, from 0.
        parents (`torch.Tensor` of shape `(N,)`):
            Row that each one carries on from, smaller than its own; -1 where a conversation begins.
        is_shaped (`bool`):
            Whether a hook changed the rewards.
        discarded ([`RolloutBatch`], *optional*):
            Groups that were sampled and then replaced (dynamic sampling). They are scored but never trained on.
        metrics (`dict[str, float]`):
            What a callback puts here is logged with the training metrics. Setting a key again overwrites it.
    """

    step: int
    group_ids: Tensor
    group_sizes: Tensor
    prompt_index: Tensor | None
    rewards_per_func: Tensor
    raw_rewards_per_func: Tensor
    reward_names: list[str]
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    completion_lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    turns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    parents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    is_shaped: bool = False
    discarded: "RolloutBatch | None" = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        return self.group_sizes.numel()

    def select(self, groups: Tensor) -> "RolloutBatch":
        """The groups that are `True` in `groups`, shape `(P,)`, renumbered; without `rows` and `metrics`."""
        rows = groups[self.group_ids]
        new_id = groups.long().cumsum(0) - 1
        return RolloutBatch(
            step=self.step,
            group_ids=new_id[self.group_ids[rows]],
            group_sizes=self.group_sizes[groups],
            prompt_index=None if self.prompt_index is None else self.prompt_index[groups],
            rewards_per_func=self.rewards_per_func[rows],
            raw_rewards_per_func=self.raw_rewards_per_func[rows],
            reward_names=self.reward_names,
            rewards=self.rewards[rows],
        )

    def append(self, other: "RolloutBatch") -> None:
        """Add the groups of another batch behind those of this one."""
        self.group_ids = torch.cat([self.group_ids, other.group_ids + self.num_groups])
        for name in ("group_sizes", "prompt_index", "rewards_per_func", "raw_rewards_per_func", "rewards"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


def check_shape(callback: "GRPOCallback", hook: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise `ValueError` when a hook returns a tensor of none of the shapes that can replace what was there."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in {tuple(shape) for shape in shapes}:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{type(callback).__name__}.{hook} returned {got}: return a tensor of shape {wanted}, or None")


def check_finite(batch: RolloutBatch) -> None:
    """Raise `ValueError`, on every rank, where an infinite reward would make every weight NaN."""
    if batch.rewards.isinf().any():
        counts = batch.rewards_per_func.isinf().sum(0).tolist()
        of = ", ".join(
            f"{name!r} in {count} rows" for name, count in zip(batch.reward_names, counts, strict=True) if count
        )
        raise ValueError(
            f"Rewards of step {batch.step} are infinite ({of or 'the total'}): return None where a reward does not "
            'apply, set reward_clip_range, or leave such rows out with as_reward(func).on_error("skip")'
        )


def check_advantages(callback: "GRPOCallback", batch: RolloutBatch) -> None:
    """Raise `ValueError`, on every rank, where a callback made an advantage that would make every weight NaN."""
    bad = ~batch.advantages.isfinite()
    if bad.dim() == 2:  # what lies beyond the end of a completion is not used
        bad = bad & (torch.arange(bad.size(1)) < batch.completion_lengths[:, None])
        bad = bad.any(1)
    if bad.any():
        raise ValueError(
            f"{type(callback).__name__}.on_advantages made the advantages of {int(bad.sum())} of {len(bad)} "
            "completions NaN or infinite: return 0 where a completion has no reward (batch.rewards is NaN there), such "
            "as with nan_to_num()"
        )


class GRPOCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] with hooks into the life of a generation batch.

    Every hook is optional. A hook that returns a tensor replaces the value for those after it; `None` keeps it. Hooks
    run in the order of the callbacks, on every process, with the same global tensors: decide from those (never from
    one process's own rows) and all ranks agree without talking. `args`, `state` and `control` are what every
    transformers callback gets.

    Example: train only on completions that end in time.

    ```python
    >>> import torch
    >>> from trl_grpo_ext import GRPOCallback


    >>> class IgnoreLong(GRPOCallback):
    ...     def on_advantages(self, args, state, control, batch, **kwargs):
    ...         too_long = batch.completion_lengths >= args.max_completion_length
    ...         batch.metrics["too_long"] = too_long.float().mean().item()
    ...         return batch.advantages.masked_fill(too_long, 0.0)

    ```
    """

    is_attached = False  # set by AdaptiveGRPOTrainer
    plans_single_rows = False  # whether on_plan gets a candidate for each row, not for each group of `num_generations`

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.is_attached:
            logger.warning(
                f"{type(self).__name__} is a GRPOCallback, and this trainer does not call its hooks: use "
                "AdaptiveGRPOTrainer"
            )

    def on_setup(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        trainer: "AdaptiveGRPOTrainer",
        **kwargs: Any,
    ) -> None:
        """Called once, when the trainer is complete: check the dataset and options here, and raise `ValueError`."""

    def on_prompt_weights(
        self, args: "AdaptiveGRPOConfig", state: TrainerState, control: TrainerControl, weights: Tensor, **kwargs: Any
    ) -> Tensor | None:
        """
        Which prompts: return weights of shape `(D,)`, one per row of the dataset, float32, on the CPU.

        Prompts are drawn without replacement with probabilities proportional to the weights. Without any such hook,
        the dataset is walked in shuffled epochs.
        """

    def on_group_sizes(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        prompt_index: Tensor,
        num_rows: int,
        *,
        sizes: Tensor,
        **kwargs: Any,
    ) -> Tensor | None:
        """
        How many completions each: return the wished size of each candidate prompt, shape `(C,)` or shorter.

        `prompt_index` holds the candidates in the order of their draw, `sizes` what the callback before returned (at
        first `num_generations` for each of as many as fill the rows). The trainer takes as many as fill `num_rows`
        and rescales the wishes so that they add up to it within `min_group_size` and `max_group_size`. Return a shorter
        tensor to use only the first candidates.
        """

    def on_plan(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        prompt_index: Tensor,
        num_rows: int,
        num_processes: int,
        **kwargs: Any,
    ) -> RolloutPlan | None:
        """
        Lay out the rows of a generation batch in place of the trainer: return a plan.

        `prompt_index` holds candidates in the order of their draw, shape `(C,)`. The plan's groups add up to `num_rows`
        and use some of the candidates; the others come first next time. Process `r` of `num_processes` gets the `r`-th
        part of the rows.
        """

    def on_generate(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        rows: list[dict[str, Any]],
        **kwargs: Any,
    ) -> list[RolloutRow] | None:
        """
        Generate in place of TRL: return one [`RolloutRow`] for each of this process's dataset `rows`.

        Called in evaluation too. Every process must make the same number of generation calls with as many rows each.
        """

    def on_rewards(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        **kwargs: Any,
    ) -> Tensor | None:
        """Shape the rewards of each function: return `(N, K)`. May run several times on one batch (resampling)."""

    def on_total_rewards(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        **kwargs: Any,
    ) -> Tensor | None:
        """Shape the total reward: return `(N,)`. May run several times on one batch (resampling)."""

    def on_resample(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        round: int,
        **kwargs: Any,
    ) -> Tensor | None:
        """Which groups to throw away and replace by fresh prompts: return a boolean `(P,)`. `round` counts from 0."""

    def on_advantages(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        **kwargs: Any,
    ) -> Tensor | None:
        """
        Change the advantages: return `(N,)`, or `(N, T)` for one per token, with `T = batch.completion_lengths.max()`.

        Position `t` is the `t`-th token that the model wrote in the row; what lies beyond its length is not used.
        """

    def on_rollouts(
        self,
        args: "AdaptiveGRPOConfig",
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        **kwargs: Any,
    ) -> None:
        """Look at the finished batch: keep statistics, log."""

    def state_dict(self) -> dict[str, Any]:
        """What to put into a checkpoint: tensors, numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what [`state_dict`] gave."""

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether this class defines the hook."""
        return getattr(cls, hook) is not getattr(GRPOCallback, hook)
