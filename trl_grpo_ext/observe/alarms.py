"""Alarms over logged metrics: thresholds as data, and the detector that raises and clears them. Plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..host.state import check_state
from .readings import (
    History,
    Logs,
    Measure,
    away_from,
    collapse,
    constant_rewards,
    growth,
    level,
    not_finite,
    off_centre,
    outburst,
    runaway,
    spike,
    without_effect,
)
from .task_readings import falling_task, hidden_level


@dataclass(frozen=True)
class Alarm:
    """
    An illness of a run, and how it is told.

    It is raised when its reading lies above `threshold` in `patience` logs in a row, once at least `warmup` logs were
    seen, and cleared when the reading lies at or below `clear` in `calm` logs in a row. It is reported at both
    moments and not in between. All numbers count logs, so with `logging_steps=10` they stand for ten times as many
    steps.

    Args:
        name (`str`):
            Name, as in `on_alarm` and in the metric `alarms/<name>`.
        measure (`Measure`):
            Reads the current log and the history before it. `None` if there is nothing to tell.
        threshold (`float`):
            Raised above this.
        clear (`float`):
            Cleared at or below this; smaller than `threshold`, so that a value near it does not nag.
        warmup (`int`):
            Logs that must have been seen before.
        patience (`int`):
            Logs in a row that raise it.
        calm (`int`):
            Logs in a row that clear it.
        cause (`str`):
            The likely cause.
        remedy (`str`):
            What to do.
        source (`str`):
            Where the threshold comes from.
    """

    name: str
    measure: Measure
    threshold: float
    clear: float
    warmup: int
    patience: int
    calm: int
    cause: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Event:
    """An alarm that was `"raised"` or `"cleared"`."""

    alarm: Alarm
    state: str
    evidence: str

    @property
    def line(self) -> str:
        """Name, evidence, likely cause and remedy in one line."""
        if self.state == "cleared":
            return f"{self.alarm.name} is over: {self.evidence}"
        return f"{self.alarm.name}: {self.evidence}. Likely cause: {self.alarm.cause}. Remedy: {self.alarm.remedy}"


class AlarmDetector:
    """
    Feeds each log to all alarms and says which of them are raised or cleared by it.

    Args:
        alarms (`Sequence[Alarm]`):
            Alarms; their names must differ.

    Example:

    ```python
    >>> detector = AlarmDetector(make_alarms())
    >>> [event.alarm.name for event in detector.update({"loss": 0.1, "grad_norm": float("nan")})]
    ['nan_loss']
    >>> [event.line for _ in range(10) for event in detector.update({"loss": 0.1, "grad_norm": 1.0})]
    ['nan_loss is over: all finite']

    ```
    """

    def __init__(self, alarms: Sequence[Alarm]):
        names = [alarm.name for alarm in alarms]
        if len(set(names)) < len(names):
            raise ValueError(f"Two alarms share a name ({', '.join(names)}): rename one")
        self.alarms = list(alarms)
        self.history = History()
        self.raised: list[str] = []
        self._streaks: dict[str, int] = {}  # logs in a row that speak against the present state of an alarm

    def update(self, logs: Logs) -> list[Event]:
        """Take in one training log, metric to number (or `None`)."""
        events = []
        for alarm in self.alarms:
            reading = alarm.measure(logs, self.history)
            if reading is None or self.history.num_logs < alarm.warmup:
                continue
            is_raised = alarm.name in self.raised
            speaks = reading.value <= alarm.clear if is_raised else reading.value > alarm.threshold
            self._streaks[alarm.name] = self._streaks.get(alarm.name, 0) + 1 if speaks else 0
            if self._streaks[alarm.name] >= (alarm.calm if is_raised else alarm.patience):
                self._streaks[alarm.name] = 0
                if is_raised:
                    self.raised.remove(alarm.name)
                else:
                    self.raised.append(alarm.name)
                events.append(Event(alarm, "cleared" if is_raised else "raised", reading.evidence))
        self.history.append(logs)
        return events

    def state_dict(self) -> dict[str, Any]:
        return {"history": asdict(self.history), "raised": list(self.raised), "streaks": dict(self._streaks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, history=dict, raised=list, streaks=dict)
        check_state(state_dict["streaks"], **dict.fromkeys(state_dict["streaks"], int))
        given = state_dict["history"]
        kinds = {"first": list, "recent": list, "moves": list, "highest": float, "counts": int, "rests": int}
        check_state(given, num_logs=int, **dict.fromkeys(kinds, dict))
        for part, kind in kinds.items():
            check_state(given[part], **dict.fromkeys(given[part], kind))
            for name, values in given[part].items() if kind is list else ():
                for value in values:
                    check_state({name: value}, **{name: float})
        copied = {part: {k: list(v) for k, v in given[part].items()} for part, kind in kinds.items() if kind is list}
        self.history = History(**{**{key: dict(given[key]) for key in kinds}, **copied}, num_logs=given["num_logs"])
        known = {alarm.name for alarm in self.alarms}
        self.raised = [name for name in state_dict["raised"] if name in known]
        self._streaks = dict(state_dict["streaks"])


# How many times shorter and longer completions may become while the reward rises.
WATCH: dict[str, tuple[float, float]] = {"completions/mean_length": (6.0, 3.0)}

# Measure, threshold, clear, warmup, patience, calm of each alarm. The order is that of `ALARMS` in the configuration.
RULES: dict[str, tuple[Measure, float, float, int, int, int]] = {
    "all_correct": (level("rollouts/flat_high"), 0.5, 0.3, 2, 8, 5),
    "all_wrong": (level("rollouts/flat_low"), 0.5, 0.3, 2, 8, 5),
    "reward_std_spike": (spike("reward_std", spread_of="reward"), 5.0, 2.0, 10, 3, 10),
    "reward_hacking": (runaway(WATCH), 1.0, 0.6, 20, 3, 5),
    "kl_spike": (spike("kl", floor=0.05), 8.0, 4.0, 20, 3, 10),
    "gradient_spike": (outburst("grad_norm", floor=1.0, alone=20.0, margin=4.0), 10.0, 3.0, 10, 1, 10),
    "entropy_collapse": (collapse("entropy"), 10.0, 5.0, 3, 5, 5),
    "ratio_clipping": (level("clip_ratio/region_mean"), 0.3, 0.15, 0, 5, 5),
    "reward_clipping": (level("reward_clip/frac"), 0.3, 0.2, 0, 5, 5),
    "truncated": (level("completions/clipped_ratio"), 0.5, 0.3, 0, 3, 5),
    "nan_loss": (not_finite("loss", "grad_norm", "kl", "entropy"), 0.0, 0.0, 0, 1, 10),
    "dead_reward": (constant_rewards, 0.0, 0.0, 0, 1, 5),
    "advantage_bias": (off_centre("advantage/mean", "advantage/abs_mean"), 0.1, 0.05, 0, 5, 5),
    "nothing_trained": (without_effect("updates/without_effect"), 1.0, 0.0, 0, 1, 1),
    "flat_task": (hidden_level("informative", "rollouts/informative", sign=-1.0, window=16), 0.9, 0.8, 16, 5, 5),
    "falling_task": (falling_task, 0.5, 0.25, 20, 5, 5),
    "truncated_task": (hidden_level("truncated", "completions/clipped_ratio", window=6), 0.5, 0.3, 6, 3, 5),
    "sampling_mismatch": (level("sampling/sampling_logp_difference/mean"), 0.1, 0.05, 0, 3, 5),
    "sampling_ratios": (away_from("sampling/importance_sampling_ratio/mean", 1.0), 0.5, 0.25, 0, 3, 5),
    "stale_engine": (growth("sampling/sampling_logp_difference/mean", times=3.0), 0.08, 0.0, 20, 3, 5),
}
SIMULATED = "chosen on simulated runs"
# Likely cause, remedy, and where the threshold comes from.
ADVICE: dict[str, tuple[str, str, str]] = {
    "all_correct": (
        "the prompts are too easy for the policy by now, so their groups teach nothing",
        'draw harder prompts (curriculum="online") or replace such groups (dynamic_sampling_rounds=1)',
        "zero-variance share 0.5, the middle of rldoctor's 0.3/0.5/0.75; eight in a row, " + SIMULATED,
    ),
    "all_wrong": (
        "the prompts are too hard for the policy, or the reward is never given",
        'read some completions; draw easier prompts (curriculum="staged" or "online"), raise num_generations, or '
        "give partial credit",
        "zero-variance share 0.5, the middle of rldoctor's 0.3/0.5/0.75; eight in a row, " + SIMULATED,
    ),
    "reward_std_spike": (
        "outliers in a reward function, or a reward without bounds",
        "look at rewards/*/std to find it, and clip it (reward_clip_quantiles=[0.05, 0.95])",
        "own choice; far above what learning does to the spread of a bounded reward in 20 logs",
    ),
    "reward_hacking": (
        "the policy found what the reward pays for and you did not mean",
        "read the completions of the best groups; add a penalty or a gate to the reward, or raise beta",
        "three times as long or a sixth as long, while the reward rises by half its standard deviation; " + SIMULATED,
    ),
    "kl_spike": (
        "the policy jumped away from the reference model",
        "lower learning_rate or raise beta; kl_target adapts beta by itself",
        "8 times the usual, as in rlprobe; three in a row, because single steps often stick out",
    ),
    "gradient_spike": (
        "one batch pulls far harder than the rest: an outlier reward, or too large steps",
        "lower learning_rate or max_grad_norm, or clip rewards (reward_clip_quantiles)",
        "10 times the usual, as in other monitors, and beyond the tail of the run itself, " + SIMULATED,
    ),
    "entropy_collapse": (
        "the policy has become nearly deterministic, so the completions of a group no longer differ",
        "raise epsilon_high (0.28), temperature or entropy_coef, or lower learning_rate or baseline_shift",
        "own choice: a tenth of the start; for the effect see DAPO, arXiv 2503.14476, section 3.1",
    ),
    "ratio_clipping": (
        "the policy moves far between generating and training, so much of the gradient is clipped away",
        "lower learning_rate, num_iterations or steps_per_generation",
        "0.3 over several steps, as in other monitors",
    ),
    "reward_clipping": (
        "the clipping bounds lie inside of the usual rewards",
        "widen reward_clip_range or reward_clip_quantiles",
        "own choice: quantiles of 0.05 and 0.95 clip about 0.1",
    ),
    "truncated": (
        "completions do not end within max_completion_length, so their rewards are those of fragments",
        "raise max_completion_length, ask for shorter answers, or reward them",
        "own choice: the majority, three times in a row",
    ),
    "nan_loss": (
        "overflow, or a division by zero in a reward or in the model; the weights may be NaN from here on",
        "go back to the last checkpoint; lower learning_rate, or use bf16 instead of fp16",
        "any",
    ),
    "dead_reward": (
        "a reward that is never met or broken: it cancels out of the advantages",
        "check the function on some completions; leave it out, or make it graded",
        "one value in five logs to which no learning led, " + SIMULATED,
    ),
    "advantage_bias": (
        "a callback masks or changes advantages on one side, so all completions are pushed up or down",
        "subtract the group's mean again after on_advantages, or mask before the advantages are computed",
        "own choice: it is 0 by construction, and a tenth is far above rounding",
    ),
    "nothing_trained": (
        "no weight that can be trained takes part in the loss, or the learning rate is too small for its precision",
        "load the adapter with is_trainable=True, or pass peft_config; check requires_grad and the learning rate",
        "more than one batch with advantages, at a learning rate that is not 0",
    ),
    "flat_task": (
        "the prompts of one task are all too easy or too hard by now, and the mean over the tasks hides it",
        'give the others its share (task_mixing="adaptive"), or take easier or harder prompts of it',
        "nine tenths of its rollouts over 16 logs, five times in a row, " + SIMULATED,
    ),
    "falling_task": (
        "the gradient of another task is larger, or pulls the other way, and the mean over the tasks hides it",
        "give each task its own scale (task_advantages=True), or this one a larger share (task_mixing)",
        "half a standard deviation of its rewards, beyond three standard errors, " + SIMULATED,
    ),
    "truncated_task": (
        "completions of one task do not end within max_completion_length, and the mean over the tasks hides it",
        "raise max_completion_length, or ask for shorter answers to this task",
        "own choice: the majority, as for truncated",
    ),
    "sampling_mismatch": (
        "vLLM samples from another distribution than the policy's: another precision or model, or options that only "
        "one of them knows",
        "give vLLM the policy's model and precision, start a server with --logprobs-mode processed_logprobs, and leave "
        "penalties out of generation_kwargs",
        "own choice: three times what a bfloat16 engine and a float32 policy differ by",
    ),
    "sampling_ratios": (
        "the ratios of policy and vLLM are cut at their cap, so many completions count for little or for nothing",
        "find out why the log-probabilities differ; for long completions, set "
        'vllm_importance_sampling_mode="token_truncate"',
        "own choice: the mean is 1 by construction, unless ratios are cut",
    ),
    "stale_engine": (
        "updates do not reach vLLM, which goes on sampling from earlier weights",
        "check that one trainer feeds this engine and that versions of TRL, vLLM and peft fit; with an adapter, set "
        "lora_dropout=0, because dropout looks alike",
        "above what dropout did in a real run (0.013 nats after 14 steps of SmolLM2); the 21 logs of growth "
        + SIMULATED,
    ),
}


def make_alarms(watch: Mapping[str, tuple[float, float]] | Sequence[str] = tuple(WATCH)) -> list[Alarm]:
    """
    The alarms, with their thresholds.

    Args:
        watch (`Mapping[str, tuple[float, float]]` or `Sequence[str]`, *optional*):
            Positive metrics that should not move far while the reward rises, for `reward_hacking`: how many times
            smaller and how many times larger each may become, numbers above 1. Defaults to 6 and 3 for
            `completions/mean_length`, and to 2 and 2 for others.

    Returns:
        `list[Alarm]`:
            New alarms. Change one with `dataclasses.replace`.

    Example:

    ```python
    >>> from dataclasses import replace
    >>> alarms = [replace(a, threshold=20.0) if a.name == "gradient_spike" else a for a in make_alarms()]

    ```
    """
    limits = dict(watch) if isinstance(watch, Mapping) else {name: WATCH.get(name, (2.0, 2.0)) for name in watch}
    rules = RULES | {"reward_hacking": (runaway(limits), *RULES["reward_hacking"][1:])}
    return [Alarm(name, *rule, *ADVICE[name]) for name, rule in rules.items()]
