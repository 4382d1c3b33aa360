"""The seams of TRL: what this package wraps and reads there. Importing it on another TRL gives one clear error."""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import trl
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer import utils

from .calls import is_async

SUPPORTED_TRL = ">=1.13,<1.17"

# Method of GRPOTrainer -> its parameters. `tests/host/test_contract.py` pins these, and the attributes that are read.
SEAMS = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_rng_state": ["self", "checkpoint"],
    "_get_train_sampler": ["self", "dataset"],
    "_remove_unused_columns": ["self", "dataset", "description"],
    "_get_output_dir": ["self", "trial"],
    "add_callback": ["self", "callback"],
    "_prepare_inputs": ["self", "generation_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_compute_loss": ["self", "model", "inputs"],
}
# Method -> what its parameters may begin with. The others differ between releases, and are passed on as they came.
OPEN_SEAMS = {
    "_generate_single_turn": [["self", "prompt_ids", "images", "multimodal_fields"]],
    "_get_per_token_logps_and_entropies": [
        [
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
            "compute_entropy",
            "compute_aux_loss",
        ],
        ["self", "model", "args", "batch_size", "compute_aux_loss", "kwargs"],  # TRL 1.14, for the same arguments
    ],
}
# Module -> what is imported from it.
HELPERS = {
    "trl.chat_template_utils": ["get_training_chat_template"],
    "trl.data_utils": ["is_conversational"],
    "trl.trainer.utils": [
        *("get_config_model_id", "nanstd"),
        *("split_pixel_values_by_grid", "unsplit_pixel_values_by_grid"),
    ],
}
# Since TRL 1.15, models have a head that computes log-probabilities without keeping the logits.
HAS_FUSED_HEAD = hasattr(utils, "add_fused_lm_head")

# What models and their `generate` call the keys and values of the tokens so far; renamed in transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# Up to TRL 1.14.1, `_generate_single_turn` reads the number of completions per prompt from the trainer.
TAKES_NUM_GENERATIONS = "num_generations" in inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters

# Up to TRL 1.13, the loss of Liger is computed past the methods that this package wraps, with the first beta.
LIGER_GOES_AROUND = Version(trl.__version__) < Version("1.14")


def check_seams(trainer_class: type) -> None:
    """
    Raise `ImportError` when a seam is missing or takes other arguments, or a helper of TRL is missing.

    Args:
        trainer_class (`type`):
            TRL's `GRPOTrainer`.

    Example:

    ```python
    >>> class Old:
    ...     def add_callback(self, callback): ...
    >>> check_seams(Old)
    Traceback (most recent call last):
        ...
    ImportError: trl-grpo-ext wraps GRPOTrainer._calculate_rewards(inputs, prompts, ...), which TRL ...

    ```
    """
    for name, parameters in SEAMS.items():
        if parameters_of(trainer_class, name) != parameters:
            raise _missing(f"GRPOTrainer.{name}({', '.join(parameters[1:])})")
    for name, beginnings in OPEN_SEAMS.items():
        found = parameters_of(trainer_class, name)
        if not any(found[: len(beginning)] == beginning for beginning in beginnings):
            raise _missing(f"GRPOTrainer.{name}({', '.join(beginnings[0][1:])}, ...)")
    for name, helpers in HELPERS.items():
        for helper in helpers:
            if not hasattr(importlib.import_module(name), helper):
                raise _missing(f"{name}.{helper}")


def parameters_of(trainer_class: type, name: str) -> list[str]:
    """Names of the parameters of a method, none if there is no such method."""
    method = getattr(trainer_class, name, None)
    return [] if method is None else list(inspect.signature(method).parameters)


def _missing(what: str) -> ImportError:
    return ImportError(
        f'trl-grpo-ext wraps {what}, which TRL {trl.__version__} lacks: pip install "trl{SUPPORTED_TRL}"'
    )


def check_liger(args: Any) -> None:
    """Raise `ValueError` for options that would have no effect on the loss of Liger, in a TRL where that is so."""
    if not (LIGER_GOES_AROUND and args.use_liger_kernel):
        return
    on_alarm = args.on_alarm if isinstance(args.on_alarm, dict) else {}
    idle = [name for name in ("skip_zero_advantage", "kl_target") if getattr(args, name)]
    idle += ["on_alarm='adapt_beta'"] * ("adapt_beta" in on_alarm.values())
    if idle:
        raise ValueError(
            f"{idle[0]} has no effect with use_liger_kernel=True in TRL {trl.__version__}, which computes that loss "
            "past it: use TRL 1.14 or later, or leave one of them out"
        )


