"""
Does it help? Stock `trl.GRPOTrainer` against `AdaptiveGRPOTrainer` where only a quarter of the prompts teaches.

    python recipes/studies/mixed_pool.py            # 2 pools x 6 methods x 5 seeds
    python recipes/studies/mixed_pool.py --smoke    # only to see that it runs

A tiny model (85k parameters) is warm-started by supervision, once per seed, and then trained by each method from the
same weights, with the same rows per step, learning rate and total of rollouts; rollouts that are thrown away count.
Of the 512 prompts of the pool `mixed`, a quarter asks for `greet` (mastered from the start), half are `hopeless`, and a
quarter asks for `translate` (half learnt); the pool `easy` is all `translate`. Everything is measured outside of the
trainers: in the reward function, through which every rollout passes, and by a callback. Writes `results.csv` (a row per
run, as it ends), `curves.csv`, `table.md` and `mixed_pool.png` to `output_dir`.
"""

import copy
import functools
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for a second thread to help

from datasets import Dataset
from metering import OKABE_ITO, Evaluator, Meter, append, read, spread
from skills import MAX_COMPLETION, Example, accuracy, as_dataset, is_right, make_examples, make_tokenizer
from skills import warm_start as warm_started
from transformers import HfArgumentParser, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.config import EFFICIENT
from trl_grpo_ext.recipe.tiny import tiny_model

STOCK = "stock TRL"
METHODS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "threshold sizes": {"group_size": "threshold"},
    "variance sizes": {"group_size": "variance"},
    "dynamic sampling": {"dynamic_sampling_rounds": 1},
    "online curriculum": {"curriculum": "online"},
    "variance + online": {"group_size": "variance", "curriculum": "online"},
    "efficient": EFFICIENT,
    "efficient, without choosing": EFFICIENT | {"curriculum": "none"},
}
POOLS = {"mixed": {"greet": 1 / 4, "hopeless": 1 / 2, "translate": 1 / 4}, "easy": {"translate": 1.0}}


