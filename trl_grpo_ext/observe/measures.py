"""What is measured on held-out answers: which metrics, under which names, with which values."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..host.nearest import nearest
from ..rewards import Reward, as_reward, parse_reward
from ..rewards.algebra import Leaf
from ..rewards.parsing import import_reward
from .held_out import TOTAL, HeldOut
from .paired import FEW_PROMPTS, Difference, paired, pass_at_k

REWARD = "reward"  # the name of the total among the metrics


def metrics_of(given: Sequence[Any] | Mapping[str, Any], parts: Sequence[Leaf] = ()) -> dict[str, Reward]:
    """
    The metrics that somebody asks for, by name.

    Args:
        given (`Sequence` or `Mapping[str, Any]`):
            As of [`HeldOutCallback`]. The name of a part of the reward stands for that part, and `reward` for the
            total, which is measured anyway.
        parts (`Sequence[Leaf]`, *optional*):
            Parts of the reward of the training.

    Example:

    ```python
    >>> metrics_of(["reward", "Length('characters')"])
    {'length': Length(unit='characters')}

    ```
    """
    if isinstance(given, str):
        raise ValueError(f"eval_metrics={given!r} is a text: pass a list, [{given!r}]")
    found: dict[str, Reward] = {}
    known = {part.name: part for part in parts}
    entries = list(given.items()) if isinstance(given, Mapping) else [(None, entry) for entry in given]
    for name, entry in entries:
        if isinstance(entry, str) and entry == REWARD:
            continue
        try:
            is_part = isinstance(entry, str) and entry in known
            metric: Any = known[entry] if is_part else entry
            if not is_part:
                metric = parse_reward(entry, import_reward) if isinstance(entry, str) else as_reward(entry)
        except (TypeError, ValueError) as error:
            near = nearest(str(entry), [REWARD, *known])
            hint = f"; or did you mean {near!r}, which the training rewards?" if near else ""
            raise ValueError(f"eval_metrics: {error}{hint}") from error
        name = name or metric.__name__
        if name in found or name in (REWARD, TOTAL) or known.get(name, metric) != metric:
            raise ValueError(
                f'eval_metrics: {name!r} is measured already: give this one another name, with .named("other")'
            )
        found[name] = metric
    return found


def check_prompts(dataset: Any, place: str) -> None:
    """Raise `ValueError` unless a dataset holds prompts that can be asked again and again."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{place} is a {type(dataset).__name__}, and held-out prompts are asked again and again: pass a "
            "datasets.Dataset, of a stream for example Dataset.from_list(list(stream.take(100)))"
        )
    if len(dataset) == 0:
        raise ValueError(f"{place} has no rows: pass at least one held-out prompt, better {FEW_PROMPTS}")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{place} has no column 'prompt', only {dataset.column_names}: rename that of the prompts")


def names_of(parts: Sequence[str], metrics: Sequence[str], pass_at: Sequence[int], has_intervals: bool) -> list[str]:
    """
    What an evaluation logs, after the prefix `eval_`.

    Args:
        parts (`Sequence[str]`), metrics (`Sequence[str]`), pass_at (`Sequence[int]`):
            As in [`values_of`].
        has_intervals (`bool`):
            Whether there are enough prompts for the interval of a gain.
    """
    measured = [REWARD, *metrics]
    names = [*measured, *(f"rewards/{name}/mean" for name in parts)]
    names += [f"{name}/pass@{k}" for name in metrics or [REWARD] for k in pass_at]
    ends = ["gain", "gain_low", "gain_high"] if has_intervals else ["gain"]
    names += [f"{name}/{end}" for name in measured for end in ends]
    return [*names, "completions/mean_length", "completions/clipped_ratio"]


def check_known(wanted: str, known: list[str]) -> None:
    """
    Raise `ValueError` for a `metric_for_best_model` that no evaluation gives.

    Example:

    ```python
    >>> check_known("reward", ["eval_reward"])
    >>> check_known("rewrad", ["eval_reward"])
    Traceback (most recent call last):
        ...
    ValueError: metric_for_best_model='rewrad' is not measured on the held-out prompts: did you mean 'reward'? There is
    'reward'

    ```
    """
    asked = re.sub(r"/turn_\d+/mean$", "/mean", wanted if wanted.startswith("eval_") else f"eval_{wanted}")
    if asked in known:
        return
    near = nearest(asked, known)
    remedy = f"did you mean {near.removeprefix('eval_')!r}?" if near else "name another one."
    if asked.endswith("_loss"):
        remedy = "held-out answers have no loss."
    raise ValueError(
        f"metric_for_best_model={wanted!r} is not measured on the held-out prompts: {remedy} There is "
        f"{', '.join(repr(name.removeprefix('eval_')) for name in known)}"
    )


