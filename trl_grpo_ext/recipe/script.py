"""What recipes are made of: arguments from YAML and the command line, a trainer, a comparison before and after."""

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import AdaptiveGRPOConfig
from ..host.engine import engine_for_cpu, one_engine
from ..host.processes import leave
from ..host.sources import resolve_model
from ..observe.evaluation import HeldOutCallback
from ..observe.held_out import HeldOut, as_one_reward
from ..observe.live import LiveCallback
from ..observe.report import write_report
from ..rewards import Reward, as_reward
from ..trainer.adaptive import AdaptiveGRPOTrainer
from .datasets import load_prompts
from .evaluation import print_comparison
from .flags import FlagParser, config_of
from .launch import use_all_cores
from .layouts import LAYOUTS
from .reading import path_of
from .rivals import REPEATED, STOCK, print_rivals, repeat_question, stock_args, train_stock, what_features_did

BATCH_SIZE = 48  # held-out answers per generation call on each process


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

    What is wrong with them ends the process in one line, with status 2. On a CPU, a recipe that the launcher starts on
    one process takes all cores from here on.

    Args:
        arguments (`type`):
            Dataclass of the recipe's own arguments.
        script (`str`):
            `__file__` of the recipe.

    Returns:
        `tuple`:
            The recipe's arguments, [`AdaptiveGRPOConfig`] and [`~trl.ModelConfig`].
    """
    # One view, that of the training; transformers warns about its own deprecations.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    parser = recipe_parser(arguments, script)
    parsed: tuple[Any, AdaptiveGRPOConfig, ModelConfig] = parser.parse()
    with parser.in_one_line():
        check_parsed(parsed)
    use_all_cores()
    return parsed


def recipe_parser(arguments: type, script: str, **options: Any) -> FlagParser:
    """The parser of a recipe; `options` as in [`~argparse.ArgumentParser`]."""
    parser = FlagParser((arguments, AdaptiveGRPOConfig, ModelConfig), config_of(script), **options)
    if not torch.cuda.is_available():
        # TRL trains in bfloat16 by default, which most CPUs only emulate; there is no memory to pin; and the share of
        # vLLM is one of the machine's memory.
        parser.set_defaults_with_config(bf16=False, dataloader_pin_memory=False, vllm_gpu_memory_utilization=0.1)
    return parser


def check_parsed(parsed: Sequence[Any]) -> None:
    """Raise `ValueError` where there is no model, no such set or no such checkpoint; the latter is then a folder."""
    script_args, training_args, model_args = parsed
    if isinstance(script_args, DataArguments) and script_args.dataset_name:
        path_of(script_args.dataset_name)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name a model in the YAML file or with --model_name_or_path")
    training_args.resume_from_checkpoint = checkpoint_of(training_args)


def checkpoint_of(training_args: AdaptiveGRPOConfig) -> str | bool | None:
    """
    What `resume_from_checkpoint` means: a folder, or `True` for the last checkpoint of `output_dir`.

    Raises:
        `ValueError`: for what is neither, such as `"last"`.
    """
    value: str | bool | None = training_args.resume_from_checkpoint
    if isinstance(value, bool) or not value:
        return value or None
    if value.lower() in ("true", "false"):  # as the command line gives them
        return value.lower() == "true" or None
    if not os.path.isdir(value):
        raise ValueError(
            f"resume_from_checkpoint={value!r} is no folder (looked for {os.path.abspath(value)}): name a checkpoint, "
            f"such as {os.path.join(training_args.output_dir, 'checkpoint-10')}, or true for the last one in output_dir"
        )
    return value


def init_kwargs(training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """What the model is loaded with: of [`~trl.ModelConfig`], unless `model_init_kwargs` says otherwise."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def make_trainer(
    prompts: Mapping[str, Any], reward: Any, training_args: AdaptiveGRPOConfig, model_args: ModelConfig
) -> AdaptiveGRPOTrainer:
    """
    A trainer with the live view and held-out evaluation, which says what it was given.

    Args:
        prompts (`Mapping`):
            `train` and `test`, as of [`~trl_grpo_ext.recipe.datasets.load_prompts`].
        reward ([`~trl_grpo_ext.rewards.Reward`], or what TRL takes as `reward_funcs`):
            A reward, a function, a model or its id, or a list of them.
        training_args ([`AdaptiveGRPOConfig`]), model_args ([`~trl.ModelConfig`]):
            As of [`parse_arguments`]. Where the hub does not answer, the model comes from
            [`~trl_grpo_ext.host.sources.resolve_model`].

    Raises:
        `ValueError`: for prompts or a checkpoint of another form, before a model is loaded.
    """
    check_splits(prompts)
    training_args.resume_from_checkpoint = checkpoint_of(training_args)
    rewards = as_rewards(reward)
    whole = as_one_reward(rewards, training_args.reward_weights)
    trainer, origin = _build(prompts, rewards, training_args, model_args)
    train = prompts["train"]
    count = len(train) if isinstance(train, Dataset) else "a stream"
    trainer.accelerator.print(f"Model:   {origin}")
    trainer.accelerator.print(f"Prompts: {count} to train on, {len(prompts['test'])} held out")
    trainer.accelerator.print(f"Reward:  {whole}")
    return trainer


