"""What a person wants to know first: does the run learn, what is wrong, when is it done."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from ..chosen import chosen_options
from ..paired import NOISE, Difference, direction_of, paired
from ..secrets import without_secrets
from .completions import scores_of
from .escaping import one_line
from .held_out import TOTAL
from .reader import Run, average, duration, number, seconds_between_logs, state_of

MAX_SHOWN = 4000  # characters of an option


def change(values: list[float]) -> tuple[float, float, float]:
    """
    Mean of the first and of the last tenth, and the standard error of the difference.

    A tenth is three values at least, and half of them at most.

    Example:

    ```python
    >>> change([0.0, 0.0, 1.0, 1.0])
    (0.0, 1.0, 0.0)

    ```
    """
    count = min(max(3, len(values) // 10), max(1, len(values) // 2))
    first, last = values[:count], values[-count:]
    error = math.sqrt((_variance(first) + _variance(last)) / count)
    return average(first), average(last), error


def slope(values: list[float]) -> tuple[float, float]:
    """
    By how much a line through `values` rises from the first to the last, and the standard error of that.

    Example:

    ```python
    >>> slope([1.0, 2.0, 3.0, 4.0])
    (3.0, 0.0)

    ```
    """
    n = len(values)
    if n < 3:
        return 0.0, math.inf
    center, mean = (n - 1) / 2, average(values)
    spread = sum((i - center) * (i - center) for i in range(n))
    per_step = sum((i - center) * (value - mean) for i, value in enumerate(values)) / spread
    # Products, because a power of a large float raises an error where a product is infinite.
    residuals = [value - mean - per_step * (i - center) for i, value in enumerate(values)]
    residual = sum(value * value for value in residuals)
    return per_step * (n - 1), math.sqrt(residual / (n - 2) / spread) * (n - 1)


def _variance(values: list[float]) -> float:
    """From the differences of neighbours, so that a trend does not count as noise (von Neumann, 1941)."""
    gaps = [after - before for before, after in itertools.pairwise(values)]
    return sum(gap * gap for gap in gaps) / (2 * len(gaps)) if gaps else 0.0


def verdict(run: Run) -> tuple[str, str]:
    """Whether the reward rises, as a tone (`"good"`, `"bad"`, `"neutral"`) and a sentence. Held-out prompts decide."""
    tone, sentence = _training_verdict(run)
    held_out = held_out_change(run)
    if held_out is None:
        return tone, sentence
    return held_out[0], f"{held_out[1]} In training: {sentence}"


def held_out_change(run: Run) -> tuple[str, str] | None:
    """
    Whether the reward on held-out prompts moved by more than its noise; `None` for less than two evaluations.

    Prompts are compared with themselves where `held_out.jsonl`, or the tables of both evaluations, hold them. Otherwise
    the noise comes from the spread of the rewards, which makes it larger than it is.
    """
    if len(run.held_out.steps) > 1 and TOTAL in run.held_out.measures:
        first, last = (run.held_out.mean(step, TOTAL) for step in (run.held_out.steps[0], run.held_out.last))
        if first is not None and last is not None:
            tone, sentence = _told(first, last, run.held_out.gain(TOTAL), "each compared with itself")
            is_earlier = run.held_out.last < run.held_out.steps[-1]
            kept = f" These are the weights of step {run.held_out.last}, which were restored." if is_earlier else ""
            return tone, sentence + kept
    entries = [entry for entry in run.metrics if entry.get("eval_reward") is not None]
    if len(entries) < 2:
        return None
    before, after = (scores_of(run, entry["step"]) for entry in (entries[0], entries[-1]))
    values = (entries[0]["eval_reward"], entries[-1]["eval_reward"])
    if before and before.keys() == after.keys():
        numbers = dict(enumerate(before.values())), dict(enumerate(after[prompt] for prompt in before))
        return _told(*values, paired(*numbers), "each compared with itself")
    spread = [entry.get("eval_reward_std") for entry in (entries[0], entries[-1])]
    count = _num_prompts(entries[-1]) if None not in spread else 0
    error = math.hypot(*(value or 0.0 for value in spread)) / math.sqrt(max(1, count))
    return _told(*values, Difference(values[1] - values[0], error, count), "by the spread of their rewards")


def _told(first: float, last: float, gain: Difference, how: str) -> tuple[str, str]:
    """Tone and sentence for a gain in the held-out reward."""
    told = f"from {number(first)} to {number(last)}"
    if gain.direction == "few":
        few = f"{gain.count} prompts are too few"
        which = few if gain.count else "the number of prompts is unknown: too little"
        return "neutral", f"The held-out reward went {told}, and {which} to say whether that is more than noise."
    if gain.direction == "flat":
        return "neutral", f"The held-out reward stayed within its noise ({told} on {gain.count} prompts, {how})."
    word, tone = ("risen", "good") if gain.direction == "up" else ("fallen", "bad")
    noise = number(NOISE * gain.error)
    return tone, f"The held-out reward has {word} {told} (± {noise} on {gain.count} prompts, {how})."


def _num_prompts(entry: Mapping[str, Any]) -> int:
    """Prompts of an evaluation, from how fast it says that it was; 0 where it does not say."""
    speed, seconds = entry.get("eval_samples_per_second"), entry.get("eval_runtime")
    count = speed * seconds if speed is not None and seconds is not None else 0.0
    return round(count) if 0 <= count < 1e9 else 0


def _training_verdict(run: Run) -> tuple[str, str]:
    rewards = _present(run, "reward")
    if not rewards:
        return "neutral", "No reward is logged yet." if not run.metrics else "This run logs no reward."
    if len(rewards) < 4:
        return "neutral", f"Too early to say: {len(rewards)} logs with a reward."
    first, last, error = change(rewards)
    overall = direction_of(last - first, error)
    trend = direction_of(*slope(rewards[-max(4, len(rewards) // 3) :]))
    lately = {"up": "still rising", "flat": "level", "down": "falling"}[trend] + " over the last third"
    numbers = f"from {number(first)} to {number(last)}"
    if overall == "up":
        tone = "bad" if trend == "down" else "good"
        return tone, f"The reward has risen {numbers}; {lately}."
    if overall == "down":
        lately = lately.replace("still rising", "rising")
        return "neutral" if trend == "up" else "bad", f"The reward has fallen {numbers}; {lately}."
    lately = lately.replace("still rising", "rising")
    return "neutral", f"The reward is where it began ({numbers}, within the noise); {lately}."


def headline(run: Run, now: float | None = None) -> dict[str, Any]:
    """The top of the page: verdict, state of the run, open alarms and a few numbers, `[label, value, detail]` each."""
    state, sentence = state_of(run, now)
    tone, text = verdict(run)
    spoiled = [name for name in ("loss", "grad_norm", "reward") if _lost(run, name)]
    if spoiled:
        tone, text = "bad", f"{text} The last log has no finite {' and no finite '.join(spoiled)}."
    if (
        _training_verdict(run)[0] != "good"
        and "curriculum/position" in run.metric_names
        and len(_present(run, "reward")) >= 4
    ):
        text += " The curriculum makes prompts harder meanwhile, so a level reward can hide progress."
    numbers = [["Step", _steps(run), sentence]]
    rewards = _present(run, "reward")
    if rewards:
        first, last, error = change(rewards)
        numbers.append(
            ["Reward now", number(last), f"{_signed(last - first)} since the start (± {number(NOISE * error)})"]
        )
    held_out = run.held_out
    for label, name in (("Held-out reward", "eval_reward"), ("KL to the reference", "kl")):
        values = _present(run, name)
        if values:
            now_ = held_out.mean(held_out.last, TOTAL) if name == "eval_reward" and held_out.values else values[-1]
            numbers.append([label, number(values[-1] if now_ is None else now_), f"at first {number(values[0])}"])
    informative = _present(run, "rollouts/informative")
    flat = _present(run, "frac_reward_zero_std")
    if informative or flat:
        values = informative or [1 - value for value in flat]
        first, last, _ = change(values)
        what = "rollouts that teach" if informative else "groups with different rewards"
        numbers.append(["Informative", f"{last:.0%}", f"{what}; at first {first:.0%}"])
    rollouts, tokens = _present(run, "rollouts/total"), _present(run, "num_tokens")
    if rollouts or tokens:
        label = "Rollouts" if rollouts else "Tokens"
        detail = f"{large(tokens[-1])} tokens" if rollouts and tokens else ""
        numbers.append([label, large((rollouts or tokens)[-1]), detail])
    numbers += _times(run, state)
    alarms = [{key: alarm[key] for key in ("name", "step", "evidence", "remedy")} for alarm in run.open_alarms]
    return {"tone": tone, "text": text, "state": state, "numbers": numbers, "alarms": alarms}


def line_of(run: Run, now: float | None = None) -> str:
    """A run in one line: its state, how its reward went, its open alarms."""
    parts = [f"step {_steps(run)}", one_line(state_of(run, now)[1])]
    rewards = _present(run, "reward")
    if rewards:
        first, last, _ = change(rewards)
        parts.append(f"reward {number(first)} to {number(last)}")
    parts += [f"alarm {one_line(alarm['name'], 40)}" for alarm in run.open_alarms]
    return ", ".join(parts)


def _steps(run: Run) -> str:
    return f"{run.last_step}" + (f" of {run.max_steps}" if run.max_steps else "")


def _times(run: Run, state: str) -> list[list[str]]:
    times = [entry for entry in run.metrics if entry.get("time") is not None]
    runtime = _present(run, "train_runtime")
    found = []
    if len(times) > 1:
        # Waiting between an interruption and a resume is no work: a gap counts as far as it is a usual one.
        usual = 20 * (seconds_between_logs(run) or 0)
        gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(times)]
        spent = sum(min(gap, usual) for gap in gaps if gap > 0)
        recent = times[-20:]
        seconds = sum(min(gap, usual) for gap in gaps[-19:]) / max(1, recent[-1]["step"] - recent[0]["step"])
        found.append(["Time", duration(spent), f"{number(seconds)} s per step; from the first log to the last"])
        if state == "running" and run.max_steps:
            left = (run.max_steps - run.last_step) * seconds
            found.append(["Time left", duration(left), "at the speed of the last logs"])
    elif runtime:
        found.append(["Time", duration(runtime[-1]), "training"])
    elif step_times := _present(run, "step_time"):
        found.append(["Time", f"{number(step_times[-1])} s", "per step"])
    return found


def _lost(run: Run, name: str) -> bool:
    """Whether a metric that used to have a value was logged without one (NaN) the last time."""
    logged = [entry[name] for entry in run.metrics if name in entry]
    return bool(logged) and logged[-1] is None and any(value is not None for value in logged)


def _present(run: Run, name: str) -> list[float]:
    return [value for value in run.column(name) if value is not None]


def large(value: float) -> str:
    """
    A count with thousands separated.

    Example:

    ```python
    >>> large(1234567.0)
    '1 234 567'

    ```
    """
    return f"{value:,.0f}".replace(",", " ")


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + number(value)


def configuration(run: Run) -> tuple[list[list[str]], list[list[str]]]:
    """The options that somebody chose, and all the others: `[name, value, default]` each."""
    given = _config(run)
    if not given:
        return [], []
    from ...config import AdaptiveGRPOConfig  # which takes TRL along, and the rest of a report does not

    chosen = chosen_options(given)
    changed: list[list[str]] = []
    others: list[list[str]] = []
    for option in dataclasses.fields(AdaptiveGRPOConfig):
        if option.name not in given:
            continue
        factory = option.default_factory
        default = option.default if factory is dataclasses.MISSING else factory()
        row = [option.name, shown(given[option.name]), "" if default is dataclasses.MISSING else shown(default)]
        (changed if option.name in chosen else others).append(row)
    known = {option.name for option in dataclasses.fields(AdaptiveGRPOConfig)}
    changed += [[str(name), shown(value), "not set"] for name, value in given.items() if name not in known]
    return changed, others


def _config(run: Run) -> dict[str, Any]:
    given = run.info.get("config")
    return without_secrets(given) if isinstance(given, dict) else {}  # whoever wrote it


def compare_configurations(one: Run, other: Run) -> list[list[str]]:
    """The options in which two runs differ: `[name, value of one, value of the other]` each."""
    first, second = _config(one), _config(other)
    rows = []
    for name in dict.fromkeys([*first, *second]):
        values = [shown(given[name]) if name in given else "not set" for given in (first, second)]
        if values[0] != values[1]:
            rows.append([str(name), *values])
    return rows


def shown(value: Any) -> str:
    """A value of the configuration as text."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # JSON does not tell 1 from 1.0
    if isinstance(value, tuple):
        value = list(value)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… [{len(text) - MAX_SHOWN} more characters]"