def plain_rewards(trainer: Any, rows: list[Any], prompts: list[Any], completions: list[Any], ids: list[Any]) -> Tensor:
    """TRL's own calculation of rewards, which gathers the rewards `(N, K)` of all processes."""
    rewards: Tensor = trl.GRPOTrainer._calculate_rewards(trainer, rows, prompts, completions, ids)
    return rewards


def pending_columns(trainer: Any) -> dict[str, list[Any]]:
    """Columns that reward functions added to the table of completions, and that TRL has not gathered yet."""
    columns: dict[str, list[Any]] = trainer._pending_extra_logs
    return columns


def drop_pending_logs(trainer: Any) -> None:
    """Forget what reward functions logged and TRL has not gathered yet."""
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()


def loss_since_log(trainer: Any) -> float:
    """
    Sum of the losses of this process since the trainer logged last.

    Up to transformers 5.2, no attribute holds this sum: there, the first loss after resuming is that of fewer steps.
    """
    return float(getattr(trainer, "_tr_loss", 0.0))


def restore_loss(trainer: Any, loss: float, last_log: int) -> None:
    """Go on with a sum of losses since the step `last_log`, when the trainer has just begun to train."""
    if hasattr(trainer, "_tr_loss"):
        trainer._tr_loss += loss
        trainer._globalstep_last_logged = min(last_log, trainer.state.global_step)


def logged_since_log(trainer: Any, with_table: bool) -> dict[str, Any]:
    """
    What a trainer measured since it logged last, as plain data.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        with_table (`bool`):
            Whether to keep the table of completions, without images.

    Returns:
        `dict[str, Any]`:
            `metrics` (the values of each training metric), `last_log` (a step), and `table`, which may be empty.
    """
    metrics = {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()}
    table: dict[str, Any] = {}
    if with_table:
        logs = trainer._logs
        table = {name: list(logs[name]) for name in ("prompt", "completion", "advantages")}
        table |= {kind: {name: list(values) for name, values in logs[kind].items()} for kind in ("rewards", "extra")}
    return {
        "metrics": {name: values for name, values in metrics.items() if values},
        "last_log": getattr(trainer, "_globalstep_last_logged", trainer.state.global_step),
        "table": table,
    }


def restore_logged(trainer: Any, metrics: dict[str, list[float]], table: dict[str, Any]) -> None:
    """Put back what [`logged_since_log`] found, in place of what the trainer logged in a run before."""
    drop_pending_logs(trainer)
    trainer._metrics["train"].clear()
    for name, values in metrics.items():
        trainer._metrics["train"][name].extend(values)
    logs = trainer._logs
    for column in (logs["images"], logs["prompt"], logs["completion"], logs["advantages"]):
        column.clear()
    for name in ("prompt", "completion", "advantages"):
        logs[name].extend(table.get(name, ()))
    for kind in ("rewards", "extra"):
        logs[kind].clear()
        for name, values in table.get(kind, {}).items():
            logs[kind][name].extend(values)


@contextmanager
def num_generations_set(trainer: Any, num_generations: int, in_evaluation: bool = False) -> Iterator[None]:
    """Sample so many completions for each prompt while open; with `in_evaluation`, in evaluation too."""
    names = ("num_generations", "num_generations_eval") if in_evaluation else ("num_generations",)
    before = {name: getattr(trainer, name) for name in names}
    for name in names:
        setattr(trainer, name, num_generations)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def asking_for(trainer: Any, num_generations: int | None) -> AbstractContextManager[None]:
    """Let the trainer say `num_generations` while open, where TRL reads the number from the trainer."""
    if TAKES_NUM_GENERATIONS or num_generations is None:
        return nullcontext()
    return num_generations_set(trainer, num_generations, in_evaluation=True)


def eos_token_ids_of(trainer: Any) -> list[int]:
    """Tokens that end a completion; up to TRL 1.14.0, only the token of the tokenizer does."""
    return getattr(trainer, "eos_token_ids", None) or [trainer._tokenizer.eos_token_id]


def as_awaited(reward_funcs: Any) -> Any:
    """
    Reward functions in a form in which TRL awaits every async one.

    TRL 1.13 takes an object with an async `__call__` for a sync function, so it gets an async function instead.
    """
    if hasattr(utils, "is_async_callable") or reward_funcs is None:
        return reward_funcs

    def awaited(reward: Any) -> Any:
        if not is_async(reward) or inspect.iscoroutinefunction(reward):
            return reward

        @functools.wraps(reward)
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await reward(*args, **kwargs)

        return call

    return [awaited(reward) for reward in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])]


check_seams(trl.GRPOTrainer)
