"""[`AdaptiveGRPOTrainer`]: TRL's trainer with hooks. The seams and the hook calls, nothing else."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..config import AdaptiveGRPOConfig
from ..credit.groups import group_advantages, normalize_then_sum, total_rewards
from ..hooks.callback import GRPOCallback, RolloutBatch, check_advantages, check_finite, check_shape
from ..host.processes import gather_rewards
from ..host.seams import as_awaited, check_liger
from ..plan.planner import Planner, check_plannable, plans
from ..plan.sampler import RolloutPlan
from ..rollouts.adapter import Rollout
from ..shape.resampling import global_positions, put_logs, replace_rows, rows_to_regenerate, take_logs
from .features import callbacks_of
from .logs import added_metrics, flat_rows, mean_advantages, metrics_of_merged
from .saving import SavingGRPOTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl.trainer.grpo_trainer import RewardFunc

logger = get_logger(__name__)


class AdaptiveGRPOTrainer(SavingGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with hooks into the life of a generation batch, and the features built on them.

    Takes what [`~trl.GRPOTrainer`] takes. Features are switched on in [`AdaptiveGRPOConfig`] or by passing a
    [`GRPOCallback`] in `callbacks`. Without any, training is bit for bit that of TRL.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions; their names must differ.
        args ([`AdaptiveGRPOConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Prompts. Features that choose prompts or group sizes need a [`~datasets.Dataset`].
        eval_dataset (*optional*):
            As in [`~trl.GRPOTrainer`]. Evaluation runs as in TRL, with the rollout of a callback that generates.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks; each [`GRPOCallback`] among them gets the hooks, after those of the configuration.
        processing_class, reward_processing_classes, **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes, in its order.

    Raises:
        `ValueError`: for options, data or callbacks that cannot work together, with the remedy.
    """

    args: AdaptiveGRPOConfig
    num_generations: int
    rollout_func: Callable[..., Any] | None
    _tag_names = ["trl", "grpo", "trl-grpo-ext"]  # noqa: RUF012 (TRL's idiom)

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: AdaptiveGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Any] | None" = None,
        processing_class: "PreTrainedTokenizerBase | ProcessorMixin | None" = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None" = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        *further: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = AdaptiveGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        if not isinstance(args, AdaptiveGRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: use AdaptiveGRPOConfig, which takes the same arguments")
        check_liger(args)
        # A callback may be passed as a class, as in transformers.
        given = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
        callbacks = callbacks_of(args) + given
        hooked = [callback for callback in callbacks if isinstance(callback, GRPOCallback)]
        if plans(hooked):
            check_plannable(args, hooked, train_dataset)
        elif isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("train_dataset is empty: pass at least one prompt")
        self._is_set_up = False
        self._planner: Planner | None = None
        self.rollout: Rollout | None = None
        reward_funcs = as_awaited(reward_funcs)
        data = (train_dataset, eval_dataset, processing_class, reward_processing_classes)
        super().__init__(model, reward_funcs, args, *data, callbacks, *further, **kwargs)
        duplicates = sorted({name for name in self.reward_func_names if self.reward_func_names.count(name) > 1})
        if duplicates:
            raise ValueError(
                f"Reward functions share the name {duplicates[0]!r}, so their metrics would mix: rename one, for "
                "example with as_reward(func).named('other')"
            )
        self._raw_rewards = torch.empty(0)
        self._num_rollouts = 0
        self._set_up(self.grpo_callbacks)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        super().add_callback(callback)
        added = self.callback_handler.callbacks[-1]
        if self._is_set_up and isinstance(added, GRPOCallback):
            self._set_up([added])

    def _set_up(self, callbacks: list[GRPOCallback]) -> None:
        self._is_set_up = True
        if plans(callbacks):
            check_plannable(self.args, callbacks, self.train_dataset)
            self._planner = self._planner or Planner(self.args, self.train_dataset)
        if any(callback.overrides("on_generate") for callback in self.grpo_callbacks):
            self.rollout = self.rollout or Rollout(self)
            self.rollout_func = self.rollout.generate
        for callback in callbacks:
            callback.is_attached = True
            callback.on_setup(self.args, self.state, self.control, trainer=self)

    # TRL's seams

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        if self.rollout is not None:
            self._raw_rewards, rewards = self.rollout.calculate_rewards(prompts, completions)
            return rewards
        calculate = partial(super()._calculate_rewards, inputs, prompts, completions, completion_ids_list)
        nothing = torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device)
        self._raw_rewards = gather_rewards(self.accelerator, calculate, nothing)
        return self._raw_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training or not self.grpo_callbacks:
            if self.rollout is not None:
                self.rollout.inputs = inputs
            plain: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return plain
        if self._planner is not None:
            plan = self._planner.plan(self.grpo_callbacks, self.state, self.control)
            inputs = self._rows_of(plan)
        else:
            plan = RolloutPlan.equal(self.args.generation_batch_size, self.num_generations)
        ragged = self.rollout is not None or not plan.all_of_size(self.num_generations)
        output, rewards = self._sample(inputs, ragged)
        batch = self._score(plan, rewards, inputs)
        output, batch, num_rounds = self._resample(plan, output, batch)

        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        batch.tokens = {name: output[name] for name in names}
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        if self.rollout is None:
            batch.completion_lengths = self.accelerator.gather(mask.sum(1)).cpu()
        else:
            batch.completion_lengths = self.rollout.lengths(mask)
        is_ours = ragged or num_rounds > 0 or batch.is_shaped
        if is_ours:
            batch.advantages = self._advantages(batch)
        else:
            batch.advantages = torch.tensor(list(self._logs["advantages"]))  # TRL's own, of all ranks
        self._apply("on_advantages", batch, "advantages")
        self._apply("on_rollouts", batch)
        output["advantages"] = self._own_advantages(batch, mask).to(output["advantages"])
        self._log_batch(batch, num_rounds, is_ours)
        return output

    # The life of a batch

    def _apply(self, hook: str, batch: RolloutBatch, field: str | None = None) -> None:
        """Call a hook of every callback; what it returns becomes `batch.<field>` for the next."""
        for callback in self.grpo_callbacks:
            value = getattr(callback, hook)(self.args, self.state, self.control, batch=batch)
            if field is not None and value is not None:
                shapes = [getattr(batch, field).shape]
                if field == "advantages":  # one per row, or one per token of it
                    shapes = [batch.rewards.shape, (*batch.rewards.shape, int(batch.completion_lengths.max()))]
                check_shape(callback, hook, value, *shapes)
                setattr(batch, field, value.to(getattr(batch, field)))  # a float64, a bool, on any device
                if field == "advantages":
                    check_advantages(callback, batch)

    def _rows_of(self, plan: RolloutPlan, positions: Tensor | None = None) -> list[dict[str, Any]]:
        """This rank's dataset rows (or those at `positions` among them), a copy for each completion."""
        assert plan.prompt_index is not None
        index = plan.prompt_index[plan.group_ids].view(self.accelerator.num_processes, -1)
        index = index[self.accelerator.process_index]
        index = index if positions is None else index[positions]
        dataset = self.train_dataset
        if self.args.remove_unused_columns:
            dataset = self._remove_unused_columns(dataset, description="training")
        prompts, copies = torch.unique(index, return_inverse=True)
        fetched = dataset.__getitems__(prompts.tolist())
        return [dict(fetched[i]) for i in copies.tolist()]

    def _sample(self, rows: list[dict[str, Any]], ragged: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Let TRL generate and score: its rollout batch, and the rewards `(N, K)` of all ranks on the CPU."""
        num_generations = self.num_generations
        if self.rollout is not None:
            self.rollout.inputs = rows
        # One completion per row: TRL then neither strides over the prompts (vLLM) nor reshapes rewards into groups.
        self.num_generations = 1 if ragged else num_generations
        try:
            output = super()._generate_and_score_completions(rows)
        finally:
            self.num_generations = num_generations
        self._num_rollouts += self._raw_rewards.size(0)
        return output, self._raw_rewards.float().cpu()

    def _score(self, plan: RolloutPlan, rewards: Tensor, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Run the reward hooks, from raw rewards per function to the total."""
        group_ids = plan.group_ids
        if self.rollout is not None:
            group_ids, plan = self.rollout.group_ids(plan), self.rollout.plan_of_answers(plan)
            rows = [rows[number] for number, _ in self.rollout.answers]
        batch = RolloutBatch(
            step=self.state.global_step,
            group_ids=group_ids,
            group_sizes=plan.group_sizes,
            prompt_index=plan.prompt_index,
            rewards_per_func=rewards.clone(),
            raw_rewards_per_func=rewards,
            reward_names=self.reward_func_names,
            rows=rows,
            turns=torch.zeros_like(group_ids) if self.rollout is None else self.rollout.index.turns,
            parents=torch.full_like(group_ids, -1) if self.rollout is None else self.rollout.index.parents,
        )
        self._apply("on_rewards", batch, "rewards_per_func")
        batch.rewards = total_rewards(batch.rewards_per_func, self.reward_weights.cpu())
        total = batch.rewards.clone()
        self._apply("on_total_rewards", batch, "rewards")
        if self.multi_objective_aggregation == "normalize_then_sum" and not _same(batch.rewards, total):
            raise ValueError(
                "A callback changed the total reward in on_total_rewards, which multi_objective_aggregation="
                "'normalize_then_sum' does not use: change the rewards of each function in on_rewards"
            )
        check_finite(batch)
        raw_total = total_rewards(rewards, self.reward_weights.cpu())
        batch.is_shaped = not (_same(batch.rewards_per_func, rewards) and _same(batch.rewards, raw_total))
        return batch

    def _resample(
        self, plan: RolloutPlan, output: dict[str, Tensor], batch: RolloutBatch
    ) -> tuple[dict[str, Tensor], RolloutBatch, int]:
        """Replace groups as long as a callback asks for it. Every rank generates the same number of rows."""
        discarded: RolloutBatch | None = None
        num_rounds = 0
        while True:
            replaced = torch.zeros(batch.num_groups, dtype=torch.bool)
            for callback in self.grpo_callbacks:
                mask = callback.on_resample(self.args, self.state, self.control, batch=batch, round=num_rounds)
                if mask is not None:
                    check_shape(callback, "on_resample", mask, replaced.shape)
                    replaced = replaced | mask.bool()
            if not replaced.any():
                break
            num_rounds += 1
            if discarded is None:
                discarded = batch.select(replaced)
            else:
                discarded.append(batch.select(replaced))
            assert self._planner is not None  # because a callback has `on_resample`
            plan = self._planner.replace(
                self.grpo_callbacks, plan, replaced, self.state, self.control, discarded.prompt_index
            )
            positions, count = rows_to_regenerate(replaced, plan.group_ids, self.accelerator.num_processes)
            mine = positions[self.accelerator.process_index]
            logged = take_logs(self._logs)
            padded = torch.cat([mine, mine.new_zeros(count - mine.numel())])
            fresh, fresh_rewards = self._sample(self._rows_of(plan, padded), ragged=True)
            output = replace_rows(output, fresh, mine, self._tokenizer.pad_token_id)
            where, source = global_positions(positions, batch.group_ids.numel(), count)
            put_logs(self._logs, logged, where, source)
            rewards = batch.raw_rewards_per_func.index_copy(0, where, fresh_rewards[source])
            batch = self._score(plan, rewards, self._rows_of(plan))
        if discarded is not None:
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
            batch.discarded = discarded
        return output, batch, num_rounds

    def _own_advantages(self, batch: RolloutBatch, mask: Tensor) -> Tensor:
        """Those of this process's rows, `(B,)`, or of the tokens of its completions, in the shape of the loss mask."""
        if self.rollout is not None:
            spread = self.rollout.token_advantages(batch.advantages, mask.size(1))
            return spread if spread.dim() == 1 else spread.where(mask.to(spread.device) > 0, torch.zeros_like(spread))
        per_rank = batch.advantages.unflatten(0, (self.accelerator.num_processes, -1))
        own: Tensor = per_rank[self.accelerator.process_index]
        if own.dim() == 1:
            return own
        if own.size(1) == 0:
            return own.new_zeros(mask.shape)
        # Between the tokens that the model wrote may lie those of tools.
        written = (mask.cumsum(1) - 1).clamp(0, own.size(1) - 1).to(own.device)
        return own.gather(1, written).where(mask.to(own.device) > 0, torch.zeros((), dtype=own.dtype))

    def _advantages(self, batch: RolloutBatch) -> Tensor:
        if self.multi_objective_aggregation == "normalize_then_sum":
            weights = self.reward_weights.cpu()
            return normalize_then_sum(batch.rewards_per_func, weights, batch.group_ids, batch.num_groups)[1]
        return group_advantages(batch.rewards, batch.group_ids, batch.num_groups, self.scale_rewards)

    def _log_batch(self, batch: RolloutBatch, num_rounds: int, is_ours: bool) -> None:
        """Correct what TRL logged before the hooks ran, and log what they add."""
        advantages = mean_advantages(batch)
        if self.rollout is not None:
            advantages = self.rollout.index.mean_per_row(advantages)
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(advantages.tolist())
        metrics = self._metrics["train"]
        corrected = {"frac_reward_zero_std": flat_rows(batch).float().mean().item()} if is_ours else {}
        if num_rounds > 0:
            # mask_truncated_completions makes the length of a row 0 here, but not in TRL's metrics.
            with_lengths = not self.mask_truncated_completions
            corrected |= metrics_of_merged(batch, self.reward_weights.cpu(), with_lengths)
        for name, value in corrected.items():
            # TRL appended one value per round.
            metrics[name][-num_rounds - 1 :] = [value]
        has_sizes, replaces = (
            any(callback.overrides(hook) for callback in self.grpo_callbacks)
            for hook in ("on_group_sizes", "on_resample")
        )
        for name, value in added_metrics(batch, has_sizes, num_rounds if replaces else None).items():
            metrics[name].append(value)
        metrics["rollouts/total"] = [float(self._num_rollouts)]  # a running total, like TRL's num_tokens


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
