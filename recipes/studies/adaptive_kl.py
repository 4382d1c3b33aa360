"""
Does adaptive β hold the KL? Fixed β against `kl_target`, from a start that is too small and one that is too large.

    python recipes/studies/adaptive_kl.py            # 2 targets x 2 starts x 5 seeds, and fixed β from each start
    python recipes/studies/adaptive_kl.py --smoke    # only to see that it runs

The tiny model (85k parameters) of `skills.py` is warm-started once per seed and trained on `translate`. The KL is the
one that TRL logs, in nats per token; a run has settled if its mean over the last quarter of the steps is within 25 % of
the target. Writes `curves.csv` (a row per step), `table.md` and `adaptive_kl.png` to `output_dir`.
"""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

from datasets import Dataset
from metering import append, read, spread
from skills import MAX_COMPLETION, accuracy, as_dataset, is_right, make_examples, make_tokenizer, warm_start
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.recipe.tiny import tiny_model

TOLERANCE = 0.25


@dataclass
class Options:
    seeds: int = field(default=5, metadata={"help": "Number of seeds: first_seed, first_seed + 1, ..."})
    first_seed: int = field(default=0, metadata={"help": "Seed 100 was used to choose all of the below."})
    targets: list[float] = field(default_factory=lambda: [0.03, 0.1], metadata={"help": "KL to hold."})
    betas: list[float] = field(default_factory=lambda: [0.1, 5.0], metadata={"help": "β at the start."})
    horizon: float = field(default=640.0, metadata={"help": "Time constant, in rollouts: 10 steps."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    rows: int = field(default=64, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Constant."})
    warm_start_steps: int = field(default=350, metadata={"help": "Steps of supervised training."})
    output_dir: str = field(default="runs/adaptive_kl", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "One seed, one target, 4 steps."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.seeds, self.targets, self.steps, self.warm_start_steps = 1, self.targets[:1], 4, 10


def train(
    target: float | None,
    beta: float,
    seed: int,
    model: str,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    options: Options,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Train from the model in a folder, from which TRL loads the reference as well. Returns model and logs."""
    extra: dict[str, Any] = {} if target is None else {"kl_target": target, "kl_horizon": options.horizon}
    args = AdaptiveGRPOConfig(
        output_dir=options.output_dir,
        beta=beta,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=options.rows,
        num_generations=8,
        max_completion_length=MAX_COMPLETION,
        max_steps=options.steps,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **extra,
    )
    trainer = AdaptiveGRPOTrainer(
        model=model, reward_funcs=is_right, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


def last_quarter(values: list[float]) -> float:
    return fmean(values[-max(len(values) // 4, 1) :])


def make_table(curves: list[dict[str, str]]) -> str:
    """Markdown, a row per target and start: median and range over the seeds, and how many of them settled."""
    columns = ["target", "β at the start", "KL, last quarter", "of the target", "settled", "single steps within 25 %"]
    columns += ["β at the end", "accuracy"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for target, start in dict.fromkeys((c["target"], c["start"]) for c in curves):
        rows = [c for c in curves if (c["target"], c["start"]) == (target, start)]
        runs = [[c for c in rows if c["seed"] == seed] for seed in dict.fromkeys(c["seed"] for c in rows)]
        kl = [last_quarter([float(c["kl"]) for c in run]) for run in runs]
        cells = [target, start, spread(kl, 4), "", "", ""]
        if target != "fixed":

            def is_near(value: float, target: float = float(target)) -> bool:
                return abs(value / target - 1) <= TOLERANCE

            steps = [last_quarter([is_near(float(c["kl"])) for c in run]) for run in runs]
            ratios = spread([value / float(target) for value in kl], 2)
            cells[3:] = [ratios, f"{sum(map(is_near, kl))} of {len(kl)}", spread(steps, 2)]
        cells += [spread([float(run[-1]["beta"]) for run in runs], 3)]
        cells += [spread([float(run[-1]["accuracy"]) for run in runs], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(curves: list[dict[str, str]], path: Path) -> None:
    """KL and β against steps, medians and ranges over the seeds; a column per target, with the fixed runs in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets = [t for t in dict.fromkeys(c["target"] for c in curves) if t != "fixed"]
    starts = list(dict.fromkeys(c["start"] for c in curves))
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito
    figure, axes = plt.subplots(
        2, len(targets), figsize=(6 * len(targets), 7), squeeze=False, sharex=True, sharey="row"
    )
    for column, target in enumerate(targets):
        for number, start in enumerate(starts):
            for kind, line in ((target, "-"), ("fixed", ":")):
                rows = [c for c in curves if (c["target"], c["start"]) == (kind, start)]
                steps = sorted({int(c["step"]) for c in rows})
                for axis, name in zip(axes[:, column], ("kl", "beta"), strict=True):
                    points = [[float(c[name]) for c in rows if int(c["step"]) == step] for step in steps]
                    label = f"β from {start}, {'adaptive' if kind == target else 'fixed'}"
                    axis.plot(steps, [median(p) for p in points], line, color=colors[number % 4], label=label)
                    if kind == target:
                        low, high = [min(p) for p in points], [max(p) for p in points]
                        axis.fill_between(steps, low, high, color=colors[number % 4], alpha=0.15)
        value = float(target)
        axes[0, column].axhspan((1 - TOLERANCE) * value, (1 + TOLERANCE) * value, color="#999999", alpha=0.3)
        axes[0, column].set_title(f"target {target} ± {TOLERANCE:.0%}")
        axes[1, column].set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("KL to the reference (nats per token)")
    axes[1, 0].set_ylabel("β")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: Options) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.csv").unlink(missing_ok=True)
    tokenizer = make_tokenizer()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        held_out = make_examples({"translate": 256}, seed=1_000_000 + seed)
        exclude = frozenset(example.prompt for example in held_out)
        model = warm_start(tiny_model(tokenizer, seed), tokenizer, exclude, seed, options.warm_start_steps)
        start = str(folder / "warm_start")
        model.save_pretrained(start)
        dataset = as_dataset(make_examples({"translate": 512}, seed, exclude))
        for target in [None, *options.targets]:
            for beta in options.betas:
                trained, logs = train(target, beta, seed, start, tokenizer, dataset, options)
                result = {"target": "fixed" if target is None else target, "start": beta, "seed": seed}
                result["accuracy"] = accuracy(trained, tokenizer, held_out)
                kl = last_quarter([entry["kl"] for entry in logs])
                print(f"{result} kl {kl:.4f}, β {logs[-1].get('beta', beta):.4f}", flush=True)
                for entry in logs:
                    row = {"step": entry["step"], "kl": entry["kl"], "beta": entry.get("beta", beta)}
                    append(folder / "curves.csv", result | row)
    curves = read(folder / "curves.csv")
    table = make_table(curves)
    (folder / "table.md").write_text(table)
    plot(curves, folder / "adaptive_kl.png")
    print(table)


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
