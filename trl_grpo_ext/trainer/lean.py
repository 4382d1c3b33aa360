"""[`LeanGRPOTrainer`]: TRL's trainer without the work that changes no gradient."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from ..compute.forward import costs_of, has_relative_positions, shared_logps, sharing_error, unwrapped, why_not_shared
from ..compute.generation import adapter_merged, prefill_shared, why_not_merged, why_not_prefilled
from ..compute.packing import equal_rows
from ..compute.rows import compose, is_text_only, live_rows, used_columns
from ..host.seams import TAKES_NUM_GENERATIONS, asking_for, eos_token_ids_of

logger = get_logger(__name__)


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
        # Base model -> why it cannot share prompts, or None.
        self._why_not_shared: dict[int, str | None] = {}
        self._said: set[str] = set()
        # Of the micro-batch whose loss is computed: live rows, mask of the loss, old log-probabilities.
        self._rows: tuple[Tensor, Tensor, Tensor | None] | None = None
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

    # TRL's seams

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
        is_lean = self.args.share_prompts or self.args.skip_zero_advantage
        if not self.model.training or not is_lean or self._buffered_inputs is before or not is_text_only(inputs):
            return inputs
        # Where the loss is an average over a micro-batch, its sum over an optimizer step depends on who is with whom.
        is_sum = self.loss_type != "bnpo" and not self._entropy_bonus_enabled and not self.aux_loss_enabled
        self._buffered_inputs = compose(
            self._buffered_inputs,
            num_accumulated=self.args.gradient_accumulation_steps,
            by_group=self.args.share_prompts,
            by_length=is_sum and self.top_entropy_quantile == 1.0,
        )
        inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        # A beta that somebody raised during training makes every row teach.
        if self.args.skip_zero_advantage and self.model.training and self.beta == 0.0:
            if is_text_only(inputs):
                mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
                self._rows = (live_rows(inputs["advantages"], mask), mask, inputs.get("old_per_token_logps"))
            else:
                self._say_once("skip_zero_advantage: rows with images are not left out")
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        finally:
            self._rows = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        is_lean = self.args.share_prompts or self.args.skip_zero_advantage
        if not is_lean or any(value is not None for value in multimodal.values()):
            if self.args.share_prompts:
                self._say_once("share_prompts: TRL's own forward pass is used, because of rows with images or sound")
            plain: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
            return plain
        num_rows = input_ids.size(0)
        live = torch.ones(num_rows, dtype=torch.bool, device=input_ids.device) if self._rows is None else self._rows[0]
        rows = live.nonzero().flatten()
        base = unwrapped(model, self.accelerator)
        columns = used_columns(attention_mask[rows], logits_to_keep, has_relative_positions(base))
        num_kept = columns.stop - (input_ids.size(1) - logits_to_keep)
        if self._shares_prompts(model, base):
            logps, entropies, aux_loss = self._shared(
                model,
                base,
                input_ids[rows, columns],
                attention_mask[rows, columns],
                num_kept,
                batch_size,
                compute_entropy,
            )
        else:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model,
                input_ids[rows, columns],
                attention_mask[rows, columns],
                num_kept,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
            )

        def restored(values: Tensor) -> Tensor:
            values = torch.nn.functional.pad(values, (0, logits_to_keep - num_kept))
            return values.new_zeros(num_rows, logits_to_keep).index_copy(0, rows, values)

        logps = restored(logps)
        entropies = restored(entropies) if entropies is not None else None
        if self._rows is not None and len(rows) < num_rows:
            _, mask, old_logps = self._rows
            if old_logps is not None:  # a ratio of 1, which times an advantage of 0 is 0
                logps = torch.where(live[:, None], logps, old_logps)
            if entropies is not None:
                seen = mask * live[:, None]
                mean = (entropies.detach() * seen).sum() / seen.sum().clamp(min=1)
                entropies = torch.where(live[:, None], entropies, mean)
        return logps, entropies, aux_loss

    # Prompts that are computed once

    def _shared(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        compute_entropy: bool,
    ) -> tuple[Tensor, Tensor | None, None]:
        """As TRL's, in as many forward passes, since other processes may take part in each."""
        num_rows = input_ids.size(0)
        order = torch.arange(num_rows, device=input_ids.device)
        if batch_size is not None and batch_size < num_rows:
            width = input_ids.size(1) - logits_to_keep
            order = torch.argsort(equal_rows(input_ids[:, :width], attention_mask[:, :width]), stable=True)
        costs = costs_of(base)
        logps: list[Tensor] = []
        entropies: list[Any] = []
        for rows in order.split(batch_size or num_rows):
            result = shared_logps(
                model,
                base,
                self.accelerator,
                input_ids[rows],
                attention_mask[rows],
                logits_to_keep,
                costs,
                self.temperature,
                self._entropy_bonus_enabled,
            )
            if result is None:
                result = super()._get_per_token_logps_and_entropies(
                    model, input_ids[rows], attention_mask[rows], logits_to_keep, compute_entropy=compute_entropy
                )
            logps.append(result[0])
            entropies.append(result[1])
        back = torch.argsort(order)
        return torch.cat(logps)[back], torch.cat(entropies)[back] if compute_entropy else None, None

    def _shares_prompts(self, model: nn.Module, base: PreTrainedModel) -> bool:
        if not self.args.share_prompts:
            return False
        if id(base) not in self._why_not_shared:
            peft_config = getattr(self.accelerator.unwrap_model(model), "active_peft_config", None)
            reason = why_not_shared(base, peft_config)
            if reason is None and self.aux_loss_enabled:
                reason = "the load-balancing loss of its experts counts every token of every row"
            if reason is None:
                reason = sharing_error(model, base, self.accelerator)
            self._why_not_shared[id(base)] = reason
            if reason is not None:
                self._say_once(f"share_prompts: TRL's own forward pass is used for {type(base).__name__}: {reason}")
        return self._why_not_shared[id(base)] is None

    def _prefilling(self, images: Any, multimodal_fields: Any) -> AbstractContextManager[None]:
        if not self.args.share_prompts or self.use_vllm or self.use_transformers_continuous_batching:
            return nullcontext()
        reason = self._why_not_prefilled(images, multimodal_fields)
        if reason is not None:
            self._say_once(f"share_prompts: generation reads every copy of a prompt, because of {reason}")
            return nullcontext()
        return prefill_shared(self.accelerator.unwrap_model(self.model_wrapped))

    def _why_not_prefilled(self, images: Any, multimodal_fields: Any) -> str | None:
        if images or multimodal_fields:
            return "images or sound"
        if self.accelerator.num_processes > 1 and self._splits_weights():
            return "weights that are split over processes, which must all run as many forward passes"
        peft_config = getattr(self.accelerator.unwrap_model(self.model), "active_peft_config", None)
        return why_not_prefilled(unwrapped(self.model, self.accelerator), self.generation_config, peft_config)

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
