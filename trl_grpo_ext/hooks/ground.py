"""[`HookedTrainer`]: the public ground that callbacks stand on. Nothing beyond it is promised to last."""

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..config import AdaptiveGRPOConfig
from .records import Answer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerControl, TrainerState
    from transformers.trainer_callback import CallbackHandler


class HookedTrainer(Protocol):
    """
    What a [`GRPOCallback`] may ask of its trainer: attributes of TRL that have their name from TRL, and a few methods.

    [`AdaptiveGRPOTrainer`] has all of it, and the built-in features use nothing else.
    """

    args: AdaptiveGRPOConfig
    state: "TrainerState"
    control: "TrainerControl"
    accelerator: "Accelerator"
    model: nn.Module
    processing_class: "PreTrainedTokenizerBase | ProcessorMixin"
    callback_handler: "CallbackHandler"
    train_dataset: Any
    eval_dataset: Any
    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_processing_classes: list[Any]
    reward_weights: Tensor
    multi_objective_aggregation: str
    scale_rewards: str
    beta: float
    temperature: float
    num_generations: int
    max_completion_length: int
    tools: Any
    rollout_func: Any
    rollout: Any
    use_vllm: bool
    vllm_mode: str
    vllm_generation: Any
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    is_deepspeed_enabled: bool
    log_completions: bool
    evaluate: Any

    @property
    def grpo_callbacks(self) -> list[Any]:
        """The callbacks with hooks, in the order in which they run."""

    @property
    def is_vlm(self) -> bool:
        """Whether the model reads images."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the text, that of the processor where there is one."""

    def add_callback(self, callback: Any) -> None:
        """Add a callback, with its hooks."""

    def log(self, logs: dict[str, float]) -> None:
        """Give values to every tracker and callback, with what was added by `log_metric`."""

    def log_metric(self, name: str, value: float) -> None:
        """
        Add a value to a metric of training or of evaluation, whichever runs. A log holds the mean since the last one.

        Every process must log the same value: nothing is gathered.
        """

    def metrics_of_step(self, name: str) -> list[float]:
        """Values of a training metric that were added since the current optimizer step began, such as `"kl"`."""

    def tokenize(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts, texts or messages, through the chat template of the run."""

    def generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        One completion for each prompt, by the backend of the run: ids, and log-probabilities where vLLM samples.

        Every process must call this with as many prompts as the others.
        """

    def score(self, answers: list[tuple[dict[str, Any], Answer]], spare: list[tuple[dict[str, Any], Answer]]) -> Tensor:
        """
        Total rewards `(A,)` of answers, each with its dataset row, without a trace in the logs.

        Every process must call this, with any number of answers. `spare` holds one to ask about where this process has
        none and others have some.
        """
