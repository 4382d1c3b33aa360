"""
Train a model on conversations, every turn with credit of its own.

    accelerate launch recipes/multi_turn.py

trains SmolLM2-135M-Instruct with LoRA on 47 scripted conversations of two or three turns, and compares its answers in
16 held-out conversations before and after, turn by turn. Everything is set in `recipes/configs/multi_turn.yaml`.
`--history independent` compares whole conversations instead of answers to one history.

A dataset has a column `prompt` with what the user says first, `turns` with what the user says after each answer, and
`reference` with one good answer for each turn.
"""

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.datasets import load_prompts
from trl_grpo_ext.evaluation import evaluate_conversations, print_comparison
from trl_grpo_ext.live import LiveCallback
from trl_grpo_ext.models import resolve_model
from trl_grpo_ext.report import write_report
from trl_grpo_ext.rewards import Harmlessness, Length, Relevance, at_end


@dataclass
class MultiTurnArguments:
    dataset_name: str = field(
        default="multi_turn", metadata={"help": "'multi_turn' (shipped), a local file, or a dataset on the hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split."})
    harmlessness_weight: float = field(
        default=0.5, metadata={"help": "Weight of the harmlessness of a whole conversation; relevance has 1 a turn."}
    )
    length_weight: float = field(default=0.001, metadata={"help": "What a token costs."})


def main(script_args: MultiTurnArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    source = resolve_model(model_args.model_name_or_path)
    splits = {"train_split": script_args.dataset_train_split, "test_split": script_args.dataset_test_split}
    conversations = load_prompts(script_args.dataset_name, **splits)
    kindness = script_args.harmlessness_weight * at_end(Harmlessness())
    reward = 1.0 * Relevance("reference") + kindness - script_args.length_weight * Length()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = AdaptiveGRPOTrainer(
        model=source.path,
        reward_funcs=reward,
        args=training_args,
        train_dataset=conversations["train"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LiveCallback)
    say = trainer.accelerator.print
    say(f"Model:         {source.origin}")
    say(f"Conversations: {len(conversations['train'])} to train on, {len(conversations['test'])} held out")
    say(f"Reward:        {reward}")

    held_out = (conversations["test"], reward, training_args.turn_columns)
    before = evaluate_conversations(trainer, *held_out)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = evaluate_conversations(trainer, *held_out)

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        for turn, (old, new) in enumerate(zip(before, after, strict=True), start=1):
            print_comparison(old, new, num_samples=2, title=f"Turn {turn} of held-out conversations")
        report = write_report(training_args.output_dir)
        print(f"Model saved to {training_args.output_dir}, report of the run to {report}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if "--config" not in sys.argv:
        sys.argv += ["--config", str(Path(__file__).parent / "configs" / "multi_turn.yaml")]
    parser = TrlParser((MultiTurnArguments, AdaptiveGRPOConfig, ModelConfig))
    # Without a GPU: TRL trains in bfloat16 by default, which most CPUs only emulate, and there is no memory to pin.
    parser.set_defaults_with_config(bf16=torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available())
    # One progress bar, that of the training; transformers warns about its own deprecations.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    main(*parser.parse_args_and_config())
