"""
Does the package work on this machine, with this launcher? A few steps for each check, and one line about it.

    accelerate launch -m trl_grpo_ext.recipe.check
    accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml -m trl_grpo_ext.recipe.check
    accelerate launch -m trl_grpo_ext.recipe.check --attn_implementation flex_attention
    accelerate launch -m trl_grpo_ext.recipe.check --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --use_vllm true --vllm_mode colocate

Takes every option of `AdaptiveGRPOConfig` and of TRL's `ModelConfig`. Without a model, a tiny one with random weights
is made, so nothing is downloaded. Exits with 1 if a check failed. `docs/gpu.md` says what to expect.
"""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOTrainer, ModelConfig

from ..config import AdaptiveGRPOConfig
from ..hooks import GRPOCallback, RolloutBatch
from ..host.engine import engine_for_cpu, one_engine
from ..host.processes import leave
from ..trainer.adaptive import AdaptiveGRPOTrainer
from .flags import FlagParser
from .tiny import tiny_model, tiny_tokenizer

CHECKS = ("stock", "ranks", "sharing", "resume")
FEATURES: dict[str, Any] = {
    "group_size": "variance",
    "curriculum": "online",
    "dynamic_sampling_rounds": 1,
    "reward_clip_quantiles": [0.05, 0.95],
}


@dataclass
class Options:
    checks: list[str] = field(
        default_factory=lambda: list(CHECKS),
        metadata={
            "help": "Which: 'stock' (with nothing on, the weights are those of TRL), 'ranks' (all processes see the "
            "same batches), 'sharing' (shared prompts give the same log-probabilities and gradient), 'resume' (a "
            "resumed run ends with the weights of one that was not interrupted)."
        },
    )
    tolerance: float = field(
        default=1e-3, metadata={"help": "Largest difference that is rounding; half precision needs more, such as 0.05."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.checks) - set(CHECKS))
        if unknown:
            raise ValueError(f"checks={unknown} are unknown: use some of {', '.join(CHECKS)}")


