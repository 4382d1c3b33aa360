"""
How often is an alarm wrong, and how often is an illness missed? Counted on hundreds of simulated runs.

    python recipes/studies/alarm_rates.py            # 1200 runs of 120 logs, a minute
    python recipes/studies/alarm_rates.py --runs 5   # only to see that it runs

Healthy runs come in twelve shapes, each of which has something that looks like an illness: a component that is met ever
more often until it is always met, gradient norms with heavy tails, answers that get shorter or longer. A sick run is a
healthy one that falls ill on the way. A share of healthy runs in which an alarm is raised is its false-alarm rate; the
share of sick runs in which the right alarm is raised is its detection rate. Both tables go to `output_dir`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from transformers import HfArgumentParser

from trl_grpo_ext.observe.alarms import AlarmDetector, make_alarms

Array = npt.NDArray[Any]
Series = dict[str, Array]
STEPS = 120
ROWS = 64  # completions of a batch


def rise(rng: Generator, start: float, end: float, steps: int = STEPS) -> Array:
    """From one value to another, along an S of random place and steepness."""
    middle, width = rng.uniform(0.2, 0.7) * steps, rng.uniform(0.05, 0.2) * steps
    share = 1 / (1 + np.exp(-(np.arange(steps) - middle) / width))
    risen: Array = start + (end - start) * (share - share[0]) / (share[-1] - share[0])
    return risen


def share_of(rng: Generator, chance: Array, rows: int = ROWS) -> Array:
    """Shares of a batch to which something happens that has these chances."""
    shares: Array = rng.binomial(rows, np.clip(chance, 0, 1)) / rows
    return shares


# Healthy runs


def learning(rng: Generator) -> Series:
    """A graded reward that rises with some noise, and all else as it should be."""
    end, noise, n = rng.uniform(0.6, 0.9), rng.uniform(0.01, 0.05), STEPS
    quality = rise(rng, rng.uniform(0.2, 0.5), end) + noise * rng.standard_normal(n)
    spread = np.exp(rng.normal(np.log(0.2), 0.2, n))
    length = 80 * rise(rng, 1, rng.uniform(0.8, 1.3)) * np.exp(rng.normal(0, 0.05, n))
    flat = rise(rng, rng.uniform(0.05, 0.2), rng.uniform(0.1, 0.35))
    return {
        "loss": rng.normal(0, 0.02, n),
        "grad_norm": np.exp(rng.normal(rng.uniform(-0.7, 1), rng.uniform(0.2, 0.5), n)),
        "entropy": rise(rng, 1.6, rng.uniform(0.3, 1.8)) * np.exp(rng.normal(0, 0.05, n)),
        "kl": rise(rng, 1e-3, rng.uniform(0.02, 0.3)) * np.exp(rng.normal(0, 0.2, n)),
        "reward": quality,
        "reward_std": spread,
        "rewards/quality/mean": quality,
        "rewards/quality/std": spread,
        "completions/mean_length": length,
        "completions/clipped_ratio": share_of(rng, np.full(n, rng.uniform(0, 0.25))),
        "reward_clip/frac": rng.uniform(0.08, 0.15, n),
        "rollouts/flat_high": share_of(rng, flat * rng.uniform(0.3, 1), 8),
        "rollouts/flat_low": share_of(rng, 0.3 - flat / 2, 8),
        "advantage/mean": rng.normal(0, 1e-8, n),
        "advantage/abs_mean": rng.uniform(0.5, 0.8, n),
        "clip_ratio/region_mean": rng.uniform(0, 0.05, n),
        "updates/without_effect": np.zeros(n),
        **sampled_by_vllm(rng.spawn(1)[0]),
    }


def sampled_by_vllm(rng: Generator) -> Series:
    """Log-probabilities of an engine in half precision: they differ a little, by more as the policy sharpens."""
    level = np.exp(rng.normal(np.log(0.01), 0.5))
    return {
        "sampling/sampling_logp_difference/mean": level
        * rise(rng, 1, rng.uniform(0.7, 2))
        * np.exp(rng.normal(0, rng.uniform(0.05, 0.3), STEPS)),
        "sampling/importance_sampling_ratio/mean": 1 - rng.uniform(0, 0.2) + rng.normal(0, 0.05, STEPS),
    }


def saturating(rng: Generator) -> Series:
    """Components that end where they cannot get better: a format that is kept, a fault that is gone, a safe task."""
    run = learning(rng)
    rows = int(rng.choice([8, 16, 64, 256]))
    run["rewards/format/mean"] = share_of(rng, rise(rng, rng.uniform(0.1, 0.6), 1 + rng.uniform(0, 0.2)), rows)
    run["rewards/fault/mean"] = share_of(rng, rise(rng, rng.uniform(0.2, 0.6), -rng.uniform(0, 0.2)), rows)
    run["rewards/harmless/mean"] = np.ones(STEPS)
    if rng.random() < 0.5:
        run["rewards/graded/mean"] = np.minimum(2.0, rise(rng, 0.5, 2.5) + rng.normal(0, 0.05, STEPS))
    return run


def heavy_tails(rng: Generator) -> Series:
    """Gradient norms of which now and then one is many times the usual one."""
    run, n = learning(rng), STEPS
    tails: list[Callable[[], Array]] = [
        lambda: np.exp(rng.normal(0, rng.uniform(0.9, 1.2), n)),
        lambda: np.abs(rng.standard_t(rng.uniform(2, 3), n)),
        lambda: rng.pareto(rng.uniform(2, 3), n) + 1,
        lambda: np.exp(rng.normal(0, 0.3, n)) * np.where(rng.random(n) < 0.02, rng.uniform(5, 15, n), 1),
    ]
    run["grad_norm"] = tails[rng.integers(4)]() * rng.uniform(0.5, 3)
    return run


def shorter(rng: Generator) -> Series:
    """Answers that shed what nobody asked for: a half to a fifth of their length."""
    run = learning(rng)
    run["completions/mean_length"] = 300 * rise(rng, 1, 1 / rng.uniform(2, 5)) * np.exp(rng.normal(0, 0.08, STEPS))
    return run


def longer(rng: Generator) -> Series:
    """Answers that take the room to reason: up to two and a half times their length."""
    run = learning(rng)
    run["completions/mean_length"] = 100 * rise(rng, 1, rng.uniform(1.3, 2.5)) * np.exp(rng.normal(0, 0.05, STEPS))
    return run


def noisy_kl(rng: Generator) -> Series:
    """A KL that grows by a factor of a hundred, with noise that outlives a log."""
    run, level, noise = learning(rng), 0.0, []
    memory, size = rng.uniform(0, 0.7), rng.uniform(0.4, 0.9)
    for shock in rng.standard_normal(STEPS):
        level = memory * level + size * shock * np.sqrt(1 - memory**2)
        noise.append(level)
    run["kl"] = rise(rng, rng.uniform(1e-3, 0.02), rng.uniform(0.05, 0.5)) * np.exp(noise)
    return run


def curriculum(rng: Generator) -> Series:
    """Prompts that get harder in three stages, at each of which the reward falls and flat groups change sides."""
    run, n = learning(rng), STEPS
    stage = np.minimum(2, np.arange(n) * 3 // n)
    within = (np.arange(n) * 3 % n) / n
    quality = 0.8 - 0.2 * stage + 0.15 * within + rng.normal(0, 0.03, n)
    run["reward"] = run["rewards/quality/mean"] = quality
    run["reward_std"] = run["rewards/quality/std"] = (0.1 + 0.08 * stage) * np.exp(rng.normal(0, 0.2, n))
    run["rollouts/flat_high"] = share_of(rng, 0.4 - 0.15 * stage, 8)
    run["rollouts/flat_low"] = share_of(rng, 0.05 + 0.15 * stage, 8)
    run["completions/mean_length"] *= 1 + 0.4 * stage
    run["grad_norm"] *= 1 + within
    return run


def small_batches(rng: Generator) -> Series:
    """Eight completions in one or two groups, so that every share is coarse and often 0 or 1."""
    run, n, rows = learning(rng), STEPS, 8
    groups = int(rng.integers(1, 3))
    right = share_of(rng, rise(rng, rng.uniform(0.2, 0.4), rng.uniform(0.6, 0.8)), rows)
    run["reward"] = run["rewards/right/mean"] = right
    del run["rewards/quality/mean"], run["rewards/quality/std"]
    run["reward_std"] = run["rewards/right/std"] = np.sqrt(right * (1 - right) * rows / (rows - 1))
    run["rollouts/flat_high"] = share_of(rng, np.full(n, rng.uniform(0.05, 0.3)), groups)
    run["rollouts/flat_low"] = share_of(rng, np.full(n, rng.uniform(0.05, 0.3)), groups)
    run["completions/clipped_ratio"] = share_of(rng, np.full(n, rng.uniform(0, 0.25)), rows)
    run["completions/mean_length"] *= np.exp(rng.normal(0, 0.3, n))
    run["grad_norm"] *= np.exp(rng.normal(0, 0.5, n))
    run["rewards/rare/mean"] = share_of(rng, np.full(n, rng.uniform(0.03, 0.2)), rows)
    return run


def groups_of_one(rng: Generator) -> Series:
    """One completion for each prompt, and a baseline below the batch, so that advantages lean to one side."""
    run = learning(rng)
    run["rollouts/flat_high"] = run["rollouts/flat_low"] = np.zeros(STEPS)
    run["baseline/mean"] = run["reward"] - rng.uniform(0.3, 0.6) * run["reward_std"]
    run["advantage/mean"] = rng.normal(0.5, 0.1, STEPS)
    return run


def several_tasks(rng: Generator, rows: int = ROWS) -> Series:
    """Two to four tasks that differ in level, scale, difficulty and length; each learns or stays where it is."""
    run, n = learning(rng), STEPS
    shares = rng.dirichlet(np.full(int(rng.integers(2, 5)), 3.0))
    for number, share in enumerate(shares):
        own, scale, level = max(2, round(share * rows)), 10 ** rng.uniform(-1, 1), rng.uniform(-2, 2)
        groups = max(1, own // 8)
        path = rise(rng, 0.0, rng.choice([0.0, rng.uniform(0.3, 1.5)]))  # in standard deviations of the task
        run[f"tasks/{number}/reward"] = scale * (level + path + rng.standard_normal(n) / np.sqrt(own))
        run[f"tasks/{number}/reward_std"] = scale * np.exp(rng.normal(0, 0.15, n))
        run[f"tasks/{number}/informative"] = share_of(
            rng, rise(rng, rng.uniform(0.4, 1), rng.uniform(0.25, 0.9)), groups
        )
        run[f"tasks/{number}/truncated"] = share_of(rng, np.full(n, rng.uniform(0, 0.3)), own)
    run["reward"] = sum(s * run[f"tasks/{number}/reward"] for number, s in enumerate(shares))
    parts = {"rollouts/informative": "informative", "completions/clipped_ratio": "truncated"}
    for whole, metric in parts.items():
        run[whole] = sum(s * run[f"tasks/{number}/{metric}"] for number, s in enumerate(shares))
    return run


def small_tasks(rng: Generator) -> Series:
    """The same with sixteen completions a batch, so that a task has one group or two in it."""
    return several_tasks(rng, rows=16)


def dropout(rng: Generator) -> Series:
    """An adapter with dropout, which vLLM does not have: they differ from the first update on."""
    run = learning(rng)
    grown = rng.uniform(0.01, 0.06) * (1 - np.exp(-np.arange(STEPS) / rng.uniform(10, 80)))
    run["sampling/sampling_logp_difference/mean"] = 1e-5 + grown * np.exp(rng.normal(0, 0.2, STEPS))
    return run


HEALTHY: dict[str, Callable[[Generator], Series]] = {
    "learning": learning,
    "components that saturate": saturating,
    "heavy-tailed gradients": heavy_tails,
    "answers get shorter": shorter,
    "answers get longer": longer,
    "noisy KL": noisy_kl,
    "curriculum": curriculum,
    "small batches": small_batches,
    "groups of one": groups_of_one,
    "several tasks": several_tasks,
    "several small tasks": small_tasks,
    "dropout": dropout,
}

# Sick runs: the metrics from the log on at which the illness begins. `t` counts logs since then.


def ramp(t: Array, logs: float) -> Array:
    return np.minimum(1.0, t / logs)


def hacking(rng: Generator, run: Series, t: Array) -> Series:
    """The reward climbs, and answers run to where the limit is, or shrink to almost nothing."""
    length = run["completions/mean_length"][: len(t)].mean()
    factor = rng.uniform(4, 8) if rng.random() < 0.6 else 1 / rng.uniform(9, 20)
    path = length * np.exp(np.log(factor) * ramp(t, rng.uniform(10, 40))) * np.exp(rng.normal(0, 0.05, len(t)))
    return {"completions/mean_length": path, "reward": run["reward"][-len(t) :] + 0.5 * ramp(t, 30)}


def bursting(rng: Generator, run: Series, t: Array) -> Series:
    """One batch that tears at the weights, a norm that stays high, or one that grows without end."""
    norms = run["grad_norm"][-len(t) :].copy()
    usual = np.median(run["grad_norm"])
    kind = rng.integers(3)
    if kind == 0:
        norms[0] = max(30.0, 40 * usual)
    elif kind == 1:
        norms *= rng.uniform(20, 100)
    else:
        norms *= np.exp(np.minimum(t * np.log(rng.uniform(1.3, 2)), 12))
    return {"grad_norm": np.maximum(norms, 1.1) if kind else norms}


def dying(rng: Generator, run: Series, t: Array) -> Series:
    """A component whose service fails, that was never met, or that gives the same to all."""
    kind = rng.integers(3)
    if kind == 0:
        return {"rewards/quality/mean": np.zeros(len(t)), "rewards/quality/std": np.zeros(len(t))}
    return {"rewards/new/mean": np.full(len(t), 0.0 if kind == 1 else rng.uniform(0.1, 40))}


def flat_task(rng: Generator, run: Series, t: Array) -> Series:
    """A task of which nearly nothing teaches any more, while the others go on."""
    return {"tasks/0/informative": share_of(rng, np.full(len(t), rng.uniform(0, 0.05)), 8)}


def falling_task(rng: Generator, run: Series, t: Array) -> Series:
    """A task that is forgotten, by one to two of its standard deviations, while the reward of the run rises."""
    scale = run["tasks/0/reward_std"].mean()
    fall = rng.uniform(1, 2) * ramp(t, rng.uniform(5, 30))
    reward = run["reward"][: len(t)].mean() + np.abs(run["reward"]).mean() * (1 + ramp(t, 30))
    return {"tasks/0/reward": run["tasks/0/reward"][-len(t) :] - scale * fall, "reward": reward}


def stale(rng: Generator, run: Series, t: Array) -> Series:
    """What vLLM samples is the policy's of long ago, from which the policy moves away, fast first."""
    gap = rng.uniform(0.3, 1.5) * (t + 1) ** rng.uniform(0.5, 1) / STEPS ** rng.uniform(0.5, 0.7)
    return {"sampling/sampling_logp_difference/mean": gap * np.exp(rng.normal(0, rng.uniform(0.05, 0.2), len(t)))}


