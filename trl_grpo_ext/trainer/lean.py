"""[`LeanGRPOTrainer`]: TRL's trainer without the work that changes no gradient."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from ..compute.forward import (
    Trials,
    costs_of,
    has_fixed_frequencies,
    positions_from,
    shared_logps,
    unwrapped,
    why_not_shared,
)
from ..compute.generation import SharedPrefill, adapter_merged, why_not_merged, why_not_prefilled
from ..compute.packing import equal_rows
from ..compute.rows import Cut, Teachers, first_with_context, has_image, live_rows, media_keys, regrouped
from ..host.seams import TAKES_NUM_GENERATIONS, asking_for, eos_token_ids_of

logger = get_logger(__name__)


@dataclass(frozen=True)
class Savings:
    """Whether the forward pass of a model shares prompts, and leaves out padding before and behind all rows."""

    shares: bool
    trims_left: bool
    trims_right: bool


class LeanGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that computes a prompt once per group and leaves out rows without advantage.

    Takes what [`~trl.GRPOTrainer`] takes, with `args.share_prompts`, `args.skip_zero_advantage` and
    `args.merge_adapter`. It is the base of [`AdaptiveGRPOTrainer`].

    Raises:
        `ValueError`: where `skip_zero_advantage` would change the gradient, or `merge_adapter` what is generated.
    """

    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Base model -> whether it can share prompts, and leave out padding before them.
        self._savings: dict[int, Savings] = {}
        self._shared_prefill = SharedPrefill()
        self._said: set[str] = set()
        # Of the micro-batch whose loss is computed.
        self._teachers: Teachers | None = None
        super().__init__(*args, **kwargs)
        self.eos_token_ids: list[int] = eos_token_ids_of(self)
        if self.args.skip_zero_advantage and self.aux_loss_enabled:
            raise ValueError(
                "skip_zero_advantage=True would take rows out of the load-balancing loss of this mixture of experts: "
                "set skip_zero_advantage=False or router_aux_loss_coef=0.0"
            )
        reason = self._why_not_merged() if self.args.merge_adapter else None
        if reason is not None:
            raise ValueError(f"merge_adapter=True cannot be used here, because {reason}; or leave merge_adapter out")

    @property
    def num_not_sharing(self) -> int:
        """Models, of the policy and the reference, whose forward pass cannot share prompts; the log says why."""
        return sum(not savings.shares for savings in self._savings.values())

    # TRL's seams

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return output
        except Exception as error:
            has_images = [has_image(row) for row in inputs]
            if any(has_images) and not all(has_images):
                raise ValueError(
                    f"Row {has_images.index(False)} of the batch has no image, and others have some. TRL cannot "
                    f"put them into one batch ({type(error).__name__}: {error}): give every row of the dataset an "
                    "image, or train on rows with images and on rows without in runs of their own"
                ) from error
            raise

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int | None = None,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        arguments: dict[str, Any] = {"has_tool_images": has_tool_images}
        if TAKES_NUM_GENERATIONS:
            arguments["num_generations"] = num_generations
        with self._merging(), self._prefilling(images, multimodal_fields), asking_for(self, num_generations):
            generated: tuple[list[list[int]], list[list[float]] | None] = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, **arguments
            )
            return generated

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training or not self._is_lean or self._buffered_inputs is before or self._has_media(inputs):
            return inputs
        # Where the loss is an average over a micro-batch, its sum over an optimizer step depends on who is with whom.
        is_sum = self.loss_type != "bnpo" and not self._entropy_bonus_enabled and not self.aux_loss_enabled
        self._buffered_inputs = regrouped(
            self._buffered_inputs,
            num_accumulated=self.args.gradient_accumulation_steps,
            by_group=self.args.share_prompts,
            by_length=is_sum and self.top_entropy_quantile == 1.0,
        )
        inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        # A beta that somebody raised during training makes every row teach.
        skips = self.args.skip_zero_advantage and self.model.training and self.beta == 0.0
        if skips and not self._has_media(inputs):
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            live = live_rows(inputs["advantages"], mask)
            self._teachers = Teachers(live, mask, inputs.get("old_per_token_logps"))
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        finally:
            self._teachers = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        options: dict[str, Any] = {"batch_size": batch_size, "compute_entropy": compute_entropy}
        if not self._is_lean or self._has_media(media):
            options |= {"compute_aux_loss": compute_aux_loss, **media}
            return self._plain_logps(model, input_ids, attention_mask, logits_to_keep, **options)
        base = unwrapped(model)
        savings = self._savings_of(model, base)
        batch = (input_ids, attention_mask, logits_to_keep)
        cut = Cut.of(*batch, self._live_rows(input_ids), savings.trims_left, savings.trims_right)
        if savings.shares:
            logps, entropies, aux_loss = self._shared_logps(model, base, cut, **options)
        else:
            with positions_from(base, cut.first_position):
                logps, entropies, aux_loss = self._plain_logps(
                    model,
                    cut.input_ids,
                    cut.attention_mask,
                    cut.num_completion_columns,
                    compute_aux_loss=compute_aux_loss,
                    **options,
                )
        logps, entropies = cut.restored(logps), None if entropies is None else cut.restored(entropies)
        if self._teachers is not None:
            logps, entropies = self._teachers.fill_in(logps, entropies)
        return logps, entropies, aux_loss

    # What is computed of a micro-batch

    @property
    def _is_lean(self) -> bool:
        return bool(self.args.share_prompts or self.args.skip_zero_advantage)

    def _has_media(self, inputs: dict[str, Any]) -> bool:
        """Whether a batch holds images or sound, which TRL's own forward pass has to read."""
        keys = media_keys(key for key, value in inputs.items() if value is not None)
        if keys and self._is_lean:
            options = [name for name in ("share_prompts", "skip_zero_advantage") if getattr(self.args, name)]
            self._say_once(
                f"{' and '.join(options)}: TRL's own forward pass is used for all rows, because the batch holds "
                f"{', '.join(sorted(keys))}"
            )
        return bool(keys)

    def _live_rows(self, input_ids: Tensor) -> Tensor:
        if self._teachers is None:
            return torch.arange(input_ids.size(0), device=input_ids.device)
        return self._teachers.live.nonzero().flatten()

    def _plain_logps(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's own log-probabilities, entropies and loss of experts."""
        plain: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
            *args, **options
        )
        return plain

    def _shared_logps(
        self, model: nn.Module, base: PreTrainedModel, cut: Cut, batch_size: int | None, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None, None]:
        """As TRL's, in as many forward passes, since other processes may take part in each."""
        ids, mask, num_columns = cut.input_ids, cut.attention_mask, cut.num_completion_columns
        order = torch.arange(ids.size(0), device=ids.device)
        if batch_size is not None and batch_size < len(order):
            width = ids.size(1) - num_columns
            order = torch.argsort(equal_rows(ids[:, :width], mask[:, :width]), stable=True)
        costs = costs_of(base)
        logps: list[Tensor] = []
        entropies: list[Any] = []
        for rows in order.split(batch_size or len(order)):
            batch = (ids[rows], mask[rows], num_columns)
            options = (self.temperature, self._entropy_bonus_enabled, cut.first_position)
            result = shared_logps(model, base, self.accelerator, *batch, costs, *options)
            if result is None:
                with positions_from(base, cut.first_position):
                    result = self._plain_logps(model, *batch, compute_entropy=compute_entropy)[:2]
            logps.append(result[0])
            entropies.append(result[1])
        back = torch.argsort(order)
        if not compute_entropy:
            return torch.cat(logps)[back], None, None
        found = torch.cat(entropies)[back]
        if self.top_entropy_quantile < 1.0:  # equal entropies must not be told apart by rounding
            found = found.gather(0, first_with_context(ids, mask, num_columns))
        return torch.cat(logps)[back], found, None

    # What a model allows

    def _savings_of(self, model: nn.Module, base: PreTrainedModel) -> "Savings":
        """What has been tried with a model, on all processes at its first forward pass."""
        if id(base) not in self._savings:
            trials = Trials(model, base, self.accelerator)
            reason = self._why_not_shared(model, base, trials) if self.args.share_prompts else "it is not asked for"
            if reason is not None and self.args.share_prompts:
                self._say_once(f"share_prompts: TRL's own forward pass is used for {type(base).__name__}: {reason}")
            trims_left = trials.why_not_trimmed() is None
            is_fixed = has_fixed_frequencies(base)
            self._savings[id(base)] = Savings(reason is None, trims_left and is_fixed, is_fixed)
        return self._savings[id(base)]

    def _why_not_shared(self, model: nn.Module, base: PreTrainedModel, trials: Trials) -> str | None:
        peft_config = getattr(self.accelerator.unwrap_model(model), "active_peft_config", None)
        if self.aux_loss_enabled:
            return "the load-balancing loss of its experts counts every token of every row"
        return why_not_shared(base, peft_config) or trials.why_not_shared()

    def _prefilling(self, images: Any, multimodal_fields: Any) -> AbstractContextManager[None]:
        if not self.args.share_prompts or self.use_vllm or self.use_transformers_continuous_batching:
            return nullcontext()
        reason = self._why_not_prefilled(images, multimodal_fields)
        if reason is not None:
            self._say_once(f"share_prompts: generation reads every copy of a prompt, because of {reason}")
            return nullcontext()
        return self._shared_prefill.replacing(self.accelerator.unwrap_model(self.model_wrapped))

    def _why_not_prefilled(self, images: Any, multimodal_fields: Any) -> str | None:
        if images or multimodal_fields:
            return "images or sound"
        if self._shared_prefill.reason is not None:
            return f"what was found {self._shared_prefill.reason}"
        if self.accelerator.num_processes > 1 and self._splits_weights():
            return "weights that are split over processes, which must all run as many forward passes"
        peft_config = getattr(self.accelerator.unwrap_model(self.model), "active_peft_config", None)
        return why_not_prefilled(unwrapped(self.model), self.generation_config, peft_config)

    def _merging(self) -> AbstractContextManager[None]:
        if not self.args.merge_adapter:
            return nullcontext()
        return adapter_merged(self.accelerator.unwrap_model(self.model_wrapped))

    def _why_not_merged(self) -> str | None:
        if self.use_vllm:
            return "TRL hands vLLM merged weights anyway"
        if self.use_transformers_continuous_batching:
            return "continuous batching has not been tried with it"
        return "weights are split over processes" if self._splits_weights() else why_not_merged(self.model)

    def _splits_weights(self) -> bool:
        splits: bool = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        return splits

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)
