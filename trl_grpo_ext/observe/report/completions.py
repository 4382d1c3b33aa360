"""Reads the completions that TRL logs (`log_completions=True`) as groups of completions to one prompt."""

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

from ..record import is_number, is_own_file
from .escaping import message_text
from .reader import Run, average

MAX_CHARACTERS = 4000  # of one prompt or completion on the page
_OWN = ("step", "prompt", "completion", "advantage")


def read_groups(run: Run, max_completions: int) -> tuple[list[str], list[dict[str, Any]], str]:
    """
    Groups of completions, at most `max_completions` completions in all: a quarter of them from the newest tables, the
    others spread over the run.

    Args:
        run ([`Run`]):
            The run.
        max_completions (`int`):
            How many completions to read.

    Returns:
        `tuple[list[str], list[dict], str]`:
            - names of the columns of values;
            - groups in the order of the steps: `step`, `prompt`, `flat` (all total rewards are equal, or all
              advantages zero), `spread` (largest minus smallest total reward), `mean`, and `rows`, each
              `[completion, advantage, total, values]`, the best advantage first;
            - a sentence on what is shown and what is not.
    """
    files = sorted((run.folder / "completions").glob("completions_*.parquet"), key=_step_of)
    if not files:
        return [], [], "No completions were logged. Set log_completions=True to browse them here."
    notes = []
    if run.metrics:
        foreign = sum(_step_of(path) > run.last_step for path in files)
        files = files[: len(files) - foreign]
        if foreign:
            notes.append(f"{foreign} tables of steps after the last log are left out: they are of an earlier run.")
    chosen = _choose(run, files, max_completions)
    columns: dict[str, None] = {}
    found: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    broken = 0
    for path in chosen:
        try:
            tabled = _groups(run, _table(run, path))
        except Exception:  # a table that is being written, or is none: pyarrow raises many kinds
            broken += 1
            continue
        groups = []
        for group in tabled:
            key = hashlib.blake2b(repr((group["prompt"], group["rows"])).encode("utf-8", "replace")).digest()
            if key not in seen:  # TRL logs a batch again until the next one is generated
                seen.add(key)
                groups.append(group)
        groups = _spread_out(groups, max(1, max_completions // len(chosen)))
        for group in groups:
            columns.update(dict.fromkeys(group["values"]))
        found += groups
    names = _ordered(run, list(columns))
    for group in found:
        values = group.pop("values")
        none = [None] * len(group["rows"])
        shown = list(zip(*(values.get(name, none) for name in names), strict=True)) or [()] * len(none)
        rows = [[*row, list(extra)] for row, extra in zip(group["rows"], shown, strict=True)]
        group["rows"] = sorted(rows, key=lambda row: -math.inf if row[1] is None else row[1], reverse=True)
    if broken:
        notes.append(f"{broken} tables could not be read and are left out.")
    if run.reward_weights is None and len(run.function_names) > 1:
        notes.append("The weights of the reward functions are unknown; totals count each once.")
    count = sum(len(group["rows"]) for group in found)
    which = "" if len(chosen) == len(files) else f", of {len(files)} there are, the newest and some of the others"
    what = f"{count} completions in {len(found)} groups from {len(chosen)} logged tables{which}."
    return names, found, " ".join([what, *notes])


def scores_of(run: Run, step: int) -> dict[str, float]:
    """Mean total reward of each prompt in the table of a step; nothing where there is none that can be read."""
    path = next((p for p in (run.folder / "completions").glob("completions_*.parquet") if _step_of(p) == step), None)
    if path is None:
        return {}
    try:
        groups = _groups(run, _table(run, path))
    except Exception:  # a table that is being written, or is none: pyarrow raises many kinds
        return {}
    means: dict[str, list[float]] = {}
    for group in groups:
        if group["mean"] is not None:
            means.setdefault(group["prompt"], []).append(group["mean"])
    return {prompt: average(values) for prompt, values in means.items()}


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("completions_")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else 0


def _choose(run: Run, files: list[Path], max_completions: int) -> list[Path]:
    """As many tables as are needed, or up to 40 smaller pieces of large ones."""
    import pyarrow.parquet as pq

    rows = 1
    for path in reversed(files):
        try:
            if is_own_file(run.folder, path):
                rows = max(1, pq.read_metadata(path).num_rows)
                break
        except Exception:
            continue
    count = min(len(files), max(min(40, max_completions), max_completions // rows))
    newest = math.ceil(count / 4)
    older = files[: len(files) - newest]
    spread = _spread(len(older), count - newest)
    return [older[i] for i in spread] + files[len(files) - newest :]


def _spread(total: int, count: int) -> list[int]:
    """`count` of `range(total)`, evenly, the first one and the last one among them."""
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def _spread_out(groups: list[dict[str, Any]], max_rows: int) -> list[dict[str, Any]]:
    """Whole groups from all over the table, with `max_rows` rows in all, but one group at least."""
    if not groups:
        return groups
    rows = sum(len(group["rows"]) for group in groups)
    count = len(groups) if rows <= max_rows else max(1, max_rows * len(groups) // rows)
    return [groups[i] for i in _spread(len(groups), count)]


def _table(run: Run, path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    if not is_own_file(run.folder, path):
        raise ValueError(f"{path} is no file of this folder")
    table = pq.read_table(path).to_pydict()
    return {name: table[name] for name in table if not name.startswith("__index_level_")}


def _groups(run: Run, table: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Neighbouring rows with one prompt are a group."""
    prompts = [message_text(value) for value in table["prompt"]]
    completions = [_cut(message_text(value)) for value in table["completion"]]
    advantages = [_number(value) for value in table.get("advantage", [None] * len(prompts))]
    values = {name: [_shown(v) for v in column] for name, column in table.items() if name not in _OWN}
    functions = [name for name in run.function_names if name in values]
    weights = run.reward_weights or [1.0] * len(run.function_names)
    weight_of = dict(zip(run.function_names, weights, strict=True))
    totals = [_total([(weight_of[f], _number(table[f][i])) for f in functions]) for i in range(len(prompts))]
    borders = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]] + [len(prompts)]
    groups = []
    for start, stop in itertools.pairwise(borders):
        present = [value for value in totals[start:stop] if value is not None]
        equal = not present or min(present) == max(present)
        if "advantage" in table:
            # Rewards may differ and be equal once they are clipped; and one alone teaches where there is a critic.
            equal = (equal and stop - start > 1) or not any(advantages[start:stop])
        groups.append(
            {
                "step": int(table["step"][start]),
                "prompt": _cut(prompts[start]),
                "flat": equal,
                "spread": max(present) - min(present) if present else None,
                "mean": average(present) if present else None,
                "rows": [[completions[i], advantages[i], totals[i]] for i in range(start, stop)],
                "values": {name: column[start:stop] for name, column in values.items()},
            }
        )
    return groups


def _total(terms: list[tuple[float, float | None]]) -> float | None:
    values = [weight * value for weight, value in terms if value is not None]
    return sum(values) if values else None


def _ordered(run: Run, names: list[str]) -> list[str]:
    """Reward functions, then components, then what else was logged; a single function is the total already."""
    functions = run.function_names
    if len(functions) == 1 and len(names) > 1 and (run.reward_weights or [1.0]) == [1.0]:
        names = [name for name in names if name not in functions]
    rank = {name: i for i, name in enumerate([*functions, *run.reward_names])}
    return sorted(names, key=lambda name: rank.get(name, len(rank)))


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _shown(value: Any) -> float | str | None:
    if isinstance(value, list) and len(value) <= 1:  # a row of a rollout, with one answer that was scored
        value = value[0] if value else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return None if value is None else _cut(str(value), 300)


def _cut(text: str, limit: int = MAX_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… [{len(text) - limit} more characters]"
