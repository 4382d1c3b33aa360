"""Alarms over logged metrics: thresholds as data, and the detector that raises and clears them. Plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..host.state import check_state
from .readings import (
    RECENT,
    History,
    Logs,
    Measure,
    collapse,
    constant_rewards,
    level,
    not_finite,
    off_centre,
    runaway,
    spike,
)


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
        history = self.history
        return {
            "num_logs": history.num_logs,
            "first": {name: list(values) for name, values in history.first.items()},
            "recent": {name: list(values) for name, values in history.recent.items()},
            "raised": list(self.raised),
            "streaks": dict(self._streaks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, num_logs=int, first=dict, recent=dict, raised=list, streaks=dict)
        for part in ("first", "recent"):
            for name, values in state_dict[part].items():
                check_state({name: values}, **{str(name): list})
                for value in values:
                    check_state({name: value}, **{str(name): float})
        check_state(state_dict["streaks"], **dict.fromkeys(state_dict["streaks"], int))
        first, recent = ({k: list(v) for k, v in state_dict[part].items()} for part in ("first", "recent"))
        self.history = History(state_dict["num_logs"], first, recent)
        known = {alarm.name for alarm in self.alarms}
        self.raised = [name for name in state_dict["raised"] if name in known]
        self._streaks = dict(state_dict["streaks"])


def make_alarms(watch: Sequence[str] = ("completions/mean_length",)) -> list[Alarm]:
    """
    The alarms, with their thresholds.

    Args:
        watch (`Sequence[str]`, *optional*, defaults to `("completions/mean_length",)`):
            Positive metrics that should not move far while the reward rises, for `reward_hacking`.

    Returns:
        `list[Alarm]`:
            New alarms. Change one with `dataclasses.replace`.

    Example:

    ```python
    >>> from dataclasses import replace
    >>> alarms = [replace(a, threshold=20.0) if a.name == "gradient_spike" else a for a in make_alarms()]

    ```
    """
    return [
        Alarm(
            "all_correct",
            level("rollouts/flat_high"),
            threshold=0.5,
            clear=0.3,
            warmup=5,
            patience=5,
            calm=5,
            cause="the prompts are too easy for the policy by now, so their groups teach nothing",
            remedy='draw harder prompts (curriculum="online") or replace such groups (dynamic_sampling_rounds=1)',
            source="zero-variance share 0.5, the middle of rldoctor's 0.3/0.5/0.75",
        ),
        Alarm(
            "all_wrong",
            level("rollouts/flat_low"),
            threshold=0.5,
            clear=0.3,
            warmup=5,
            patience=5,
            calm=5,
            cause="the prompts are too hard for the policy, or the reward is never given",
            remedy='read some completions; draw easier prompts (curriculum="staged" or "online"), raise '
            "num_generations, or give partial credit",
            source="zero-variance share 0.5, the middle of rldoctor's 0.3/0.5/0.75",
        ),
        Alarm(
            "reward_std_spike",
            spike("reward_std", spread_of="reward"),
            threshold=5.0,
            clear=2.0,
            warmup=10,
            patience=3,
            calm=10,
            cause="outliers in a reward function, or a reward without bounds",
            remedy="look at rewards/*/std to find it, and clip it (reward_clip_quantiles=[0.05, 0.95])",
            source="own choice; far above what learning does to the spread of a bounded reward in 20 logs",
        ),
        Alarm(
            "reward_hacking",
            runaway(watch),
            threshold=2.0,
            clear=1.5,
            warmup=20,
            patience=3,
            calm=5,
            cause="the policy found what the reward pays for and you did not mean",
            remedy="read the completions of the best groups; add a penalty or a gate to the reward, or raise beta",
            source="own choice: a doubling, or a halving, while the reward rises by half its standard deviation",
        ),
        Alarm(
            "kl_spike",
            spike("kl", floor=0.05),
            threshold=8.0,
            clear=4.0,
            warmup=20,
            patience=3,
            calm=10,
            cause="the policy jumped away from the reference model",
            remedy="lower learning_rate or raise beta; kl_target adapts beta by itself",
            source="8 times the usual, as in rlprobe; three in a row, because single steps often stick out",
        ),
        Alarm(
            "gradient_spike",
            spike("grad_norm", floor=1.0),
            threshold=10.0,
            clear=3.0,
            warmup=10,
            patience=1,
            calm=10,
            cause="one batch pulls far harder than the rest: an outlier reward, or too large steps",
            remedy="lower learning_rate or max_grad_norm, or clip rewards (reward_clip_quantiles)",
            source="10 times the usual, as in other monitors; up to max_grad_norm=1, the default, nothing is cut",
        ),
        Alarm(
            "entropy_collapse",
            collapse("entropy"),
            threshold=10.0,
            clear=5.0,
            warmup=20,
            patience=5,
            calm=5,
            cause="the policy has become nearly deterministic, so the completions of a group no longer differ",
            remedy="raise epsilon_high (0.28), temperature or entropy_coef, or lower learning_rate",
            source="own choice: a tenth of the start; for the effect see DAPO, arXiv 2503.14476, section 3.1",
        ),
        Alarm(
            "ratio_clipping",
            level("clip_ratio/region_mean"),
            threshold=0.3,
            clear=0.15,
            warmup=0,
            patience=5,
            calm=5,
            cause="the policy moves far between generating and training, so much of the gradient is clipped away",
            remedy="lower learning_rate, num_iterations or steps_per_generation",
            source="0.3 over several steps, as in other monitors",
        ),
        Alarm(
            "reward_clipping",
            level("reward_clip/frac"),
            threshold=0.3,
            clear=0.2,
            warmup=0,
            patience=5,
            calm=5,
            cause="the clipping bounds lie inside of the usual rewards",
            remedy="widen reward_clip_range or reward_clip_quantiles",
            source="own choice: quantiles of 0.05 and 0.95 clip about 0.1",
        ),
        Alarm(
            "truncated",
            level("completions/clipped_ratio"),
            threshold=0.5,
            clear=0.3,
            warmup=0,
            patience=5,
            calm=5,
            cause="completions do not end within max_completion_length, so their rewards are those of fragments",
            remedy="raise max_completion_length, ask for shorter answers, or reward them",
            source="own choice: the majority",
        ),
        Alarm(
            "nan_loss",
            not_finite("loss", "grad_norm", "kl", "entropy"),
            threshold=0.0,
            clear=0.0,
            warmup=0,
            patience=1,
            calm=10,
            cause="overflow, or a division by zero in a reward or in the model; the weights may be NaN from here on",
            remedy="go back to the last checkpoint; lower learning_rate, or use bf16 instead of fp16",
            source="any",
        ),
        Alarm(
            "dead_reward",
            constant_rewards,
            threshold=0.0,
            clear=0.0,
            warmup=RECENT,
            patience=1,
            calm=5,
            cause="a reward that is always met, never met or broken: it cancels out of the advantages",
            remedy="check the function on some completions; leave it out, or make it graded",
            source="no variation at all in 21 logs",
        ),
        Alarm(
            "advantage_bias",
            off_centre("advantage/mean", "advantage/abs_mean"),
            threshold=0.1,
            clear=0.05,
            warmup=0,
            patience=5,
            calm=5,
            cause="a callback masks or changes advantages on one side, so all completions are pushed up or down",
            remedy="subtract the group's mean again after on_advantages, or mask before the advantages are computed",
            source="own choice: it is 0 by construction, and a tenth is far above rounding",
        ),
    ]
