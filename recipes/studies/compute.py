"""
What a training step costs, against stock TRL on the same rollouts: time and peak memory.

    python recipes/studies/compute.py

compares `trl.GRPOTrainer` with `AdaptiveGRPOTrainer`, all options off, and `share_prompts`, `skip_zero_advantage` and
`merge_adapter` on, for a model of the shape of SmolLM2-135M with random weights: LoRA of rank 16, 16 rows, groups of 8,
completions of 48 tokens, fp32. Nothing is downloaded. Methods take turns, so that a ratio compares neighbours in time;
peak memory is measured in a process of its own for each. Writes `results.csv`, `table.md` and `compute.png` to
`output_dir`; what is already in `results.csv` is not measured again. Time is best measured on a machine with nothing
else to do.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.observe.report.figures import COLORS

ROWS, GROUP, COMPLETION = 16, 8, 48
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
ON = {"share_prompts": True, "skip_zero_advantage": True, "merge_adapter": True}
METHODS = {"stock": None, "off": {}, "on": ON}
WORKLOADS = {  # name -> length of the prompts, share of flat groups
    "prompt 64": (64, 0.0),
    "prompt 256": (256, 0.0),
    "prompt 64, half flat": (64, 0.5),
}
PARTS = {"time": ("update", "step"), "memory": ("memory",)}  # part -> kinds of its results


def methods_of(workload: str) -> list[str]:
    """All, where the workload is the plain one: switched off, options cost the same everywhere."""
    return [method for method in METHODS if method != "off" or workload == "prompt 64"]


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words `w2`, `w3`, ..., one token each."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_trainer(method: str, workload: str, shape: dict[str, int], folder: str) -> GRPOTrainer:
    """A trainer whose every step samples `ROWS` completions of `COMPLETION` tokens."""
    length, flat = WORKLOADS[workload]
    tokenizer = word_tokenizer(shape["vocab_size"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, **shape))
    prompts = torch.randint(2, shape["vocab_size"], (ROWS // GROUP, length))
    is_flat = [i < flat * len(prompts) for i in range(len(prompts))]
    data = {"prompt": [" ".join(f"w{t}" for t in row) for row in prompts.tolist()], "is_flat": is_flat}

    def reward(completion_ids: list[list[int]], is_flat: list[bool], **kwargs: Any) -> list[float]:
        return [0.0 if flat else float(ids[0] % 7) for ids, flat in zip(completion_ids, is_flat, strict=True)]

    options: Any = METHODS[method]
    args = (GRPOConfig if options is None else AdaptiveGRPOConfig)(
        output_dir=folder,
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=COMPLETION,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **(options or {}),
    )
    trainer = (GRPOTrainer if options is None else AdaptiveGRPOTrainer)(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.rows = [row for row in trainer.train_dataset for _ in range(GROUP)]
    return trainer


def step(trainer: GRPOTrainer) -> None:
    """Sample, score, forward and backward."""
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, trainer.rows, None)


def update(trainer: GRPOTrainer, rollouts: dict[str, torch.Tensor]) -> None:
    """Forward and backward on given rollouts."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, rollouts).backward()


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Largest resident memory of this process in MB, since `clear_refs` was written."""
    status = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM")) / 1024


def peak(method: str, workload: str, shape: dict[str, int]) -> dict[str, float]:
    """Memory in MB at the peak of an update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, workload, shape, folder)
        rollouts = trainer._prepare_inputs(trainer.rows)
        update(trainer, rollouts)  # gradients and caches are there from the first on
        Path("/proc/self/clear_refs").write_text("5")
        update(trainer, rollouts)
        return {"peak": peak_memory()}


def measure(workload: str, shape: dict[str, int], repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {method: make_trainer(method, workload, shape, folder) for method in methods_of(workload)}
        rollouts = trainers["stock"]._prepare_inputs(trainers["stock"].rows)
        for trainer in trainers.values():
            update(trainer, rollouts)  # warm up
        gradients = [
            torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None]) for t in trainers.values()
        ]
        error = ((gradients[-1] - gradients[0]).norm() / gradients[0].norm()).item()
        say(f"{workload}: relative difference of the gradients {error:.1e}")
        results = []
        for repeat in range(repeats):
            for kind, arguments in (("update", (rollouts,)), ("step", ())):
                call = update if arguments else step
                times = {method: seconds(partial(call, trainer, *arguments)) for method, trainer in trainers.items()}
                say(f"{workload}, {kind} {repeat}: " + ", ".join(f"{m} {v:.2f} s" for m, v in times.items()))
                for method, value in times.items():
                    ratio = value / times["stock"]
                    results.append(
                        {
                            "workload": workload,
                            "method": method,
                            "kind": kind,
                            "repeat": repeat,
                            "value": value,
                            "ratio": ratio,
                        }
                    )
    return results


