"""From the records of cells to what is reported: a row for each run, a table of medians with ranges, plots."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import TYPE_CHECKING, Any

from metering import OKABE_ITO, append, spread

from .methods import METHODS, STOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Method -> its colour.
SHOWN = {"PPO": 5, "DPO": 1, "RLOO": 3, STOCK: 0, "variance + online": 2, "all together": 6}
SHOWN |= {"GRPO (TRL), 4 passes": 1, "PPO, 2 passes": 2, "single, batch mean": 4, "efficient": 6}
BARS = "#56B4E9"

Levels = tuple[float, float, float]  # of held-out helpfulness: to count from, up to, and further up to
Line = list[tuple[str, str]]  # name of each column, and what it says


def score(record: dict[str, Any]) -> float:
    """
    What the learning rate is chosen by: held-out helpfulness, averaged over the run, or the reward at the end where
    there is no curve. A failed or diverged run is the worst.
    """
    if "result" not in record:
        return -math.inf
    values = [point[2] for point in record["result"]["curve"][1:]]
    if all(math.isnan(value) for value in values):
        values = [record["result"]["final"]["reward"]]
    return -math.inf if any(math.isnan(value) for value in values) else mean(values)


def line_of(record: dict[str, Any]) -> str:
    """One line about a run."""
    cell = record["cell"]
    name = f"{cell['pool']}, {cell['method']}, seed {cell['seed']}, {cell['rollouts']} rollouts"
    if "error" in record:
        return f"{name}: FAILED, {record['error'].splitlines()[-1]}"
    final = ", ".join(f"{key} {value:.3f}" for key, value in record["result"]["final"].items())
    return f"{name}: {final}, {record['result']['wall_seconds']:.0f} s"


def crossing(curve: list[list[float]], level: float) -> tuple[float, float]:
    """
    Rollouts and prompts at which a curve first reaches a level, linear between its points.

    Infinite if it does not, NaN if nothing was measured on the way.

    ```python
    >>> crossing([[0, 0, 0.5], [100, 10, 0.7]], 0.6)
    (50.0, 5.0)

    ```
    """
    before = curve[0]
    for point in curve:
        if point[2] >= level:
            part = 1.0 if point[2] == before[2] else (level - before[2]) / (point[2] - before[2])
            return tuple(a + max(0.0, part) * (b - a) for a, b in zip(before[:2], point[:2], strict=True))  # type: ignore[return-value]
        before = point
    never = math.inf if before[2] == before[2] else math.nan
    return never, never


def rows_of(records: list[dict[str, Any]], levels: Levels) -> list[dict[str, Any]]:
    """A row for each pool, method and seed. Runs of one method at several budgets are the points of one curve."""
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        runs.setdefault((cell["pool"], cell["method"], cell["seed"]), []).append(record)
    rows = []
    for (pool, method, seed), own in runs.items():
        whole = max(own, key=lambda record: record["cell"]["rollouts"])
        row = {"pool": pool, "method": method, "seed": seed, "learning_rate": whole["cell"]["learning_rate"]}
        errors = [record["error"].splitlines()[-1] for record in own if "error" in record]
        row["error"] = "; ".join(errors)
        if not errors:
            curve = curve_of(own)
            (begin, _), (reached, prompts), (further, _) = (crossing(curve, level) for level in levels)
            result = whole["result"]
            names = ("informative_share", "rollouts", "prompts", "models", "trained_parameters", "peak_memory_mb")
            row |= {"between": reached - begin if reached != math.inf else math.inf}
            row |= {"to_target": reached, "to_further": further}
            row |= {"prompts_to_target": prompts, **result["final"]}
            row |= {name: result[name] for name in (*names, "cpu_seconds", "wall_seconds")}
            row |= _to_stocks_best(curve, runs.get((pool, STOCK, seed), []))
        rows.append(row)
    return rows


def _to_stocks_best(curve: list[list[float]], stock: list[dict[str, Any]]) -> dict[str, float]:
    """Rollouts to the highest helpfulness that stock GRPO measured with the same seed."""
    if not stock or any("error" in record for record in stock):
        return {}
    best = max(point[2] for point in curve_of(stock))
    return {"to_stocks_best": crossing(curve, best)[0]}


def curve_of(records: list[dict[str, Any]]) -> list[list[float]]:
    """Points of rollouts, prompts, held-out helpfulness and reward, of a run or of the ends of several budgets."""
    if len(records) == 1:
        whole: list[list[float]] = records[0]["result"]["curve"]
        return whole
    ends = [record["result"]["curve"][-1] for record in records]
    return [records[0]["result"]["curve"][0], *sorted(ends)]


def table(rows: list[dict[str, Any]], levels: Levels) -> str:
    """
    Markdown, a line for each pool and method; ratios are taken seed by seed.

    A task that has no curve has no rollouts to a level either: it is told by the reward at the end and by its cost.
    """
    with_curve = any(row["to_target"] == row["to_target"] for row in rows if not row["error"])
    lines = []
    for pool, method in dict.fromkeys((row["pool"], row["method"]) for row in rows):
        own = [row for row in rows if (row["pool"], row["method"]) == (pool, method)]
        good = [row for row in own if not row["error"]]
        errors = [row["error"] for row in own if row["error"]]
        failed = f" ({len(errors)} of {len(own)} runs failed: {errors[0]})" if errors else ""
        line = [("pool", pool), ("method", method + failed), ("learning rate", f"{own[0]['learning_rate']:g}")]
        if good and with_curve:
            line += _rollouts(good, rows, levels)
        lines.append(line + (_ends(good, rows, with_curve) if good else []))
    columns = [name for name, _ in max(lines, key=len)]
    text = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for line in lines:
        text.append("| " + " | ".join([cell for _, cell in line] + ["-"] * (len(columns) - len(line))) + " |")
    return "\n".join(text) + "\n"


def _rollouts(good: list[dict[str, Any]], rows: list[dict[str, Any]], levels: Levels) -> Line:
    start, target, further = levels
    line = [(f"rollouts {start:g} to {target:g}", spread([row["between"] for row in good], 0))]
    line.append((f"prompts to {target:g}", spread([row["prompts_to_target"] for row in good], 0)))
    for name, level in (("to_target", target), ("to_further", further)):
        line.append((f"rollouts to {level:g}", spread([row[name] for row in good], 0)))
        line += _ratios(name, good, rows)
    measured = [row for row in good if "to_stocks_best" in row]
    line.append(("rollouts to stock GRPO's best", spread([row["to_stocks_best"] for row in measured], 0)))
    return [*line, ("of stock GRPO's", _ratio("to_stocks_best", measured, rows, STOCK))]


def _ends(good: list[dict[str, Any]], rows: list[dict[str, Any]], with_curve: bool) -> Line:
    digits = {"helpfulness": 3, "harmlessness": 3, "length": 2, "pass@1": 2, "pass@16": 2}
    digits |= {"never right before": 2, "right by now": 2, "entropy": 3}
    digits |= {} if with_curve else {"reward": 3}
    line = [(name, spread([row[name] for row in good], n)) for name, n in digits.items() if name in good[0]]
    method = METHODS[good[0]["method"]]
    alone = method.has_critic or method.options.get("group_size") == "single"  # groups of one cannot differ
    line.append(("informative share", "-" if alone else spread([row["informative_share"] for row in good], 2)))
    line.append(("CPU s", spread([row["cpu_seconds"] for row in good], 0)))
    if not with_curve:
        line += _ratios("cpu_seconds", good, rows)
    line += [("models", f"{good[0]['models']:,}"), ("trained", f"{good[0]['trained_parameters']:,}")]
    return [*line, ("peak MB", f"{median(row['peak_memory_mb'] for row in good):.0f}")]


def _ratios(name: str, own: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Line:
    return [("of stock GRPO's", _ratio(name, own, rows, STOCK)), ("of PPO's", _ratio(name, own, rows, "PPO"))]


def _ratio(name: str, own: list[dict[str, Any]], rows: list[dict[str, Any]], other: str) -> str:
    base = {(row["pool"], row["seed"]): row for row in rows if row["method"] == other and not row["error"]}
    pairs = [(row, base[row["pool"], row["seed"]]) for row in own if (row["pool"], row["seed"]) in base]
    # Where the other did not get there, its whole run is counted: that makes its number too small, not too large.
    # Where it was there from the start, there is no ratio.
    ratios = [
        row[name] / (its[name] if its[name] < math.inf else its["rollouts"]) for row, its in pairs if its[name] > 0
    ]
    return spread(ratios, 2)


def tuning_table(grid: dict[str, tuple[float, dict[float, float]]]) -> str:
    """Markdown: what each learning rate scored, a line for each method."""
    rates = sorted({rate for _, scores in grid.values() for rate in scores})
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " | chosen |"]
    lines.append("|" + " --- |" * (len(rates) + 2))
    for method, (chosen, scores) in grid.items():
        cells = [f"{scores[rate]:.3f}" if rate in scores else "-" for rate in rates]
        lines.append(f"| {method} | " + " | ".join([*cells, f"{chosen:g}"]) + " |")
    return "\n".join(lines) + "\n"


def plot_curves(records: list[dict[str, Any]], target: float, path: Path) -> None:
    """Held-out helpfulness and reward against rollouts: medians and ranges over the seeds."""
    plt = _pyplot()
    records = [record for record in records if "result" in record and record["cell"]["method"] in SHOWN]
    pools = list(dict.fromkeys(record["cell"]["pool"] for record in records))
    if not pools:
        return
    figure, axes = plt.subplots(2, len(pools), figsize=(6.5 * len(pools), 8.4), squeeze=False, sharey="row")
    for column, pool in enumerate(pools):
        for method, color in SHOWN.items():
            own = [r for r in records if (r["cell"]["pool"], r["cell"]["method"]) == (pool, method)]
            seeds = dict.fromkeys(r["cell"]["seed"] for r in own)
            curves = [curve_of([r for r in own if r["cell"]["seed"] == seed]) for seed in seeds]
            points = list(zip(*curves, strict=False))  # the i-th evaluation of every seed
            if not points:
                continue
            x = [median(p[0] for p in point) for point in points]
            style = {"color": OKABE_ITO[color], "marker": "o" if len(x) < 6 else None}
            for axis, value in zip(axes[:, column], (2, 3), strict=True):
                y = [[p[value] for p in point] for point in points]
                axis.plot(x, [median(v) for v in y], label=method, linewidth=2, **style)
                axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=style["color"], alpha=0.12)
        axes[0, column].axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axes[0, column].set_title(f"{pool} pool")
        axes[1, column].set_xlabel("sampled completions")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    for axis, name in zip(axes[:, 0], ("helpfulness", "reward"), strict=True):
        axis.set_ylabel(f"held-out {name}")
    axes[0, -1].legend(loc="lower right", frameon=False)
    _save(figure, path)


def plot_bars(rows: list[dict[str, Any]], target: float, path: Path) -> None:
    """Rollouts to the target of every method: the median as a bar, every seed as a dot."""
    plt = _pyplot()
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    figure, axes = plt.subplots(1, len(pools), figsize=(6.5 * len(pools), 4.8), squeeze=False, sharey=True)
    for axis, pool in zip(axes[0], pools, strict=True):
        for place, method in enumerate(methods):
            own = [r for r in rows if (r["pool"], r["method"]) == (pool, method) and not r["error"]]
            middle = median([row["to_target"] for row in own] or [math.inf])
            if middle < math.inf:
                axis.barh(place, middle, color=BARS)
            else:
                axis.text(0, place, " not reached", va="center")
            reached = [row["to_target"] for row in own if row["to_target"] < math.inf]
            axis.plot(reached, [place] * len(reached), "o", color="black", markersize=3.5)
        axis.set_title(f"{pool} pool")
        axis.set_xlabel(f"sampled completions to helpfulness {target:g}")
        axis.set_yticks(range(len(methods)), methods)
        axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def write(
    records: list[dict[str, Any]], grid: dict[str, tuple[float, dict[float, float]]], folder: Path, levels: Levels
) -> None:
    """Write `results.csv`, `table.md`, `tuning.md` and the plots."""
    rows = rows_of(records, levels)
    (folder / "results.csv").unlink(missing_ok=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    for row in rows:
        append(folder / "results.csv", {name: row.get(name, "") for name in columns})
    (folder / "table.md").write_text(table(rows, levels))
    (folder / "tuning.md").write_text(tuning_table(grid))
    if any(value == value for r in records if "result" in r for value in _values(r)):
        plot_curves(records, levels[1], folder / "compare.png")
        plot_bars(rows, levels[1], folder / "compare_rollouts.png")


def _values(record: dict[str, Any]) -> Iterable[float]:
    return (point[2] for point in record["result"]["curve"])


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: "Figure", path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
