"""What callbacks may ask of the trainer: the methods of [`~trl_grpo_ext.hooks.HookedTrainer`] that need no batch."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..hooks.records import Answer
from ..hooks.segments import total_rewards
from ..rollouts.adapter import CallbackRollout, Rollout
from .saving import SavingGRPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GroundGRPOTrainer(SavingGRPOTrainer):
    """Public names for what TRL keeps to itself, so that a feature stands on no private part of TRL."""

    rollout: Rollout
    _step_marks: dict[str, int]

    @property
    def is_vlm(self) -> bool:
        """Whether the model reads images."""
        return bool(self._is_vlm)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the text, that of the processor where there is one."""
        return self._tokenizer

    def log_metric(self, name: str, value: float) -> None:
        """
        Add a value to a metric of training or of evaluation, whichever runs. A log holds the mean since the last one.

        Every process must log the same value: nothing is gathered.
        """
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def metrics_of_step(self, name: str) -> list[float]:
        """Values of a training metric that were added since the current optimizer step began, such as `"kl"`."""
        values: list[float] = self._metrics["train"][name]
        return values[self._step_marks.get(name, 0) :]

    def tokenize(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts, texts or messages, through the chat template of the run."""
        ids: list[list[int]] = self._tokenize_prompts(prompts)[0]
        return ids

    def generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        One completion for each prompt, by the backend of the run: ids, and log-probabilities where vLLM samples.

        Every process must call this with as many prompts as the others.
        """
        return self._generate_single_turn(prompt_ids, None, {}, num_generations=1)

    def score(self, answers: list[tuple[dict[str, Any], Answer]], spare: list[tuple[dict[str, Any], Answer]]) -> Tensor:
        """
        Total rewards `(A,)` of answers, each with its dataset row, without a trace in the logs.

        Every process must call this, with any number of answers. `spare` holds one to ask about where this process has
        none and others have some.

        Raises:
            `ValueError`: where no callback generates.
        """
        if not isinstance(self.rollout, CallbackRollout):
            raise ValueError("score asks about answers of a callback that generates: add one with on_generate")
        rewards = self.rollout.score(answers, spare)
        return total_rewards(rewards, self.reward_weights.to(rewards.device)).cpu()
