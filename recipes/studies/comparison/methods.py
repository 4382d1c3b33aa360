"""The methods, and one training by each of them: the same start, prompts and reward, up to a budget of completions."""

import resource
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from metering import Evaluator, Meter
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, CriticBaseline
from trl_grpo_ext.config import EFFICIENT
from trl_grpo_ext.host.engine import engine_for_cpu

from .replay import ReplayTrainer
from .sampling import ask, sample

if TYPE_CHECKING:
    from .smollm2 import SmolTask
    from .tiny import TinyTask


@dataclass(frozen=True)
class Method:
    """A trainer and its options. `tuned_as` names the method whose learning rate it takes, if not its own."""

    trainer: type = AdaptiveGRPOTrainer
    config: type = AdaptiveGRPOConfig
    options: dict[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None
    has_critic: bool = False


STOCK = "GRPO (TRL)"
ALL = {"group_size": "variance", "curriculum": "online", "dynamic_sampling_rounds": 1}
ALL |= {"reward_clip_quantiles": [0.05, 0.95], "share_prompts": True, "skip_zero_advantage": True}
BATCH = {"group_size": "variance", "curriculum": "online", "scale_rewards": "batch"}
SINGLE = {"group_size": "single", "scale_rewards": "batch"}
PAIRS = {"group_size": "fixed", "num_generations": 2, "baseline": "shrunk"}
HELPFUL = {"group_size": "variance", "min_group_size": 2, "max_group_size": 8, "reward_clip_quantiles": [0.05, 0.95]}
HELPFUL |= {"curriculum": "staged", "difficulty_column": "difficulty"}
HELPFUL |= {"share_prompts": True, "skip_zero_advantage": True}
RECIPE = {"baseline": "shrunk", "baseline_shift": 0.5, "num_iterations": 2, "reuse_drift_limit": 0.05}
RECIPE |= {"task_column": "kind", "task_advantages": True, "scale_rewards": "batch"}
RECIPE |= {"reward_clip_quantiles": [0.05, 0.95], "share_prompts": True, "skip_zero_advantage": True}
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1}
# Of RLOO, TRL's default is a KL of 0.05; without one, all but DPO optimise the same objective.
METHODS = {
    "PPO": Method(has_critic=True),
    "DPO": Method(DPOTrainer, DPOConfig),
    "RLOO": Method(RLOOTrainer, RLOOConfig, {"beta": 0.0}),
    STOCK: Method(GRPOTrainer, GRPOConfig),
    "threshold sizes": Method(options={"group_size": "threshold"}),
    "variance sizes": Method(options={"group_size": "variance"}),
    "dynamic sampling": Method(options={"dynamic_sampling_rounds": 1}),
    "online curriculum": Method(options={"curriculum": "online"}),
    "reward clipping": Method(options={"reward_clip_quantiles": [0.05, 0.95]}),
    "shared compute": Method(options={"share_prompts": True, "skip_zero_advantage": True}, tuned_as=STOCK),
    "variance + online": Method(options={"group_size": "variance", "curriculum": "online"}),
    "all together": Method(options=ALL),
    # Advantages divided by the standard deviation of the batch, not of the group.
    "GRPO (TRL), batch scale": Method(GRPOTrainer, GRPOConfig, {"scale_rewards": "batch"}, tuned_as=STOCK),
    "variance + online, batch scale": Method(options=BATCH, tuned_as="variance + online"),
    # Each completion against the others of its group alone, so that small groups weigh no less.
    "variance + online, leave one out": Method(
        options=BATCH | {"baseline": "leave_one_out"}, tuned_as="variance + online, batch scale"
    ),
    "helpful.yaml": Method(options=HELPFUL),
    # Further passes over each batch.
    "GRPO (TRL), 2 passes": Method(GRPOTrainer, GRPOConfig, {"num_iterations": 2}),
    "GRPO (TRL), 4 passes": Method(GRPOTrainer, GRPOConfig, {"num_iterations": 4}),
    "PPO, 2 passes": Method(options={"num_iterations": 2}, has_critic=True),
    # The preset efficient.yaml, and what is left of it without each of its parts.
    "efficient": Method(options=EFFICIENT),
    "efficient, two passes": Method(options=EFFICIENT | {"num_iterations": 2, "reuse_drift_limit": None}),
    "efficient, one pass": Method(options=EFFICIENT | {"num_iterations": 1, "reuse_drift_limit": None}),
    "efficient, without guard": Method(options=EFFICIENT | {"reuse_drift_limit": None}),
    "efficient, without shift": Method(options=EFFICIENT | {"baseline_shift": 0.0}),
    "efficient, by tokens": Method(options=EFFICIENT | {"token_weighted_baseline": True}),
    "efficient, batch mean": Method(options=EFFICIENT | {"baseline": "batch"}),
    "efficient, without choosing": Method(options=EFFICIENT | {"curriculum": "none"}),
    "efficient, pairs": Method(options=EFFICIENT | PAIRS),
    # Two passes over a batch, and one over each of the two before it; with another limit, twice as far from them.
    "efficient, replay": Method(ReplayTrainer, options=EFFICIENT),
    "efficient, replay, drift 0.2": Method(ReplayTrainer, options=EFFICIENT | {"reuse_drift_limit": 0.2}),
    "efficient, four passes and replay": Method(ReplayTrainer, options=EFFICIENT | {"num_iterations": 6}),
    "single, batch mean": Method(options=SINGLE | {"baseline": "batch"}),
    "single, guess": Method(options=SINGLE | {"baseline": "predicted"}, tuned_as="single, batch mean"),
    "pairs, shrunk": Method(options=PAIRS | {"scale_rewards": "batch"}, tuned_as="single, batch mean"),
    # What recipes/configs/helpful.yaml has now: a low baseline, two passes, a scale for each kind of prompt.
    "helpful recipe": Method(options=RECIPE, tuned_as="single, batch mean"),
}


