"""What the recipes share: arguments from YAML and the command line, a trainer, and a comparison before and after."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..config import AdaptiveGRPOConfig
from ..host.processes import leave
from ..host.sources import resolve_model
from ..observe.live import LiveCallback
from ..observe.report import write_report
from ..rewards import Reward
from ..trainer.adaptive import AdaptiveGRPOTrainer
from .datasets import load_prompts
from .evaluation import HeldOutCallback, print_comparison
from .layouts import LAYOUTS


@dataclass
class DataArguments:
    """
    Where the prompts of a recipe come from; a recipe adds its own arguments in a subclass.

    Parameters:
        dataset_name (`str`):
            A shipped set, a local file or folder, or a dataset on the hub.
        dataset_config (`str`, *optional*), dataset_layout (`str`, *optional*), dataset_streaming (`bool`, *optional*):
            As in [`~trl_grpo_ext.recipe.datasets.load_prompts`], and so are the two splits.
        prompt_column (`str`, *optional*), reference_column (`str`, *optional*), system_prompt (`str`, *optional*):
            As in [`~trl_grpo_ext.recipe.datasets.load_prompts`].
        max_test_prompts (`int`, *optional*, defaults to `200`):
            Most held-out prompts.
    """

    dataset_name: str = field(
        default="helpful", metadata={"help": "A shipped set, a local file or folder, or a dataset on the hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_layout: str | None = field(
        default=None,
        metadata={"help": f"Layout of its columns: {', '.join(LAYOUTS)}; known for the sets on the hub."},
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompts, if not `prompt`."})
    reference_column: str | None = field(
        default=None, metadata={"help": "Column with the references, if not `reference`."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "What the system says first, in place of a row's own system message."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split."})
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Whether to read the training split while it is used. Not with features that choose rows."},
    )
    max_test_prompts: int = field(default=200, metadata={"help": "Most held-out prompts."})

    def load(self, columns: tuple[str, ...] = ()) -> dict[str, Any]:
        """`train` and `test`, with `prompt` and the `columns` that the reward reads."""
        return load_prompts(
            self.dataset_name,
            config=self.dataset_config,
            layout=self.dataset_layout,
            prompt_column=self.prompt_column,
            reference_column=self.reference_column,
            system_prompt=self.system_prompt,
            train_split=self.dataset_train_split,
            test_split=self.dataset_test_split,
            columns=columns,
            max_test=self.max_test_prompts,
            streaming=self.dataset_streaming,
        )


def parse_arguments(arguments: type, script: str) -> tuple[Any, AdaptiveGRPOConfig, ModelConfig]:
    """
    The arguments of a recipe, from `configs/<recipe>.yaml` beside the script or `--config`, and the command line.

    Args:
        arguments (`type`):
            Dataclass of the recipe's own arguments.
        script (`str`):
            `__file__` of the recipe.

    Returns:
        `tuple`:
            The recipe's arguments, [`AdaptiveGRPOConfig`] and [`~trl.ModelConfig`].
    """
    flags = sys.argv[1:]
    if "--config" not in flags:
        flags += ["--config", str(Path(script).parent / "configs" / f"{Path(script).stem}.yaml")]
    parser = TrlParser((arguments, AdaptiveGRPOConfig, ModelConfig))
    # Without a GPU: TRL trains in bfloat16 by default, which most CPUs only emulate, and there is no memory to pin.
    parser.set_defaults_with_config(bf16=torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available())
    # One view, that of the training; transformers warns about its own deprecations.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    parsed: tuple[Any, AdaptiveGRPOConfig, ModelConfig] = parser.parse_args_and_config(flags)
    if parsed[2].model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name a model in the YAML file or with --model_name_or_path")
    return parsed


def init_kwargs(training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """What the model is loaded with: of [`~trl.ModelConfig`], unless `model_init_kwargs` says otherwise."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def make_trainer(
    prompts: dict[str, Any], reward: Reward, training_args: AdaptiveGRPOConfig, model_args: ModelConfig
) -> AdaptiveGRPOTrainer:
    """
    A trainer with the live view, which says what it was given.

    Args:
        prompts (`dict`):
            `train` and `test`, as of [`~trl_grpo_ext.recipe.datasets.load_prompts`].
        reward ([`~trl_grpo_ext.rewards.Reward`]):
            Reward.
        training_args ([`AdaptiveGRPOConfig`]), model_args ([`~trl.ModelConfig`]):
            As of [`parse_arguments`]. Where the hub does not answer, the model comes from
            [`~trl_grpo_ext.host.sources.resolve_model`].
    """
    source = resolve_model(model_args.model_name_or_path)
    training_args.model_init_kwargs = init_kwargs(training_args, model_args)
    trainer = AdaptiveGRPOTrainer(
        model=source.path,
        reward_funcs=reward,
        args=training_args,
        train_dataset=prompts["train"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LiveCallback)
    train = prompts["train"]
    count = len(train) if isinstance(train, Dataset) else "a stream"
    trainer.accelerator.print(f"Model:   {source.origin}")
    trainer.accelerator.print(f"Prompts: {count} to train on, {len(prompts['test'])} held out")
    trainer.accelerator.print(f"Reward:  {reward}")
    return trainer


def train_and_compare(
    prompts: dict[str, Any], reward: Reward, training_args: AdaptiveGRPOConfig, model_args: ModelConfig
) -> HeldOutCallback:
    """
    Train, print a table and samples of the held-out prompts before and after, and save the model and the report.

    Args:
        prompts, reward, training_args, model_args:
            As in [`make_trainer`].

    Returns:
        [`~trl_grpo_ext.recipe.evaluation.HeldOutCallback`]:
            With the results in `before` and `after`.
    """
    trainer = make_trainer(prompts, reward, training_args, model_args)
    held_out = HeldOutCallback(trainer, prompts["test"], reward)
    trainer.add_callback(held_out)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    first = f"at step {held_out.first_step}" if held_out.first_step else "before"
    finish(trainer, lambda: print_comparison(held_out.before, held_out.after, first=first))
    return held_out


def finish(trainer: AdaptiveGRPOTrainer, compare: Callable[[], None]) -> None:
    """Save the model and the state; then the main process prints what `compare` prints, and writes the report."""
    output_dir = trainer.args.output_dir
    trainer.save_model(output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        compare()
        print(f"Model saved to {output_dir}, report of the run to {write_report(output_dir)}")
    leave()
