"""
Train a model to answer helpfully, harmlessly and briefly.

    accelerate launch recipes/helpful.py

trains SmolLM2-135M-Instruct with LoRA on 192 questions, with adaptive group size, reward clipping and an easy-to-hard
curriculum, and compares its answers to 48 held-out questions before and after. Everything is set in
`recipes/configs/helpful.yaml`. With a hub and a GPU, the same script scales:

    accelerate launch recipes/helpful.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name my/questions --reward_model_name_or_path my/reward-model \
        --per_device_train_batch_size 64 --num_generations 8 --max_completion_length 256 --max_steps 500

A dataset has a column `prompt`; `reference` is needed without a reward model, and `difficulty` by the curriculum
(`--curriculum online` needs none).
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
from trl_grpo_ext.evaluation import HeldOutCallback, print_comparison
from trl_grpo_ext.live import LiveCallback
from trl_grpo_ext.models import resolve_model
from trl_grpo_ext.report import write_report
from trl_grpo_ext.rewards import Harmlessness, Length, Relevance, RewardModel


@dataclass
class HelpfulArguments:
    dataset_name: str = field(
        default="helpful", metadata={"help": "'helpful' (shipped), a local file, or a dataset on the hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split."})
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model for helpfulness. Without it: similarity to the column `reference`."},
    )
    harmlessness_weight: float = field(default=0.5, metadata={"help": "Weight of harmlessness; helpfulness has 1."})
    length_weight: float = field(default=0.001, metadata={"help": "What a token costs."})


def main(script_args: HelpfulArguments, training_args: AdaptiveGRPOConfig, model_args: ModelConfig) -> None:
    source = resolve_model(model_args.model_name_or_path)
    prompts = load_prompts(
        script_args.dataset_name,
        config=script_args.dataset_config,
        train_split=script_args.dataset_train_split,
        test_split=script_args.dataset_test_split,
    )
    if script_args.reward_model_name_or_path:
        helpfulness = RewardModel(script_args.reward_model_name_or_path).named("helpfulness")
    else:
        helpfulness = Relevance("reference").named("helpfulness")
    reward = 1.0 * helpfulness + script_args.harmlessness_weight * Harmlessness() - script_args.length_weight * Length()
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
        train_dataset=prompts["train"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LiveCallback)
    say = trainer.accelerator.print
    say(f"Model:   {source.origin}")
    say(f"Prompts: {len(prompts['train'])} to train on, {len(prompts['test'])} held out ({script_args.dataset_name})")
    say(f"Reward:  {reward}")

    held_out = HeldOutCallback(trainer, prompts["test"], reward)
    trainer.add_callback(held_out)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        print_comparison(held_out.before, held_out.after)
        report = write_report(training_args.output_dir)
        print(f"Model saved to {training_args.output_dir}, report of the run to {report}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if "--config" not in sys.argv:
        sys.argv += ["--config", str(Path(__file__).parent / "configs" / "helpful.yaml")]
    parser = TrlParser((HelpfulArguments, AdaptiveGRPOConfig, ModelConfig))
    # Without a GPU: TRL trains in bfloat16 by default, which most CPUs only emulate, and there is no memory to pin.
    parser.set_defaults_with_config(bf16=torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available())
    # One view, that of the training; transformers warns about its own deprecations.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    main(*parser.parse_args_and_config())
