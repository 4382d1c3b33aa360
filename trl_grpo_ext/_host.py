"""The seams of TRL that this package wraps. Importing it on a TRL that lacks one gives one clear error."""

import inspect

import trl

SUPPORTED_TRL = ">=1.16,<1.17"

# Method of GRPOTrainer -> its parameters. `tests/test_contract.py` pins these and the attributes that are read.
SEAMS = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_remove_unused_columns": ["self", "dataset", "description"],
    "_get_output_dir": ["self", "trial"],
    "add_callback": ["self", "callback"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
}
# The first parameters of _get_per_token_logps_and_entropies; what follows is multimodal and passed on by name.
LOGPS_SEAM = [
    "self",
    "model",
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "batch_size",
    "compute_entropy",
    "compute_aux_loss",
]


def check_seams(trainer_class: type) -> None:
    """
    Raise `ImportError` when a seam is missing or takes other arguments.

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
    for name, parameters in (SEAMS | {"_get_per_token_logps_and_entropies": LOGPS_SEAM}).items():
        method = getattr(trainer_class, name, None)
        found = [] if method is None else list(inspect.signature(method).parameters)
        if parameters is LOGPS_SEAM:
            found = found[: len(LOGPS_SEAM)]
        if found != parameters:
            raise ImportError(
                f"trl-grpo-ext wraps GRPOTrainer.{name}({', '.join(parameters[1:])}), which TRL {trl.__version__} "
                f'lacks: pip install "trl{SUPPORTED_TRL}"'
            )


check_seams(trl.GRPOTrainer)