def cut(rng: Generator, run: Series, t: Array) -> Series:
    """Ratios that are masked beyond their cap, or stay at it."""
    ratio = rng.uniform(0, 0.4) if rng.random() < 0.7 else rng.uniform(1.7, 3)
    return {"sampling/importance_sampling_ratio/mean": np.maximum(0, ratio + rng.normal(0, 0.03, len(t)))}


SICK: dict[str, Callable[[Generator, Series, Array], Series]] = {
    "all_correct": lambda rng, run, t: {"rollouts/flat_high": share_of(rng, np.full(len(t), rng.uniform(0.8, 1)), 8)},
    "all_wrong": lambda rng, run, t: {"rollouts/flat_low": share_of(rng, np.full(len(t), rng.uniform(0.8, 1)), 8)},
    "reward_std_spike": lambda rng, run, t: {"reward_std": run["reward_std"][-len(t) :] * rng.uniform(8, 50)},
    "reward_hacking": hacking,
    "kl_spike": lambda rng, run, t: {"kl": run["kl"][-len(t) :] * rng.uniform(15, 100) + 0.1},
    "gradient_spike": bursting,
    "entropy_collapse": lambda rng, run, t: {"entropy": 1.6 * np.exp(-ramp(t, 20) * rng.uniform(2.8, 6))},
    "ratio_clipping": lambda rng, run, t: {"clip_ratio/region_mean": rng.uniform(0.35, 0.7, len(t))},
    "reward_clipping": lambda rng, run, t: {"reward_clip/frac": rng.uniform(0.35, 0.7, len(t))},
    "truncated": lambda rng, run, t: {"completions/clipped_ratio": share_of(rng, np.full(len(t), rng.uniform(0.7, 1)))},
    "nan_loss": lambda rng, run, t: {"grad_norm": np.full(len(t), np.nan)},
    "dead_reward": dying,
    "advantage_bias": lambda rng, run, t: {"advantage/mean": rng.choice([-1, 1]) * rng.uniform(0.1, 0.4, len(t))},
    "nothing_trained": lambda rng, run, t: {"updates/without_effect": np.arange(1, len(t) + 1) * 1.0},
    "flat_task": flat_task,
    "falling_task": falling_task,
    "truncated_task": lambda rng, run, t: {
        "tasks/0/truncated": share_of(rng, np.full(len(t), rng.uniform(0.8, 1)), 16)
    },
    "sampling_mismatch": lambda rng, run, t: {
        "sampling/sampling_logp_difference/mean": rng.uniform(0.15, 3) * np.exp(rng.normal(0, 0.1, len(t)))
    },
    "sampling_ratios": cut,
    "stale_engine": stale,
}


