"""Supervised steps on references before a training, for a model that cannot do at all what the reward asks for."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from ..config import AdaptiveGRPOConfig
from ..host.sources import resolve_model
from .script import init_kwargs


def cold_start(train: Dataset, num_steps: int, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> str:
    """
    Train a model on the column `reference`, and return the folder where it is saved.

    A run that is resumed gets the folder of its first start.

    Args:
        train ([`~datasets.Dataset`]):
            Prompts, as messages, with the column `reference`.
        num_steps (`int`):
            Steps, of 8 references each.
        training_args ([`AdaptiveGRPOConfig`]), model_args ([`~trl.ModelConfig`]):
            As of [`~trl_grpo_ext.recipe.parse_arguments`]. The folder lies in `output_dir`.
    """
    folder = Path(training_args.output_dir) / "cold_start"
    if (folder / "config.json").exists() and training_args.resume_from_checkpoint:
        return str(folder)
    trainer = SFTTrainer(
        model=resolve_model(model_args.model_name_or_path).path,
        args=SFTConfig(
            output_dir=str(folder),
            model_init_kwargs=init_kwargs(training_args, model_args),
            max_steps=num_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3 if model_args.use_peft else SFTConfig.learning_rate,
            lr_scheduler_type="linear",
            gradient_checkpointing=False,
            seed=training_args.seed,
            bf16=training_args.bf16,
            use_cpu=training_args.use_cpu,
            dataloader_pin_memory=training_args.dataloader_pin_memory,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train.map(as_demonstration, remove_columns=train.column_names),
        peft_config=get_peft_config(model_args),
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    trainer.accelerator.print(f"Cold start: {num_steps} supervised steps on references, mean loss {loss:.2f}")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:
        (model.merge_and_unload() if model_args.use_peft else model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def as_demonstration(row: dict[str, Any]) -> dict[str, Any]:
    """A row of supervised training: the prompt, and the reference as the answer to it."""
    return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["reference"]}]}