class Record(GRPOCallback):
    """A digest of every batch as this process saw it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        prompts = None if batch.prompt_index is None else batch.prompt_index.tolist()
        seen = (prompts, batch.group_sizes.tolist(), batch.rewards.tolist(), batch.advantages.tolist())
        self.digest.update(repr(seen).encode())


class Keeper(AdaptiveGRPOTrainer):
    """Keeps the last micro-batch."""

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.kept = inputs
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def kept_log_probs(self, share: bool) -> torch.Tensor:
        self.args.share_prompts = share
        ids = torch.cat([self.kept["prompt_ids"], self.kept["completion_ids"]], dim=1)
        mask = torch.cat([self.kept["prompt_mask"], self.kept["completion_mask"]], dim=1)
        width = self.kept["completion_ids"].size(1)
        with torch.no_grad():
            log_probs = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)[0]
        masked: torch.Tensor = log_probs * self.kept["completion_mask"]
        return masked.float().cpu()

    def kept_gradient(self, share: bool) -> torch.Tensor:
        self.args.share_prompts = share
        model = self.accelerator.unwrap_model(self.model).train()
        model.zero_grad()
        with self.accelerator.autocast():
            loss = self._compute_loss(model, self.kept)
        loss.backward()
        return torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids[0] % 3) for ids in completion_ids]


def weights(trainer: Any) -> torch.Tensor:
    """All weights as one vector, on the CPU of the main process at least, also where they are sharded."""
    state = trainer.accelerator.get_state_dict(trainer.model) or {}
    return torch.cat([torch.zeros(1), *(state[name].detach().float().cpu().flatten() for name in sorted(state))])


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    relative: torch.Tensor = (one - other).norm() / one.norm().clamp(min=1e-12)
    return relative.item()


class Check:
    """Trains, compares, and says what came of it."""

    def __init__(self, options: Options, args: AdaptiveGRPOConfig, model_args: ModelConfig):
        self.tolerance, self.args, self.failed = options.tolerance, args, 0
        self.is_main = PartialState().is_main_process
        # The main process's; several nodes need a shared file system.
        self.folder = broadcast_object_list([tempfile.mkdtemp() if self.is_main else ""])[0]
        if self.is_main:
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.source = model_args.model_name_or_path or os.path.join(self.folder, "model")
        if self.is_main and not model_args.model_name_or_path:
            tokenizer = tiny_tokenizer(["<eos>", *map(chr, range(32, 127))])
            tokenizer.save_pretrained(self.source)
            # Heads of 32: vLLM on a CPU has kernels for no smaller ones.
            tiny_model(tokenizer, hidden_size=128, max_position_embeddings=2048).save_pretrained(self.source)
        PartialState().wait_for_everyone()
        self.init = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}

    def train(
        self, name: str, trainer_class: type[GRPOTrainer] = Keeper, resume: str | None = None, **overrides: Any
    ) -> Any:
        """A trainer after its last step, and its [`Record`] in `record`."""
        options: Any = {"output_dir": os.path.join(self.folder, name), "generation_batch_size": None, **overrides}
        options["model_init_kwargs"] = {**self.init, **(self.args.model_init_kwargs or {})}
        args = replace(self.args, **options)
        dataset = Dataset.from_dict({"prompt": [f"What comes to mind when you hear {i}? " for i in range(64)]})
        record = Record()
        callbacks = [] if trainer_class is GRPOTrainer else [record]
        trainer: Any = trainer_class(self.source, reward, args, dataset, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        trainer.record = record
        return trainer

    def report(self, what: str, value: float, bound: float) -> None:
        """Print and count on the main process, whose number it is."""
        if self.is_main:
            self.failed += not value <= bound
            print(f"{'ok' if value <= bound else 'FAILED':6} {what}: {value:.1e} (at most {bound:.0e})", flush=True)

    def stock(self) -> None:
        theirs = weights(self.train("stock", GRPOTrainer))
        self.report(
            "weights against stock TRL, nothing on", difference(theirs, weights(self.train("off"))), self.tolerance
        )

    def ranks(self) -> None:
        digests = gather_object([self.train("ranks", **FEATURES).record.digest.hexdigest()])
        others = sum(digest != digests[0] for digest in digests)
        self.report(f"processes that saw other batches than the first of {len(digests)}", others, 0)

    def sharing(self) -> None:
        trainer = self.train("sharing", share_prompts=True)
        self.report("models that do not share prompts, as the log says", trainer.num_not_sharing, 0)
        apart, shared = trainer.kept_log_probs(False), trainer.kept_log_probs(True)
        self.report("log-probabilities of shared prompts", (apart - shared).abs().max().item(), self.tolerance)
        if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # whose gradients are sharded
            apart, shared = trainer.kept_gradient(False), trainer.kept_gradient(True)
            self.report("gradient of shared prompts", difference(apart, shared), self.tolerance)

    def resume(self) -> None:
        saving = {**FEATURES, "save_strategy": "steps", "save_steps": 2}
        whole = weights(self.train("whole", **saving))
        again = weights(self.train("again", resume=os.path.join(self.folder, "whole", "checkpoint-2"), **saving))
        self.report("weights after resuming", difference(whole, again), self.tolerance)


def run(options: Options, args: AdaptiveGRPOConfig, model_args: ModelConfig) -> int:
    """Run the checks, and return the exit code: 1 where one failed."""
    logging.disable_progress_bar()
    check = Check(options, args, model_args)
    with engine_for_cpu(args), one_engine():
        for name in options.checks:
            getattr(check, name)()
    if check.is_main:
        print(f"{check.failed} failed" if check.failed else "all ok")
    leave()
    return int(check.failed > 0)


def main(flags: Sequence[str] | None = None) -> int:
    """Run the checks that the flags name; by default, those of the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    prog = None if flags is None else "trl-grpo-ext machine"  # as a command of the console
    parser = FlagParser((Options, AdaptiveGRPOConfig, ModelConfig), prog=prog)
    parser.set_defaults_with_config(
        output_dir="unused",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=4,
        learning_rate=1e-3,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        vllm_gpu_memory_utilization=0.3 if torch.cuda.is_available() else 0.1,
    )
    return run(*parser.parse(flags))


if __name__ == "__main__":
    sys.exit(main())