def measure_memory(workload: str, smoke: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    results = []
    for method in methods_of(workload):
        command = [sys.executable, __file__, "--peak", method, workload, *(["--smoke"] if smoke else [])]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        results.append({"workload": workload, "method": method, **found})
    base = results[0]["peak"]
    for result in results:
        say(f"{workload}, {result['method']}: {result['peak']:.0f} MB at the peak of an update")
    return [
        {
            "workload": workload,
            "method": result["method"],
            "kind": "memory",
            "repeat": 0,
            "value": result["peak"],
            "ratio": result["peak"] / base,
        }
        for result in results
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """What an earlier run measured."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{**row, "value": float(row["value"]), "ratio": float(row["ratio"])} for row in csv.DictReader(file)]


def table(results: list[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in results))
    lines = ["| workload | options | " + " | ".join(kinds) + " |", "| --- " * (2 + len(kinds)) + "|"]
    for workload in dict.fromkeys(row["workload"] for row in results):
        for method in methods_of(workload)[1:]:
            cells = []
            for kind in kinds:
                ratios = [
                    row["ratio"]
                    for row in results
                    if (row["workload"], row["method"], row["kind"]) == (workload, method, kind)
                ]
                spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
                cells.append(f"{median(ratios):.2f}{spread}" if ratios else "-")
            lines.append(f"| {workload} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(row["kind"] for row in results))
    workloads = list(dict.fromkeys(row["workload"] for row in results))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.6), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for offset, (method, label) in enumerate({"off": "all options off", "on": "all options on"}.items()):
            for x, workload in enumerate(workloads):
                if method not in methods_of(workload):
                    continue
                ratios = [
                    r["ratio"] for r in results if (r["workload"], r["method"], r["kind"]) == (workload, method, kind)
                ]
                if not ratios:
                    continue
                middle = median(ratios)
                axis.bar(x + 0.4 * offset, middle, 0.38, color=COLORS[offset], label=label if x == 0 else None)
                axis.vlines(x + 0.4 * offset, min(ratios), max(ratios), color="black")
                axis.text(x + 0.4 * offset, max(ratios) + 0.02, f"{middle:.2f}", ha="center", fontsize=8)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(
            [x + 0.2 for x in range(len(workloads))], [w.replace(", ", ",\n") for w in workloads], fontsize=8
        )
        axis.set_title(
            {"update": "time of the update", "step": "time of the step", "memory": "peak memory"}.get(kind, kind)
        )
    axes[0].set_ylabel("ratio to stock TRL")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/compute", help="where to write")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and the first workload")
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "WORKLOAD"), help="measure the memory of one and stop")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    shape = SMALL if options.smoke else SMOLLM2
    if options.peak:
        method, workload = options.peak
        print(json.dumps(peak(method, workload, shape)))
        return
    folder = Path(options.output_dir) / ("smoke" if options.smoke else "")  # another model: no row of the table
    folder.mkdir(parents=True, exist_ok=True)
    results = read(folder / "results.csv")
    say = partial(print, flush=True)
    for workload in list(WORKLOADS)[:1] if options.smoke else WORKLOADS:
        for part in options.parts:
            if any(row["workload"] == workload and row["kind"] in PARTS[part] for row in results):
                continue
            if part == "time":
                results += measure(workload, shape, options.repeats, say)
            else:
                results += measure_memory(workload, options.smoke, say)
            with (folder / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(results[0]))
                writer.writeheader()
                writer.writerows(results)
    (folder / "table.md").write_text(table(results) + "\n")
    plot(results, folder / "compute.png")
    print(f"\n{table(results)}\n\nWritten to {folder}")


if __name__ == "__main__":
    main()
