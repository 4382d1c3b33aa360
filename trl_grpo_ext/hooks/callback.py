"""[`GRPOCallback`]: the hooks into the life of a generation batch."""

import logging
from typing import Any, ClassVar, TypeAlias

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import AdaptiveGRPOConfig
from .conflicts import Conflict
from .ground import HookedTrainer
from .records import RolloutBatch, RolloutPlan, RolloutSequence

logger = logging.getLogger(__name__)

Args: TypeAlias = AdaptiveGRPOConfig


class GRPOCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] with hooks into the life of a generation batch.

    Every hook is optional, and is called with keyword arguments: an override names those that it reads, and ends in
    `**kwargs`. `args`, `state` and `control` are what every transformers callback gets. A hook that returns a tensor
    replaces the value for the hooks after it; `None` keeps it.

    Hooks run in the order of the callbacks, on every process, with the same global tensors. Decide from those tensors,
    and never from one process's own rows: then all ranks agree without talking.

    Set what changes during a run in `on_setup`, which runs once for each trainer, and not in `__init__`.

    Example: train only on completions that end in time.

    ```python
    >>> import torch
    >>> from trl_grpo_ext import GRPOCallback


    >>> class IgnoreLong(GRPOCallback):
    ...     def on_advantages(self, args, batch, **kwargs):
    ...         too_long = batch.completion_lengths >= args.max_completion_length
    ...         batch.metrics["too_long"] = too_long.float().mean().item()
    ...         return batch.advantages.masked_fill(too_long, 0.0)

    ```
    """

    is_attached = False  # set by AdaptiveGRPOTrainer
    plans_single_rows = False  # whether on_plan gets a candidate for each row, not for each group of `num_generations`
    is_unique: ClassVar[bool] = False  # whether a trainer takes only one callback of this class
    reads_dataset: ClassVar[bool] = False  # whether on_setup runs again when trainer.train_dataset is replaced
    task_column: str | None = None  # dataset column that batch.tasks is made of, for a callback that reads them

    @property
    def reads_prompt_features(self) -> bool:
        """Whether this callback reads `batch.prompt_features`, which cost a forward pass over the prompts."""
        return False

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """What this callback cannot be combined with, each with the reason and the remedy."""
        return _conflicts_of_generating(type(self).__name__) if self.overrides("on_generate") else ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.is_attached:
            logger.warning(
                f"{type(self).__name__} is a GRPOCallback, and this trainer does not call its hooks: use "
                "AdaptiveGRPOTrainer"
            )

    def on_setup(
        self, *, args: Args, state: TrainerState, control: TrainerControl, trainer: HookedTrainer, **kwargs: Any
    ) -> None:
        """Called once, when the trainer is complete: check the dataset and options here, and raise `ValueError`."""

    def on_prompt_weights(
        self, *, args: Args, state: TrainerState, control: TrainerControl, weights: Tensor, **kwargs: Any
    ) -> Tensor | None:
        """
        Which prompts: return weights of shape `(D,)`, one for each prompt of the dataset, float32, on the CPU.

        Prompts are drawn without replacement with probabilities proportional to the weights. Where every callback
        returns `None`, the dataset is walked in shuffled epochs.
        """

    def on_group_sizes(
        self,
        *,
        args: Args,
        state: TrainerState,
        control: TrainerControl,
        prompt_index: Tensor,
        num_rows: int,
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
        *,
        args: Args,
        state: TrainerState,
        control: TrainerControl,
        prompt_index: Tensor,
        num_rows: int,
        num_processes: int,
        sizes: Tensor | None,
        **kwargs: Any,
    ) -> RolloutPlan | None:
        """
        Lay out the rows of a generation batch in place of the trainer: return a plan.

        `prompt_index` holds candidates in the order of their draw, shape `(C,)`. The plan's groups add up to `num_rows`
        and use some of the candidates; the others come first next time. Process `r` of `num_processes` gets the `r`-th
        part of the rows. `sizes` is what `on_group_sizes` wished for the candidates or the first of them, `None` where
        nothing chooses sizes. A plan beside such wishes must take the argument `sizes`.
        """

    def on_generate(
        self, *, args: Args, state: TrainerState, control: TrainerControl, rows: list[dict[str, Any]], **kwargs: Any
    ) -> list[RolloutSequence] | None:
        """
        Generate in place of TRL: return one [`RolloutSequence`] for each of this process's dataset `rows`.

        Called in evaluation too. Every process must make the same number of generation calls with as many rows each.
        """

    def on_rewards(
        self, *, args: Args, state: TrainerState, control: TrainerControl, batch: RolloutBatch, **kwargs: Any
    ) -> Tensor | None:
        """Shape the rewards of each function: return `(N, K)`. May run several times on one batch (resampling)."""

    def on_total_rewards(
        self, *, args: Args, state: TrainerState, control: TrainerControl, batch: RolloutBatch, **kwargs: Any
    ) -> Tensor | None:
        """Shape the total reward: return `(N,)`. May run several times on one batch (resampling)."""

    def on_resample(
        self,
        *,
        args: Args,
        state: TrainerState,
        control: TrainerControl,
        batch: RolloutBatch,
        round: int,
        **kwargs: Any,
    ) -> Tensor | None:
        """Which groups to throw away and replace by fresh prompts: return a boolean `(P,)`. `round` counts from 0."""

    def on_advantages(
        self, *, args: Args, state: TrainerState, control: TrainerControl, batch: RolloutBatch, **kwargs: Any
    ) -> Tensor | None:
        """
        Change the advantages: return `(N,)`, or `(N, T)` for one per token, with `T = batch.completion_lengths.max()`.

        Position `t` is the `t`-th token that the model wrote in the completion; what lies beyond its length is not
        used.
        """

    def on_rollouts(
        self, *, args: Args, state: TrainerState, control: TrainerControl, batch: RolloutBatch, **kwargs: Any
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


def call_hook(callback: GRPOCallback, hook: str, of: HookedTrainer, **arguments: Any) -> Any:
    """Call a hook by keyword, with `args`, `state` and `control` of a trainer."""
    everywhere = {"args": of.args, "state": of.state, "control": of.control}
    return getattr(callback, hook)(**everywhere, **arguments)


def _conflicts_of_generating(name: str) -> tuple[Conflict, ...]:
    """What no callback that generates can be combined with."""
    return (
        Conflict("on_generate", f"{name} and {{other}} both generate: pass one of them"),
        Conflict("rollout_func", f"{name} and rollout_func both generate: pass one of them"),
        Conflict("vision-language models", f"{name} does not support vision-language models: use a text model"),
        Conflict(
            "tools",
            f"{name} does not support tools and environments, whose calls TRL makes while it generates: leave out "
            f"tools and environment_factory, or {name}",
        ),
        Conflict(
            "on_resample",
            f"{{other}} replaces groups one by one, and {name} makes rows that depend on each other: set "
            "dynamic_sampling_rounds=0",
        ),
    )