def sick(name: str, rng: Generator) -> tuple[Series, int]:
    """A run that falls ill between its 30th and its 70th log, and that log."""
    make = several_tasks if name.endswith("_task") else learning
    run, onset = make(rng), int(rng.integers(30, 70))
    for metric, values in SICK[name](rng, run, np.arange(STEPS - onset)).items():
        before = run.get(metric, np.empty(0))[:onset]
        run[metric] = np.concatenate([before if before.size else np.full(onset, np.nan), values])
    return run, onset


def alarms_of(run: Series) -> dict[str, int]:
    """The alarms that a run raises, each with the log at which it was raised first."""
    detector = AlarmDetector(make_alarms())
    raised: dict[str, int] = {}
    for step in range(STEPS):
        # What is NaN from the start is a metric that is not there yet.
        logs = {
            name: float(values[step])
            for name, values in run.items()
            if np.isfinite(values[step]) or np.isfinite(values[0])
        }
        for event in detector.update(logs):
            if event.state == "raised":
                raised.setdefault(event.alarm.name, step)
    return raised


def false_alarms(runs: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of the healthy runs of each shape in which each alarm is raised."""
    rates: dict[str, dict[str, float]] = {}
    for number, (shape, make) in enumerate(HEALTHY.items()):
        raised = [alarms_of(make(np.random.default_rng([seed, number, run]))) for run in range(runs)]
        rates[shape] = {name: sum(name in found for found in raised) / runs for name in SICK}
    return rates


def detections(runs: int, seed: int) -> dict[str, tuple[float, float]]:
    """Share of the sick runs in which the alarm of the illness is raised, and the median of the logs until then."""
    found: dict[str, tuple[float, float]] = {}
    for number, name in enumerate(SICK):
        delays = []
        for run in range(runs):
            logs, onset = sick(name, np.random.default_rng([seed, 100 + number, run]))
            step = alarms_of(logs).get(name, -1)
            delays += [step - onset] if step >= onset else []
        found[name] = (len(delays) / runs, float(np.median(delays)) if delays else float("nan"))
    return found


@dataclass
class Options:
    runs: int = field(default=40, metadata={"help": "Runs of each shape and of each illness."})
    seed: int = field(default=0, metadata={"help": "Of the simulation."})
    output_dir: str = field(default="runs/alarm_rates", metadata={"help": "Where the tables go."})


def main(options: Options) -> None:
    rates, found = false_alarms(options.runs, options.seed), detections(options.runs, options.seed)
    lines = ["| alarm | false alarms, all shapes | worst shape | detected | logs until then |", "| --- " * 5 + "|"]
    for name, (share, delay) in found.items():
        worst = max(rates, key=lambda shape: rates[shape][name])
        mean = float(np.mean([rates[shape][name] for shape in rates]))
        where = f"{rates[worst][name]:.0%} ({worst})" if mean > 0 else ""
        lines.append(f"| `{name}` | {mean:.1%} | {where} | {share:.0%} | {delay:.0f} |")
    print("\n".join(lines))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