def values_of(
    result: HeldOut,
    differences: Mapping[str, Difference],
    parts: Sequence[str],
    metrics: Sequence[str],
    pass_at: Sequence[int] = (),
    pass_threshold: float = 1.0,
) -> dict[str, float]:
    """
    What is logged of an evaluation, after the prefix `eval_`; only what has a value.

    Args:
        result ([`HeldOut`]):
            The evaluation.
        differences (`Mapping[str, Difference]`):
            The gain in some metrics since the start.
        parts (`Sequence[str]`), metrics (`Sequence[str]`):
            Names of the parts of the reward, and of further metrics.
        pass_at (`Sequence[int]`, *optional*), pass_threshold (`float`, *optional*, defaults to `1.0`):
            For which `k` to estimate how likely one of `k` answers reaches the threshold.
    """
    found = {REWARD: result.mean(TOTAL)}
    found |= {f"rewards/{name}/mean": result.mean(name) for name in parts}
    turns = sorted({turn for _, turn in result.keys})
    if len(turns) > 1:
        found |= {f"rewards/{name}/turn_{t}/mean": result.mean(name, t) for name in parts for t in turns}
    found |= {name: result.mean(name) for name in metrics}
    for name, gain in differences.items():
        ends = {f"{name}/gain_low": gain.low, f"{name}/gain_high": gain.high}
        found |= {f"{name}/gain": gain.mean} | {end: value for end, value in ends.items() if value is not None}
    for name in metrics or [REWARD]:
        score = TOTAL if name == REWARD else name
        found |= {f"{name}/pass@{k}": pass_rate(result, score, k, pass_threshold) for k in pass_at}
    if result.lengths and result.is_cut:
        found["completions/mean_length"] = sum(result.lengths) / len(result.lengths)
        found["completions/clipped_ratio"] = sum(result.is_cut) / len(result.is_cut)
    failed = (result.failed or {}).items()
    found |= {f"failed/{REWARD if name == TOTAL else name}": float(count) for name, count in failed if count}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def values_of_tasks(
    result: HeldOut, start: HeldOut | None, tasks: Sequence[str | None], metrics: Sequence[str]
) -> dict[str, float]:
    """
    What is logged of each task, after the prefix `eval_`; only what has a value.

    Args:
        result ([`HeldOut`]):
            The evaluation.
        start ([`HeldOut`], *optional*):
            That of the same prompts at the start.
        tasks (`Sequence[str | None]`):
            The task of each dataset row.
        metrics (`Sequence[str]`):
            Names of further metrics.

    Example:

    ```python
    >>> result = HeldOut(["p", "q"], ["a", "b"], {"total": [1.0, 0.0]})
    >>> start = HeldOut(["p", "q"], ["", ""], {"total": [0.5, 0.0]})
    >>> values_of_tasks(result, start, ["math", "chat"], [])["tasks/math/reward/gain"]
    0.5

    ```
    """
    found: dict[str, float] = {}
    for task in sorted({task for task in tasks if task is not None}):
        rows = {row for row, own in enumerate(tasks) if own == task}
        for name, score in {REWARD: TOTAL, **{metric: metric for metric in metrics}}.items():
            now = {row: value for row, value in result.per_prompt(score).items() if row in rows}
            if now:
                found[f"tasks/{task}/{name}"] = sum(now.values()) / len(now)
            if start is not None and score in start.scores:
                gain = paired(start.per_prompt(score), now)
                ends = {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                found |= {f"tasks/{task}/{name}/{end}": value for end, value in ends.items() if value is not None}
        places = [place for place, (row, _) in enumerate(result.keys) if row in rows]
        if places and result.lengths and result.is_cut:
            found[f"tasks/{task}/mean_length"] = sum(result.lengths[place] for place in places) / len(places)
            found[f"tasks/{task}/clipped_ratio"] = sum(result.is_cut[place] for place in places) / len(places)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def pass_rate(result: HeldOut, name: str, k: int, threshold: float) -> float:
    """
    How likely one of `k` answers has a score of `threshold` at least, over the prompts with `k` scores; NaN for none.

    Example:

    ```python
    >>> result = HeldOut(["q"] * 2, ["a", "b"], {"correct": [1.0, 0.0]}, rows=[0, 0], samples=[0, 1])
    >>> pass_rate(result, "correct", 1, threshold=1.0), pass_rate(result, "correct", 2, threshold=1.0)
    (0.5, 1.0)

    ```
    """
    values = [own for own in result.values_of(name).values() if len(own) >= k]
    rates = [pass_at_k(len(own), sum(value >= threshold for value in own), k) for own in values]
    return sum(rates) / len(rates) if rates else math.nan


def rows_of(result: HeldOut) -> list[dict[str, Any]]:
    """A line for each answer: its prompt, which answer it is, the texts and the scores."""
    samples = result.samples or [0] * len(result.answers)
    lines = []
    for place, (row, turn) in enumerate(result.keys):
        line: dict[str, Any] = {"row": row, "sample": samples[place], "turn": turn}
        line |= {"question": result.questions[place], "answer": result.answers[place]}
        line["scores"] = {name: values[place] for name, values in result.scores.items()}
        lines.append(line)
    return lines