@dataclass
class Options:
    seeds: int = field(default=5, metadata={"help": "Number of seeds: first_seed, first_seed + 1, ..."})
    first_seed: int = field(default=0, metadata={"help": "Seeds 100 and 101 were used to choose the learning rate."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all methods, constant: where stock does best."})
    rollouts: int = field(default=11520, metadata={"help": "Budget of one run, discarded rollouts included."})
    rows: int = field(default=64, metadata={"help": "Rows per step."})
    num_generations: int = field(default=8, metadata={"help": "Group size of stock TRL, mean group size of the rest."})
    pool_size: int = field(default=512, metadata={"help": "Prompts per pool."})
    held_out: int = field(default=256, metadata={"help": "Held-out prompts of `translate`."})
    warm_start: int = field(default=350, metadata={"help": "Steps of supervised training."})
    targets: list[float] = field(default_factory=lambda: [0.85, 0.9], metadata={"help": "Accuracies to count up to."})
    eval_every: int = field(default=320, metadata={"help": "Rollouts between two evaluations."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which methods."})
    pools: list[str] = field(default_factory=lambda: list(POOLS), metadata={"help": "Which pools."})
    output_dir: str = field(default="runs/mixed_pool", metadata={"help": "Where the results go."})
    smoke: bool = field(default=False, metadata={"help": "One seed and a budget of 4 steps."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.seeds, self.rollouts, self.eval_every, self.warm_start = 1, 4 * self.rows, 2 * self.rows, 10


def train(
    method: str,
    dataset: Dataset,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Example],
    seed: int,
    options: Options,
) -> tuple[Meter, list[tuple[int, float]], float]:
    """Train a copy of the model by one method. Returns what was recorded, the curve, and CPU seconds of training."""
    recorder = Meter(is_right)
    measure = functools.partial(accuracy, tokenizer=tokenizer, examples=held_out)
    evaluator = Evaluator(recorder, measure, options.eval_every, options.rollouts)
    config_class, trainer_class = GRPOConfig, GRPOTrainer
    if method != STOCK:
        config_class, trainer_class = AdaptiveGRPOConfig, AdaptiveGRPOTrainer
    args = config_class(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=options.rows,
        num_generations=options.num_generations,
        max_completion_length=MAX_COMPLETION,
        max_steps=options.rollouts // options.rows * METHODS[method].get("num_iterations", 1),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **METHODS[method],
    )
    trainer = trainer_class(
        model=copy.deepcopy(model),
        reward_funcs=recorder,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[evaluator],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return recorder, evaluator.curve, time.process_time() - start - evaluator.seconds


def make_table(results: list[dict[str, str]]) -> str:
    """Markdown, a row per pool and method; ratios to stock are taken seed by seed."""
    targets = [name for name in results[0] if name.startswith("rollouts_to")]
    columns = ["pool", "method", "informative share"]
    columns += [text for name in targets for text in (name.replace("_", " "), "of stock's")]
    columns += ["final accuracy", "CPU time of stock's"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    stock = {(r["pool"], r["seed"]): r for r in results if r["method"] == STOCK}
    for pool, method in dict.fromkeys((r["pool"], r["method"]) for r in results):
        rows = [r for r in results if (r["pool"], r["method"]) == (pool, method)]
        pairs = [(r, stock[pool, r["seed"]]) for r in rows if (pool, r["seed"]) in stock]
        cells = [spread([float(r["informative_share"]) for r in rows], 2)]
        for name in targets:
            reached = [float(r[name]) for r in rows]
            # Where stock did not get there, its whole run is counted: that makes its number too small, not too large.
            ratios = [float(r[name]) / min(float(b[name]), float(b["rollouts"])) for r, b in pairs]
            cells += [spread(reached, 0), spread(ratios, 2)]
        cells.append(spread([float(r["final_accuracy"]) for r in rows], 3))
        cells.append(spread([float(r["seconds"]) / float(b["seconds"]) for r, b in pairs], 2))
        lines.append(f"| {pool} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(curves: list[dict[str, str]], path: Path) -> None:
    """Accuracy and informative share against rollouts: medians, with the range for the first and last method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pools = list(dict.fromkeys(c["pool"] for c in curves))
    methods = list(dict.fromkeys(c["method"] for c in curves))
    figure, axes = plt.subplots(2, len(pools), figsize=(6 * len(pools), 7.5), squeeze=False, sharex=True, sharey="row")
    for column, pool in enumerate(pools):
        for number, method in enumerate(methods):
            mine = [c for c in curves if (c["pool"], c["method"]) == (pool, method)]
            by_seed = [[c for c in mine if c["seed"] == seed] for seed in dict.fromkeys(c["seed"] for c in mine)]
            points = list(zip(*by_seed, strict=False))  # the i-th evaluation of every seed
            x = [median(float(c["rollouts"]) for c in point) for point in points]
            for axis, name in zip(axes[:, column], ("accuracy", "informative_share"), strict=True):
                y = [[float(c[name]) for c in point] for point in points]
                is_main = number in (0, len(methods) - 1)
                style = {
                    "color": OKABE_ITO[number % 6],
                    "linestyle": ("-", ":", "-.", (0, (1, 1)), "--", "-")[number % 6],
                }
                axis.plot(x, [median(v) for v in y], label=method, linewidth=2.4 if is_main else 1.3, **style)
                if is_main:
                    axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=style["color"], alpha=0.15)
        axes[0, column].set_title(f"{pool} pool")
        axes[1, column].set_xlabel("rollouts, discarded ones included")
    axes[0, 0].set_ylabel("held-out accuracy")
    axes[1, 0].set_ylabel("share of rollouts in groups whose rewards differ")
    axes[0, -1].legend(loc="lower right", frameon=False)
    for axis in axes.flat:
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: Options) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "curves.csv"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = make_tokenizer()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        held_out = make_examples({"translate": options.held_out}, seed=1_000_000 + seed)
        exclude = frozenset(example.prompt for example in held_out)
        model = warm_started(tiny_model(tokenizer, seed), tokenizer, exclude, seed, options.warm_start)
        for pool in options.pools:
            counts = {skill: round(share * options.pool_size) for skill, share in POOLS[pool].items()}
            dataset = as_dataset(make_examples(counts, seed, exclude))
            for method in options.methods:
                recorder, curve, seconds = train(method, dataset, model, tokenizer, held_out, seed, options)
                cell = {"pool": pool, "method": method, "seed": seed}
                result = cell | {
                    "informative_share": recorder.informative_share(options.rollouts / 2),
                    "start_accuracy": curve[0][1],
                    "final_accuracy": curve[-1][1],
                    "rollouts": recorder.rollouts,
                    "seconds": seconds,
                }
                for target in options.targets:
                    reached = next((float(n) for n, value in curve if value >= target), float("inf"))
                    result[f"rollouts_to_{target:.0%}"] = reached
                append(folder / "results.csv", result)
                final = result["final_accuracy"]
                print(
                    f"{pool}, {method}, seed {seed}: accuracy {curve[0][1]:.3f} to {final:.3f}, {seconds:.0f} s",
                    flush=True,
                )
                window = 4 * options.eval_every
                for rollouts, value in curve[1:]:
                    share = recorder.informative_share(rollouts - window, rollouts)
                    row = {"rollouts": rollouts, "accuracy": value, "informative_share": share}
                    append(folder / "curves.csv", cell | row)
    table = make_table(read(folder / "results.csv"))
    (folder / "table.md").write_text(table)
    plot(read(folder / "curves.csv"), folder / "mixed_pool.png")
    print(table)


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
