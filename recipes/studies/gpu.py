"""
Right and fast on this GPU? Each check against stock TRL in the same run, one line each, written after each.

    python recipes/studies/gpu.py --part correct   # about 4 minutes on one GPU
    python recipes/studies/gpu.py --part speed     # about 4 minutes
    python recipes/studies/gpu.py --smoke          # both in miniature, on a CPU

Models have random weights, so nothing is downloaded. Writes `gpu.json` and `gpu.md` to `output_dir`, with the device,
the driver and the versions. Checks for which no time is left are listed as such; started again, the study goes on with
them. Exits with 1 if a check failed.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from compute import peak_memory, update, word_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.host.calls import own_copy

ROOT = Path(__file__).parents[2]
ON = {"share_prompts": True, "skip_zero_advantage": True}
LAUNCHERS = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")
# Name -> hidden size, inner size, layers, heads, heads of keys, vocabulary.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "small": (256, 512, 4, 4, 2, 4096),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),  # of Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
}
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}  # of gradients, relative to their norm


@dataclass(frozen=True)
class Workload:
    """Completions of the update: `spread` is the deviation of the logarithm of their lengths, 0 for equal ones."""

    prompt: int
    completion: int
    group: int = 8
    rows: int = 32
    spread: float = 0.0
    flat: float = 0.0  # share of groups without a difference in reward
    checkpointing: bool = True  # TRL's default
    shape: str = "0.5B"
    goal: float = 1.0  # most of stock's time
    has_step: bool = False  # whether generation is timed too

    def __str__(self) -> str:
        lengths = f"to {self.completion}" if self.spread else f"{self.completion}"
        text = f"{self.shape}, {self.prompt}/{lengths}, {self.group} a prompt"
        text += f", {self.flat:.0%} flat" if self.flat else ""
        return text if self.checkpointing else f"{text}, no checkpointing"


WORKLOADS = [
    Workload(256, 64, goal=0.4, has_step=True),
    Workload(512, 1024, spread=0.7, goal=0.6),
    Workload(256, 64, checkpointing=False, goal=0.4),
    Workload(256, 64, group=16, goal=0.4),
    Workload(512, 1024, group=16, spread=0.7, goal=0.6),
    Workload(256, 64, flat=0.5, goal=0.4),
    Workload(512, 1024, spread=0.7, flat=0.5, goal=0.6),
    Workload(32, 256),  # short prompts, for which sharing saves least
    Workload(256, 64, shape="1.5B", goal=0.4),
]
MINIATURE = [Workload(32, 8, rows=16, shape="tiny", has_step=True), Workload(32, 16, rows=16, spread=0.7, shape="tiny")]


@dataclass
class Options:
    """Where to compute, and for how long."""

    device: str
    output_dir: Path
    minutes: float
    smoke: bool
    started: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.started)


# Models and trainers


def make_model(shape: str, dtype: str, attention: str) -> PreTrainedModel:
    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation=attention,
    )
    return Qwen2ForCausalLM(config).to(getattr(torch, dtype))


def make_trainer(
    options: Options,
    workload: Workload,
    ours: dict[str, Any] | None,
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    lora: bool = False,
    **overrides: Any,
) -> Any:
    """A trainer of stock TRL where `ours` is `None`, else of this package with these options."""
    vocabulary = SHAPES[workload.shape][-1]
    torch.manual_seed(0)
    prompts = torch.randint(2, vocabulary, (max(1, workload.rows // workload.group), workload.prompt))
    data = {"prompt": [" ".join(f"w{token}" for token in row) for row in prompts.tolist()]}

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids[0] % 7) for ids in completion_ids]

    given: dict[str, Any] = {
        "output_dir": str(options.output_dir / "trainer"),
        "per_device_train_batch_size": workload.rows,
        "num_generations": workload.group,
        "max_completion_length": workload.completion,
        "gradient_checkpointing": workload.checkpointing,
        "bf16": dtype == "bfloat16" and options.device == "cuda",
        "use_cpu": options.device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-4,
        "max_steps": 3,
        **overrides,
        **(ours or {}),
    }
    trainer: Any = (GRPOTrainer if ours is None else AdaptiveGRPOTrainer)(
        model=make_model(workload.shape, dtype, attention),
        reward_funcs=reward,
        args=(GRPOConfig if ours is None else AdaptiveGRPOConfig)(**given),
        train_dataset=Dataset.from_dict(data),
        processing_class=word_tokenizer(vocabulary),
        peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollouts_of(workload: Workload, device: Any) -> dict[str, torch.Tensor]:
    """Rollouts as TRL's loss takes them, of random tokens, with lengths and advantages as the workload says."""
    vocabulary = SHAPES[workload.shape][-1]
    draws = torch.Generator().manual_seed(1)
    rows = workload.rows
    prompts = torch.randint(2, vocabulary, (rows // workload.group, workload.prompt), generator=draws)
    spread = (workload.spread * torch.randn(rows, generator=draws) - workload.spread).exp()
    lengths = (workload.completion * spread).long().clamp(4, workload.completion)
    lengths[0] = workload.completion  # one reaches the end, as TRL pads to the longest
    mask = torch.arange(workload.completion) < lengths[:, None]
    ids = torch.randint(2, vocabulary, (rows, workload.completion), generator=draws)
    advantages = torch.randn(rows, generator=draws)
    advantages[: int(workload.flat * rows)] = 0.0
    made = {
        "prompt_ids": prompts.repeat_interleave(workload.group, 0),
        "prompt_mask": torch.ones(rows, workload.prompt, dtype=torch.long),
        "completion_ids": ids.masked_fill(~mask, 0),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(device) for name, value in made.items()}


def gradient_of(trainer: Any, rollouts: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.model.zero_grad()
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(trainer.model, rollouts)
    loss.backward()
    return torch.cat([p.grad.float().flatten().cpu() for p in trainer.model.parameters() if p.grad is not None])


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten().cpu() for p in trainer.model.parameters()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    relative: torch.Tensor = (one - other).norm() / one.norm().clamp(min=1e-12)
    return relative.item()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Correctness


def same_gradient(options: Options, dtype: str, attention: str, lora: bool) -> dict[str, Any]:
    """Gradient of the same rollouts with sharing and skipping, against stock."""
    shape = "tiny" if options.smoke else "small"
    workload = Workload(40, 24, rows=16, spread=0.7, flat=0.5, checkpointing=False, shape=shape)
    stock = make_trainer(options, workload, None, dtype, "sdpa" if attention == "flex_attention" else attention, lora)
    ours = make_trainer(options, workload, ON, dtype, attention, lora)
    ours.model.load_state_dict(stock.model.state_dict())
    rollouts = rollouts_of(workload, stock.accelerator.device)
    error = distance(gradient_of(stock, rollouts), gradient_of(ours, rollouts))
    if ours.num_not_sharing:
        return {"error": "prompts were not shared, as the log says"}
    return {"value": error, "limit": LARGEST_ERROR[dtype]}


def same_as_stock(options: Options) -> dict[str, Any]:
    """Weights after three steps with nothing switched on; and how far two runs of stock TRL are apart."""
    workload = Workload(16, 8, rows=16, shape="tiny")
    trained = []
    methods: tuple[dict[str, Any] | None, ...] = (None, None, {})
    for ours in methods:
        trainer = make_trainer(options, workload, ours, "float32", seed=3)
        trainer.train()
        trained.append(weights_of(trainer))
    noise = distance(trained[0], trained[1])
    return {"value": distance(trained[0], trained[2]), "limit": noise, "note": f"two runs of stock: {noise:.1e}"}


def same_samples(options: Options, dtype: str) -> dict[str, Any]:
    """Share of greedy completions that differ where prompts are read once."""
    workload = Workload(64, 32, rows=16, shape="tiny" if options.smoke else "small", checkpointing=False)
    found = []
    methods: tuple[dict[str, Any], ...] = ({}, {"share_prompts": True})
    for ours in methods:
        trainer = make_trainer(options, workload, ours, dtype, generation_kwargs={"do_sample": False})
        rows = [row for row in trainer.train_dataset for _ in range(workload.group)]
        found.append(trainer._prepare_inputs([own_copy(row) for row in rows]))
    # TRL shuffles the rows. All rows of a prompt are equal.
    plain, shared = (sorted(torch.cat([m["prompt_ids"], m["completion_ids"]], 1).tolist()) for m in found)
    differs = sum(one != other for one, other in zip(plain, shared, strict=True)) / len(plain)
    # In half precision, two tokens may tie: then all that follows differs.
    return {"value": differs, "limit": 0.0 if dtype == "float32" else 0.25}


def same_after_resuming(options: Options) -> dict[str, Any]:
    """Weights of a run resumed from its second step of four, with features on, against the run that went through."""
    workload = Workload(16, 8, rows=16, group=4, shape="tiny")
    features = {"group_size": "variance", "curriculum": "online", **ON}
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        saving: dict[str, Any] = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        for resume in (None, f"{folder}/checkpoint-2"):
            trainer = make_trainer(options, workload, features, "float32", **saving)
            trainer.train(resume_from_checkpoint=resume)
            ends.append(weights_of(trainer))
    return {"value": distance(*ends), "limit": 0.0 if options.device == "cpu" else 1e-5}


def launched(options: Options, name: str) -> dict[str, Any]:
    """`recipes/check.py` on one process of FSDP2 or DeepSpeed."""
    package = "deepspeed" if name.startswith("deepspeed") else "torch"
    if options.device == "cpu":
        return {"error": "not run: needs a GPU"}
    try:
        version(package)
    except PackageNotFoundError:
        return {"error": f"not run: {package} is not installed"}
    config = str(ROOT / "recipes/configs/accelerate" / f"{name}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
    command += [str(ROOT / "recipes/check.py"), "--checks", "ranks", "sharing", "--tolerance", "0.05"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=max(10, min(120, options.seconds_left())))
    lines = (found.stdout.strip() or found.stderr.strip()).splitlines()
    return {"value": float(found.returncode), "limit": 0.0, "note": lines[-1][:120] if lines else ""}


def checks_of(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    checks: dict[str, Callable[[], dict[str, Any]]] = {"off equals stock": partial(same_as_stock, options)}
    attentions = ["sdpa", "eager"] if options.smoke else ["sdpa", "eager", "flex_attention"]
    for attention in attentions:
        for dtype in ["float32"] if options.smoke else ["float32", "bfloat16"]:
            for lora in (False, True):
                name = f"gradient, {attention}, {dtype}, {'LoRA' if lora else 'full'}"
                checks[name] = partial(same_gradient, options, dtype, attention, lora)
    for dtype in ["float32"] if options.smoke else ["float32", "bfloat16"]:
        checks[f"greedy samples, shared prompts, {dtype}"] = partial(same_samples, options, dtype)
    checks["resumed run"] = partial(same_after_resuming, options)
    for name in LAUNCHERS:
        checks[name] = partial(launched, options, name)
    return checks


# Speed


def timed(options: Options, call: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times.append(time.perf_counter() - start)
    return median(times)


def cost_of(options: Options, workload: Workload, ours: dict[str, Any] | None, attention: str) -> dict[str, float]:
    """Seconds of the update and of the whole step, and memory in MB at the peak of an update."""
    trainer = make_trainer(options, workload, ours, "bfloat16" if options.device == "cuda" else "float32", attention)
    trainer.model.to(trainer.accelerator.device)
    rollouts = rollouts_of(workload, trainer.accelerator.device)
    call = partial(update, trainer, rollouts)
    repeats = 2 if options.smoke else 5
    call()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = {"update": timed(options, call, repeats)}
    used = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else peak_memory()
    found["memory"] = used
    if workload.has_step:
        found["step"] = timed(options, partial(whole_step, trainer, workload), 2)
    del trainer, rollouts, call
    free()
    return found


def whole_step(trainer: Any, workload: Workload) -> None:
    """Sample, score, forward and backward. Random weights hardly ever end a completion: all are as long as they may."""
    rows = [own_copy(row) for row in trainer.train_dataset for _ in range(workload.group)]
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, rows, None)


def compare_speed(options: Options, workload: Workload) -> dict[str, Any]:
    """Stock, nothing on, and sharing and skipping with each attention."""
    methods: dict[str, tuple[dict[str, Any] | None, str]] = {"stock": (None, "sdpa"), "off": ({}, "sdpa")}
    methods["on"] = (ON, "sdpa")
    if options.device == "cuda":
        methods["on, flex_attention"] = (ON, "flex_attention")
    costs: dict[str, dict[str, float]] = {}
    notes = []
    for name, (ours, attention) in methods.items():
        try:
            costs[name] = cost_of(options, workload, ours, attention)
        except Exception as error:  # such as too little memory: that is a result too
            notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            free()
    base = costs.get("stock", {})
    ratios = {
        name: {kind: value / base[kind] for kind, value in cost.items() if kind in base}
        for name, cost in costs.items()
        if name != "stock"
    }
    value = min((r["update"] for name, r in ratios.items() if name.startswith("on")), default=float("inf"))
    told = {"costs": costs, "ratios": ratios, "note": "; ".join(notes)}
    return {"value": value, "limit": workload.goal, **told} if not options.smoke else {"value": 0, "limit": 0, **told}


# Results


def machine(options: Options) -> dict[str, str]:
    packages = ("torch", "transformers", "trl", "accelerate", "peft")
    about = {name: version(name) for name in packages} | {"python": platform.python_version()}
    about["device"] = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()})"
    if options.device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        about["cuda"] = str(torch.version.cuda)
    return about


def verdict(result: dict[str, Any]) -> str:
    if "error" in result:
        return "-" if result["error"].startswith("not run") else "FAILED"
    return "ok" if result["value"] <= result["limit"] else "FAILED"


def page_of(about: dict[str, str], results: dict[str, dict[str, Any]]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    checks = {name: result for name, result in results.items() if "ratios" not in result}
    speeds = {name: result for name, result in results.items() if "ratios" in result}
    if checks:
        lines += ["| check | | value | at most | |", "| --- | --- | --- | --- | --- |"]
        for name, result in checks.items():
            numbers = [f"{result[key]:.1e}" if key in result else "" for key in ("value", "limit")]
            note = result.get("error", result.get("note", ""))
            lines.append(f"| {name} | {verdict(result)} | {' | '.join(numbers)} | {note} |")
        lines.append("")
    if speeds:
        lines += ["| workload | options | update | step | peak memory |", "| --- | --- | --- | --- | --- |"]
        for name, result in speeds.items():
            for method, ratios in result["ratios"].items():
                cells = [f"{ratios[kind]:.2f}" if kind in ratios else "-" for kind in ("update", "step", "memory")]
                lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
            if result["note"]:
                lines.append(f"| {name} | {result['note']} | | | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("correct", "speed", "all"), default="all", help="what to run")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which no further check is begun")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), help="where to write")
    parser.add_argument("--smoke", action="store_true", help="a miniature, on a CPU")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    device = "cpu" if given.smoke or not torch.cuda.is_available() else "cuda"
    folder = given.output_dir / "smoke" if given.smoke else given.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    options = Options(device, folder, given.minutes, given.smoke)
    todo = checks_of(options) if given.part != "speed" else {}
    if given.part != "correct":
        workloads = MINIATURE if given.smoke else WORKLOADS
        todo |= {str(workload): partial(compare_speed, options, workload) for workload in workloads}
    about, file = machine(options), folder / "gpu.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Any]] = before.get("results", {}) if before.get("machine") == about else {}
    for name, check in todo.items():
        if name in results:
            continue
        if options.seconds_left() <= 0:
            print(f"-      {name}: not run, no time left", flush=True)
            continue
        start = time.monotonic()
        try:
            results[name] = check()
        except Exception as error:  # the others shall run all the same
            results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        free()
        result = results[name] = {**results[name], "seconds": round(time.monotonic() - start, 1)}
        value = f"{result['value']:.2e} (at most {result['limit']:.2e})" if "value" in result else result["error"]
        print(f"{verdict(result):6} {name}: {value}, {result['seconds']} s {result.get('note', '')}", flush=True)
        file.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        (folder / "gpu.md").write_text(page_of(about, results))
    print(f"\n{page_of(about, results)}\nWritten to {folder}")
    return int(any(verdict(result) == "FAILED" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
