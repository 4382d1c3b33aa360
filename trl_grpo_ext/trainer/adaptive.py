"""[`AdaptiveGRPOTrainer`]: the life of a batch, from its plan to the loss, with a hook at each stage."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import get_config_model_id

from ..compute.hidden import prompt_features
from ..compute.packing import equal_rows
from ..config import AdaptiveGRPOConfig
from ..credit.groups import group_advantages, normalize_then_sum
from ..hooks.callback import GRPOCallback, call_hook
from ..hooks.checks import check_advantages, check_conflicts, check_finite, check_shape
from ..hooks.records import RolloutBatch, RolloutPlan
from ..hooks.segments import total_rewards
from ..host.calls import own_copy
from ..host.seams import as_awaited, check_liger, num_generations_set
from ..plan.planner import Planner, check_plannable, plans
from ..rollouts.adapter import CallbackRollout, Rollout
from ..shape.resampling import global_positions, put_logs, rows_to_regenerate, take_logs
from .features import callbacks_of
from .ground import GroundGRPOTrainer
from .logs import StepMarks, added_metrics, metrics_of_merged
from .reuse import ReuseGuardCallback, squared_log_ratio
from .sampled import Sampled, same

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl.trainer.grpo_trainer import RewardFunc

logger = get_logger(__name__)


class AdaptiveGRPOTrainer(GroundGRPOTrainer):
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
        self._step_marks: dict[str, int] = {}
        self._watched: dict[str, Any] | None = None  # micro-batch whose drift the guard of reuse wants to know
        reward_funcs = as_awaited(reward_funcs)
        data = (train_dataset, eval_dataset, processing_class, reward_processing_classes)
        super().__init__(model, reward_funcs, args, *data, callbacks, *further, **kwargs)
        duplicates = sorted({name for name in self.reward_func_names if self.reward_func_names.count(name) > 1})
        if duplicates:
            raise ValueError(
                f"Reward functions share the name {duplicates[0]!r}, so their metrics would mix: rename one, for "
                "example with as_reward(func).named('other')"
            )
        self.rollout = Rollout(self)
        self._num_rollouts = 0
        super().add_callback(StepMarks(self._step_marks, self._metrics["train"]))
        self._dataset = self.train_dataset  # what callbacks and planner were set up for
        self._set_up(self.grpo_callbacks)

    # Seams of TRL

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._follow_dataset()
        return super().train(*args, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        super().add_callback(callback)
        added = self.callback_handler.callbacks[-1]
        if self._is_set_up and isinstance(added, GRPOCallback):
            try:
                self._set_up([added])
            except ValueError:
                self.remove_callback(added)
                raise

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        inputs = self.rollout.rows_to_score(inputs, prompts, completions)
        calculate = partial(super()._calculate_rewards, inputs, prompts, completions, completion_ids_list)
        return self.rollout.calculate_rewards(calculate, prompts, completions)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training or not self.grpo_callbacks:
            self.rollout.take_rows(inputs)
            plain: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return plain
        plan, rows = self._plan(inputs)
        sampled = self._generate_and_score(plan, rows)
        self._shape(sampled)
        self._resample(sampled)
        self._credit(sampled)
        self._call("on_rollouts", sampled.batch)
        return self._finish(sampled)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        guard, metrics = self._guard, self._metrics["train"]
        if guard is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if guard.is_over:  # no weight changes, so nothing is computed
            self._step += 1
            loss, added = guard.recall()
            for name, values in added.items():
                metrics[name].extend(values)
            return loss
        known = {name: len(values) for name, values in metrics.items()}
        loss = super().training_step(model, inputs, num_items_in_batch)
        added = {name: values[known.get(name, 0) :] for name, values in metrics.items() if name != "step_time"}
        guard.remember(loss, added)
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._watched = inputs if self.model.training and self._guard is not None else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._watched = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._watched is not None and self._watched.get("old_per_token_logps") is not None:
            inputs, self._watched = self._watched, None  # the reference model comes later, or before
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            assert self._guard is not None
            self._guard.watch(squared_log_ratio(result[0], inputs["old_per_token_logps"], mask))
        return result

    # The life of a batch

    def _plan(self, inputs: list[dict[str, Any]]) -> tuple[RolloutPlan, list[dict[str, Any]]]:
        """Which prompts, how many completions each, and this process's rows of them."""
        self._follow_dataset()
        if self._planner is None:
            return RolloutPlan.equal(self.args.generation_batch_size, self.num_generations), inputs
        plan = self._planner.plan(self.grpo_callbacks, self.state, self.control)
        return plan, self._rows_of(plan)

    def _generate_and_score(self, plan: RolloutPlan, rows: list[dict[str, Any]], is_extra: bool = False) -> Sampled:
        """Let TRL sample completions and ask the reward functions. `is_extra` rows are in no order of groups."""
        is_ragged = is_extra or not self.rollout.strides or not plan.all_of_size(self.num_generations)
        self.rollout.take_rows(rows)
        # One completion per row: TRL then neither strides over the prompts (vLLM) nor reshapes rewards into groups.
        with num_generations_set(self, 1 if is_ragged else self.num_generations):
            output = super()._generate_and_score_completions(rows)
        rewards = self.rollout.rewards.float().cpu()
        self._num_rollouts += rewards.size(0)
        return Sampled(plan, rows, output, rewards, is_ragged)

    def _shape(self, sampled: Sampled) -> None:
        """Run the reward hooks, from raw rewards per function to the total."""
        batch = sampled.batch = RolloutBatch(
            step=self.state.global_step,
            rewards_per_func=sampled.rewards.clone(),
            raw_rewards_per_func=sampled.rewards,
            reward_names=self.reward_func_names,
            **self.rollout.structure(sampled.plan, sampled.rows),
        )
        weights = self.reward_weights.cpu()
        self._call("on_rewards", batch, "rewards_per_func")
        batch.rewards = total_rewards(batch.rewards_per_func, weights)
        total = batch.rewards.clone()
        self._call("on_total_rewards", batch, "rewards")
        if self.multi_objective_aggregation == "normalize_then_sum" and not same(batch.rewards, total):
            raise ValueError(
                "A callback changed the total reward in on_total_rewards, which multi_objective_aggregation="
                "'normalize_then_sum' does not use: change the rewards of each function in on_rewards"
            )
        check_finite(batch)
        raw_total = total_rewards(sampled.rewards, weights)
        batch.is_shaped = not (same(batch.rewards_per_func, sampled.rewards) and same(batch.rewards, raw_total))

    def _resample(self, sampled: Sampled) -> None:
        """Replace groups as long as a callback asks for it. Every rank generates the same number of rows."""
        discarded: RolloutBatch | None = None
        while (replaced := self._asked_to_replace(sampled)).any():
            gone = sampled.batch.select(replaced)
            if discarded is None:
                discarded = gone
            else:
                discarded.append(gone)
            assert self._planner is not None  # because a callback has `on_resample`
            planned = (self.grpo_callbacks, sampled.plan, replaced, self.state, self.control, discarded.prompt_index)
            plan = self._planner.replace(*planned)
            positions, count = rows_to_regenerate(replaced, plan.group_ids, self.accelerator.num_processes)
            process = self.accelerator.process_index
            mine = torch.nn.functional.pad(positions[process], (0, count - positions[process].numel()))
            logged = take_logs(self._logs)
            fresh = self._generate_and_score(plan, self._rows_of(plan, mine), is_extra=True)
            sampled.replace(plan, fresh, positions, process, self.tokenizer.pad_token_id)
            put_logs(self._logs, logged, *global_positions(positions, plan.group_ids.numel(), count))
            self._shape(sampled)
        if discarded is not None:
            sampled.output["num_items_in_batch"] = self.accelerator.gather(sampled.loss_mask.sum()).sum()
            sampled.batch.discarded = discarded

    def _credit(self, sampled: Sampled) -> None:
        """From rewards to advantages: TRL's own, or those of groups that TRL does not know; then the hooks."""
        batch = sampled.batch
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        batch.tokens = {name: sampled.output[name] for name in names}
        batch.completion_lengths = self.rollout.lengths(sampled.loss_mask)
        if any(callback.reads_prompt_features for callback in self.grpo_callbacks):
            batch.prompt_features = self._prompt_features(batch)
        if not sampled.is_ours:
            batch.advantages = torch.tensor(list(self._logs["advantages"]))  # of all ranks
        elif self.multi_objective_aggregation == "normalize_then_sum":
            weights = self.reward_weights.cpu()
            _, batch.advantages = normalize_then_sum(batch.rewards_per_func, weights, batch.group_ids, batch.num_groups)
        else:
            batch.advantages = group_advantages(batch.rewards, batch.group_ids, batch.num_groups, self.scale_rewards)
        self._call("on_advantages", batch, "advantages")

    def _finish(self, sampled: Sampled) -> dict[str, Any]:
        """What the loss reads, and what the logs say, now that the hooks have run."""
        batch, output = sampled.batch, sampled.output
        own = self.rollout.own_advantages(batch.advantages, sampled.loss_mask)
        output["advantages"] = own.to(output["advantages"])
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(self.rollout.per_sequence(batch.mean_advantages).tolist())
        metrics = self._metrics["train"]
        corrected = {"frac_reward_zero_std": batch.flat_completions().float().mean().item()} if sampled.is_ours else {}
        if sampled.num_rounds > 0:
            # mask_truncated_completions makes the length of a completion 0 here, but not in TRL's metrics.
            with_lengths = not self.mask_truncated_completions
            corrected |= metrics_of_merged(batch, self.reward_weights.cpu(), with_lengths)
        for name, value in corrected.items():
            metrics[name][-sampled.num_rounds - 1 :] = [value]  # TRL appended one value per round
        has_sizes, replaces = (
            any(callback.overrides(hook) for callback in self.grpo_callbacks)
            for hook in ("on_group_sizes", "on_resample")
        )
        for name, value in added_metrics(batch, has_sizes, sampled.num_rounds if replaces else None).items():
            self.log_metric(name, value)
        metrics["rollouts/total"] = [float(self._num_rollouts)]  # a running total, like TRL's num_tokens
        return output

    # Steps of a stage

    @property
    def _guard(self) -> ReuseGuardCallback | None:
        """What ends the passes over a batch, where something does."""
        return next((callback for callback in self.grpo_callbacks if isinstance(callback, ReuseGuardCallback)), None)

    def _call(self, hook: str, batch: RolloutBatch, field: str | None = None) -> None:
        """Call a hook of every callback; what it returns becomes `batch.<field>` for the next."""
        for callback in self.grpo_callbacks:
            value = call_hook(callback, hook, self, batch=batch)
            if field is not None and value is not None:
                shapes = [getattr(batch, field).shape]
                if field == "advantages":  # one per completion, or one per token of it
                    shapes = [batch.rewards.shape, batch.token_mask.shape]
                check_shape(callback, hook, value, *shapes)
                setattr(batch, field, value.to(getattr(batch, field)))  # a float64, a bool, on any device
                if field == "advantages":
                    check_advantages(callback, batch)

    def _prompt_features(self, batch: RolloutBatch) -> Tensor:
        """The policy's hidden state at the end of the prompt of each group of all processes, `(P, d)`."""
        ids, mask = batch.tokens["prompt_ids"], batch.tokens["prompt_mask"]
        prompts = equal_rows(ids, mask)
        first = torch.zeros(int(prompts.max()) + 1, dtype=torch.long, device=ids.device)
        first = first.scatter(0, prompts, torch.arange(len(prompts), device=ids.device))
        own = prompt_features(self.model_wrapped, ids[first], mask[first])[prompts.cpu()]
        features = self.rollout.per_completion(self.accelerator.gather(own.to(ids.device)).cpu())
        some = torch.zeros(batch.num_groups, dtype=torch.long)
        return features[some.scatter(0, batch.group_ids, torch.arange(batch.group_ids.numel()))]

    def _asked_to_replace(self, sampled: Sampled) -> Tensor:
        """Which groups `(P,)` any callback wants replaced."""
        replaced = torch.zeros(sampled.batch.num_groups, dtype=torch.bool)
        for callback in self.grpo_callbacks:
            mask = call_hook(callback, "on_resample", self, batch=sampled.batch, round=sampled.num_rounds)
            if mask is not None:
                check_shape(callback, "on_resample", mask, replaced.shape)
                replaced = replaced | mask.bool()
        return replaced

    def _rows_of(self, plan: RolloutPlan, positions: Tensor | None = None) -> list[dict[str, Any]]:
        """This rank's dataset rows (or those at `positions` among them), a copy of its own for each completion."""
        assert plan.prompt_index is not None
        index = plan.prompt_index[plan.group_ids].view(self.accelerator.num_processes, -1)
        index = index[self.accelerator.process_index]
        index = index if positions is None else index[positions]
        dataset = self.train_dataset
        if self.args.remove_unused_columns:
            dataset = self._remove_unused_columns(dataset, description="training")
        prompts, copies = torch.unique(index, return_inverse=True)
        fetched = dataset.__getitems__(prompts.tolist())
        # A row that two completions share, or their reward functions, would be changed by both.
        return [own_copy(fetched[i]) for i in copies.tolist()]

    def _follow_dataset(self) -> None:
        """Set up anew what reads the training dataset, where somebody has put another one into its place."""
        if self.train_dataset is self._dataset:
            return
        self._dataset, self._planner = self.train_dataset, None
        self._set_up([callback for callback in self.grpo_callbacks if callback.reads_dataset])

    def _set_up(self, callbacks: list[GRPOCallback]) -> None:
        """Set up some of the callbacks, beside all that are there."""
        self._is_set_up = True
        everyone = self.grpo_callbacks
        if plans(everyone):
            check_plannable(self.args, everyone, self.train_dataset)
        check_conflicts(everyone, self)
        if plans(everyone):
            self._planner = self._planner or Planner(self.args, self.train_dataset)
        if self.rollout.strides and any(callback.overrides("on_generate") for callback in everyone):
            self.rollout = CallbackRollout(self)
            self.rollout_func = self.rollout.generate
        for callback in callbacks:
            callback.is_attached = True
            call_hook(callback, "on_setup", self, trainer=self)