def _build(
    prompts: Mapping[str, Any], rewards: Any, training_args: AdaptiveGRPOConfig, model_args: ModelConfig
) -> tuple[AdaptiveGRPOTrainer, str]:
    """The trainer, and where its model comes from."""
    source = resolve_model(model_args.model_name_or_path)
    training_args.model_init_kwargs = init_kwargs(training_args, model_args)
    if training_args.use_vllm:
        training_args.merge_adapter = False  # which recipes set, and TRL hands vLLM merged weights anyway
    with engine_for_cpu(training_args):
        trainer = AdaptiveGRPOTrainer(
            model=source.path,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=prompts["train"],
            eval_dataset=prompts["test"],
            callbacks=[] if training_args.evaluates_held_out else [HeldOutCallback(batch_size=BATCH_SIZE)],
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    if source.path != model_args.model_name_or_path:
        set_base_model(trainer, model_args.model_name_or_path)
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LiveCallback)
    return trainer, source.origin


def set_base_model(trainer: AdaptiveGRPOTrainer, name: str) -> None:
    """Say of which model on the hub the weights are a copy, so that an adapter or a card names no folder of here."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config._name_or_path = name
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = name
    # peft looks there whether embeddings were added; where no hub answers, none were.
    warnings.filterwarnings("ignore", message=f"Could not find a config file in {re.escape(name)}")


def as_rewards(reward: Any) -> Reward | list[Reward]:
    """What TRL takes as `reward_funcs`, as rewards: a model that is named is loaded once for all uses."""
    return [as_reward(part) for part in reward] if isinstance(reward, list | tuple) else as_reward(reward)


def check_splits(prompts: Any) -> None:
    """
    Raise `ValueError` for prompts that are not two splits, with what helps.

    Args:
        prompts (`Any`):
            `train` ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]) and `test` ([`~datasets.Dataset`]).
    """
    halve = "hold some out, for example with dataset.train_test_split(test_size=48)"
    if not isinstance(prompts, Mapping):
        raise ValueError(f"prompts is a {type(prompts).__name__}: pass {{'train': ..., 'test': ...}}; {halve}")
    for split, kinds in {"train": (Dataset, IterableDataset), "test": (Dataset,)}.items():
        if split not in prompts:
            raise ValueError(f"prompts has no {split!r}, only {list(prompts)}: name one of them so, or {halve}")
        rows = prompts[split]
        if isinstance(rows, Mapping):
            raise ValueError(f"prompts[{split!r}] holds the splits {list(rows)}: pass one of them, not all")
        if isinstance(rows, list | tuple):
            raise ValueError(f"prompts[{split!r}] is a {type(rows).__name__}: make it datasets.Dataset.from_list(rows)")
        if not isinstance(rows, kinds):
            names = " or ".join(f"datasets.{kind.__name__}" for kind in kinds)
            raise ValueError(f"prompts[{split!r}] is a {type(rows).__name__}: pass a {names}")
        if isinstance(rows, Dataset) and len(rows) == 0:
            raise ValueError(f"prompts[{split!r}] is empty: put at least one prompt into it")


@one_engine()  # that of stock TRL, too
def train_and_compare(
    prompts: Mapping[str, Any],
    reward: Any,
    training_args: AdaptiveGRPOConfig,
    model_args: ModelConfig,
    repeats_question: bool = False,
    stock: Mapping[str, Any] | None = None,
    closing: str | None = None,
) -> HeldOutCallback:
    """
    Train, print a table and samples of the held-out prompts before and after, and save the model and the report.

    Args:
        prompts, reward, training_args, model_args:
            As in [`make_trainer`]. Held-out prompts are answered as the rollout of the training answers them.
        repeats_question (`bool`, *optional*, defaults to `False`):
            Whether to print what it is worth to repeat the question. Not for rollouts of several answers.
        stock (`Mapping[str, Any]`, *optional*):
            Train with TRL alone afterwards, on as many answers, and print both. What is passed are options of
            [`~trl.GRPOConfig`] in place of those of `training_args`.
        closing (`str`, *optional*):
            A line of the recipe's own below that of the features.

    Returns:
        [`~trl_grpo_ext.observe.evaluation.HeldOutCallback`]:
            With the results in `before` and `after`.
    """
    rewards = as_rewards(reward)
    trainer = make_trainer(prompts, rewards, training_args, model_args)
    held_out = next(callback for callback in trainer.grpo_callbacks if isinstance(callback, HeldOutCallback))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    first = f"at step {held_out.before.step}" if held_out.before.step else "before"
    rivals: dict[str, HeldOut] = {}
    if repeats_question and trainer.accelerator.is_main_process:
        rivals[REPEATED] = repeat_question(trainer, prompts["test"], rewards)
    if stock is not None:
        trainer.save_model(training_args.output_dir)  # before anything can go wrong there
        args = stock_args(training_args, trainer.state.log_history, **stock)
        rivals[STOCK] = train_stock(_build(prompts, rewards, args, model_args)[0])

    def compare() -> None:
        print_comparison(held_out.before, held_out.after, first=first)
        if rivals:
            print_rivals({**rivals, first: held_out.before, "after": held_out.after})
        print(what_features_did(training_args, trainer.state.log_history))
        if closing is not None:
            print(closing)

    finish(trainer, compare)
    return held_out


def finish(trainer: AdaptiveGRPOTrainer, compare: Callable[[], None]) -> None:
    """
    Save the model, its card and the state, and push them with `push_to_hub`.

    Then the main process prints what `compare` prints, and writes the report.
    """
    output_dir = trainer.args.output_dir
    trainer.save_model(output_dir)
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card(model_name=Path(output_dir).name)
    if trainer.accelerator.is_main_process:
        compare()
        print(f"Model saved to {output_dir}, report of the run to {write_report(output_dir)}")
    leave()