def train(task: "TinyTask | SmolTask", cell: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """
    Train by the method of a cell and measure.

    Args:
        task ([`TinyTask`] or [`SmolTask`]):
            Where the policy, the prompts, the reward and the measurements come from.
        cell (`dict`):
            `method`, `pool`, `seed`, `learning_rate`, `rollouts` (the budget), `rows` (of a step), `num_generations`,
            `eval_every`.
        output_dir (`str`):
            Of the trainers, which write nothing into it.

    Returns:
        `dict`:
            Curve of rollouts, prompts, held-out helpfulness and held-out reward, final scores, what was spent, and what
            was held in memory.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    task.policy()  # once for each seed, a warm start, which is not part of the time
    set_seed(cell["seed"])
    wall, cpu = time.monotonic(), time.process_time()
    meter = Meter(task.reward, task.helpfulness)

    evaluator = Evaluator(meter, task.look, cell["eval_every"], cell["rollouts"])
    run = _dpo if METHODS[cell["method"]].trainer is DPOTrainer else _online
    trainer, critic = run(task, cell | {"output_dir": output_dir}, meter, evaluator)
    result = {
        "curve": [[n, p, *values] for (n, values), p in zip(evaluator.curve, evaluator.prompts, strict=True)],
        "rollouts": meter.rollouts,
        "prompts": meter.prompts,
        "informative_share": meter.informative_share(0),
        "cpu_seconds": time.process_time() - cpu - evaluator.seconds,
        "wall_seconds": time.monotonic() - wall,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    trained = [model for model in (trainer.model, critic and critic.value_model) if model is not None]
    result["models"] = len(trained) + (getattr(trainer, "ref_model", None) is not None)
    result["trained_parameters"] = sum(p.numel() for model in trained for p in model.parameters() if p.requires_grad)
    result["final"] = task.final(trainer.accelerator.unwrap_model(trainer.model))
    return result


def _online(
    task: "TinyTask | SmolTask", cell: dict[str, Any], meter: Meter, evaluator: TrainerCallback
) -> tuple[Trainer, CriticBaseline | None]:
    method = METHODS[cell["method"]]
    args = method.config(
        **_arguments(cell),
        per_device_train_batch_size=cell["rows"],
        max_completion_length=task.max_completion_length,
        temperature=task.temperature,
        max_steps=cell["rollouts"] // cell["rows"] * method.options.get("num_iterations", 1),
        **{"num_generations": cell["num_generations"], **method.options, **(VLLM if cell.get("use_vllm") else {})},
    )
    critic = CriticBaseline() if method.has_critic else None
    with engine_for_cpu(args):
        trainer = method.trainer(
            model=task.policy(),
            reward_funcs=meter,
            args=args,
            train_dataset=task.dataset(cell["pool"]),
            processing_class=task.tokenizer,
            callbacks=[evaluator, *([critic] if critic else [])],
            peft_config=task.peft_config,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, critic


def _dpo(
    task: "TinyTask | SmolTask", cell: dict[str, Any], meter: Meter, evaluator: Evaluator
) -> tuple[Trainer, CriticBaseline | None]:
    """Spend the whole budget on samples of the base policy, then train on the best and the worst of each group."""
    evaluator.look(task.policy())
    pairs = sample_pairs(task, task.dataset(cell["pool"]), meter, cell)
    args = DPOConfig(
        **_arguments(cell),
        per_device_train_batch_size=max(1, cell["rows"] // 2),  # pairs: as many rows as the others have in a step
        max_length=None,
    )
    trainer = DPOTrainer(
        model=task.policy(),
        ref_model=None if task.peft_config else task.policy(),  # with LoRA: the policy without its adapter
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=task.tokenizer,
        peft_config=task.peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    evaluator.look(trainer.model)
    return trainer, None


def sample_pairs(
    task: "TinyTask | SmolTask", dataset: Dataset, meter: Meter, cell: dict[str, Any]
) -> list[dict[str, Any]]:
    """
    Best and worst of each group by the reward, from the base policy's own samples; a group without a best has no pair.

    Prompts are walked in shuffled epochs until the budget is spent.
    """
    model, size = task.policy(), cell["num_generations"]
    pairs: list[dict[str, Any]] = []
    order: list[int] = []
    for _ in range(cell["rollouts"] // cell["rows"]):
        if len(order) < cell["rows"] // size:
            order += torch.randperm(len(dataset)).tolist()
        chosen, order = order[: cell["rows"] // size], order[cell["rows"] // size :]
        rows = dataset.select([i for i in chosen for _ in range(size)])
        ids = sample(model, task.tokenizer, list(rows["prompt"]), task.max_completion_length, batch_size=len(rows))
        rewards = ask(meter, rows, ids, task.tokenizer)
        texts = task.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for start in range(0, len(rows), size):
            group = range(start, start + size)
            best, worst = max(group, key=rewards.__getitem__), min(group, key=rewards.__getitem__)
            if rewards[best] > rewards[worst]:
                pairs.append(_pair(rows[start]["prompt"], texts[best], texts[worst]))
    return pairs


def _pair(prompt: str | list[dict[str, Any]], chosen: str, rejected: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    turns = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": prompt, **dict(zip(("chosen", "rejected"), turns, strict=True))}


def _arguments(cell: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": cell["output_dir"],
        "learning_rate": cell["learning_rate"],
        "lr_scheduler_type": cell.get("lr_scheduler_type", "constant"),
        "seed": cell["seed"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }
