"""What options may be, alone and together: each rule gives the value, the rule and the remedy."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.trainer_utils import IntervalStrategy
from trl import GRPOConfig

GROUP_SIZES = ("fixed", "single", "threshold", "variance")
BASELINES = ("group", "leave_one_out", "batch", "predicted", "shrunk")
CURRICULA = ("none", "staged", "online", "predicted", "target")
TASK_MIXINGS = ("none", "weights", "size", "adaptive")
ROLLOUTS = ("single", "multi_turn", "hierarchical")
ALARMS = (
    "all_correct",
    "all_wrong",
    "reward_std_spike",
    "reward_hacking",
    "kl_spike",
    "gradient_spike",
    "entropy_collapse",
    "ratio_clipping",
    "reward_clipping",
    "truncated",
    "nan_loss",
    "dead_reward",
    "advantage_bias",
    "nothing_trained",
    "flat_task",
    "falling_task",
    "truncated_task",
    "sampling_mismatch",
    "sampling_ratios",
    "stale_engine",
)
ACTIONS = ("adapt_beta", "cool_lr", "cap_group_size", "save_and_stop")


class OptionRules(GRPOConfig):
    """The rules of [`AdaptiveGRPOConfig`], whose options are declared there."""

    group_size: str
    min_group_size: int | None
    max_group_size: int | None
    group_std_threshold: float
    baseline: str
    baseline_shift: float
    token_weighted_baseline: bool
    reuse_drift_limit: float | None
    dynamic_sampling_rounds: int
    reward_clip_range: list[float] | None
    reward_clip_quantiles: list[float] | None
    reward_clip_on: str
    curriculum: str
    difficulty_column: str | None
    curriculum_goal: float
    curriculum_exploration: float
    task_column: str | None
    task_mixing: str
    task_weights: dict[str, float] | str | None
    task_power: float
    task_floor: float
    task_advantages: bool
    skip_zero_advantage: bool
    rollout: str
    kl_target: float | None
    kl_horizon: float
    monitor: bool
    on_alarm: dict[str, str] | str | None
    eval_metrics: list[str] | None
    eval_temperature: float | None
    eval_pass_at: list[int] | None
    eval_pass_threshold: float
    eval_patience: int | None

    def __post_init__(self) -> None:
        if self.evaluates_held_out:
            self._fill_in_evaluation()
        if self.group_size == "single":
            self._fit_num_generations()
        super().__post_init__()
        if self.group_size == "single":
            self._compare_with_batch()
        if self.evaluates_held_out:
            self._check_evaluation()
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("curriculum", self.curriculum, CURRICULA)
        _check_choice("rollout", self.rollout, ROLLOUTS)
        check_clipping(self.reward_clip_range, self.reward_clip_quantiles, self.reward_clip_on)
        if isinstance(self.generation_kwargs, dict) and self.generation_kwargs.get("seed") is not None:
            raise ValueError(
                f"generation_kwargs={self.generation_kwargs} has a seed, which makes all completions of a prompt equal "
                "where each is generated on its own: take it out, and set `seed`, or the --seed of vLLM's server"
            )

        self._check_baseline()
        smallest, largest = self.group_size_bounds
        if smallest < 1 or (smallest < 2 and self.needs_siblings):
            raise ValueError(
                f"min_group_size={smallest} is below 2: a group of one has no baseline in baseline={self.baseline!r}. "
                "Use at least 2, or baseline='batch', 'predicted' or 'shrunk'"
            )
        if smallest > largest:
            raise ValueError(f"min_group_size={smallest} exceeds max_group_size={largest}: lower one of them")
        if self.group_size != "fixed":
            self.check_group_sizes()
        if self.group_size == "variance":
            self.check_variance_sizes()
        if not self.group_std_threshold >= 0:
            raise ValueError(f"group_std_threshold={self.group_std_threshold} must not be negative: try 0.1")
        if self.dynamic_sampling_rounds < 0:
            raise ValueError(
                f"dynamic_sampling_rounds={self.dynamic_sampling_rounds} must not be negative: use 0 to switch it off"
            )
        if self.curriculum in ("staged", "target") and self.difficulty_column is None:
            raise ValueError(
                f"curriculum={self.curriculum!r} needs difficulty_column, the dataset column with the difficulty: set "
                "it, or use curriculum='online', which needs none"
            )
        if not math.isfinite(self.curriculum_goal):
            raise ValueError(f"curriculum_goal={self.curriculum_goal} must be finite: try 0.5")
        if not 0 <= self.curriculum_exploration <= 1:
            raise ValueError(f"curriculum_exploration={self.curriculum_exploration} must be between 0 and 1: try 0.1")
        self._check_tasks()
        if self.skip_zero_advantage:
            self._check_skipping()
        if self.kl_target is not None:
            check_kl(self.kl_target, self.kl_horizon, self.beta)
        if self.on_alarm is not None:
            check_on_alarm(self.on_alarm)
            if not self.monitor:
                raise ValueError(f"on_alarm={self.on_alarm} needs monitor=True, which raises the alarms: set it")
            if self.logging_strategy == IntervalStrategy.NO:
                raise ValueError(
                    f"on_alarm={self.on_alarm} needs logs, which the alarms read, and logging_strategy='no' makes "
                    "none: leave it out"
                )

    @property
    def evaluates_held_out(self) -> bool:
        """Whether an option asks for evaluation on held-out answers."""
        options = (self.eval_metrics, self.eval_temperature, self.eval_pass_at, self.eval_patience)
        return any(option is not None for option in options)

    def _fill_in_evaluation(self) -> None:
        """What TRL and transformers would take from the training, or from a loss that held-out answers do not have."""
        filled: dict[str, Any] = {}
        if not self.eval_temperature:
            filled["num_generations_eval"] = 1  # a greedy answer has no siblings
        if self.load_best_model_at_end or self.save_strategy == "best":
            filled["metric_for_best_model"] = "reward"
        for name, value in filled.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _fit_num_generations(self) -> None:
        """
        TRL wants a divisor of the batch, also where `num_generations` sizes no group: the largest up to what was set.

        Without one, TRL says so.
        """
        rows = self.generation_batch_size
        if rows is None:
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            rows = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1")) * steps
        divisors = [n for n in range(2, self.num_generations + 1) if rows % n == 0] or [rows]
        if divisors[-1] >= 2:
            setattr(self, "num_generations", divisors[-1])  # noqa: B010 (TRL's type is looser than mypy's)

    def _compare_with_batch(self) -> None:
        """One completion a prompt cannot be compared within its group, so the batch is the default there."""
        if self.baseline == "group":
            self.baseline = "batch"
        if self.scale_rewards == "group":
            setattr(self, "scale_rewards", "batch")  # noqa: B010

    def _check_evaluation(self) -> None:
        num_samples = self.num_generations_eval or self.num_generations
        options = (self.eval_temperature, self.eval_pass_at or (), self.eval_pass_threshold, self.eval_patience)
        check_held_out(num_samples, *options)

    def _check_skipping(self) -> None:
        """Raise `ValueError` when a row without advantage has a gradient all the same."""
        for name, neutral, effect in (
            ("beta", 0.0, "the KL term gives rows without advantage a gradient"),
            ("entropy_coef", 0.0, "the entropy bonus gives rows without advantage a gradient"),
            ("use_adaptive_entropy", False, "the entropy bonus gives rows without advantage a gradient"),
            ("top_entropy_quantile", 1.0, "rows without advantage count in the quantile that masks tokens"),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"skip_zero_advantage=True would change the gradient, since with {name}={getattr(self, name)} "
                    f"{effect}: set skip_zero_advantage=False or {name}={neutral}"
                )

    def _check_tasks(self) -> None:
        """Raise `ValueError` for options of tasks that have no effect, or cannot work."""
        _check_choice("task_mixing", self.task_mixing, TASK_MIXINGS)
        for name, unset in (("task_mixing", "none"), ("task_weights", None), ("task_advantages", False)):
            if self.task_column is None and getattr(self, name) != unset:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs task_column, the dataset column that names the task of a "
                    "prompt: set it"
                )
        if (self.task_weights is None) == (self.task_mixing == "weights"):
            raise ValueError(
                f"task_weights={self.task_weights} and task_mixing={self.task_mixing!r} do not fit: task_mixing="
                "'weights' takes task_weights, such as {'math': 2, 'chat': 1}, and nothing else does"
            )
        check_task_mixing(self.task_weights, self.task_power, self.task_floor)
        if self.task_advantages and self.scale_rewards == "group":
            raise ValueError(
                "task_advantages=True has no effect on scale_rewards='group', which compares the completions of one "
                "prompt with each other: set scale_rewards='batch', or leave task_advantages out"
            )
        if self.task_advantages and self.scale_rewards == "none" and self.baseline == "group":
            raise ValueError(
                "task_advantages=True has no effect on baseline='group' with scale_rewards='none': set "
                "scale_rewards='batch' or another baseline, or leave task_advantages out"
            )

    @property
    def needs_siblings(self) -> bool:
        """Whether a completion is compared with others of its prompt, so that a group of one teaches nothing."""
        return self.baseline in ("group", "leave_one_out")

    def _check_baseline(self) -> None:
        """Raise `ValueError` for baselines that cannot work with the other options."""
        _check_choice("baseline", self.baseline, BASELINES)
        if not 0 <= self.baseline_shift < math.inf:
            raise ValueError(f"baseline_shift={self.baseline_shift} must be finite and not negative: try 0.5")
        if self.baseline == "group" and self.baseline_shift > 0:
            raise ValueError(
                f"baseline_shift={self.baseline_shift} has no effect on baseline='group', which is TRL's: set "
                "baseline='batch', 'predicted', 'shrunk' or 'leave_one_out', or leave baseline_shift out"
            )
        if self.token_weighted_baseline and self.needs_siblings:
            raise ValueError(
                f"token_weighted_baseline=True weights the mean of the batch, and baseline={self.baseline!r} reads the "
                "mean of a group: set baseline='batch', 'predicted' or 'shrunk', or leave token_weighted_baseline out"
            )
        if self.token_weighted_baseline and self.task_advantages:
            raise ValueError(
                "token_weighted_baseline=True weights the mean and the spread of a batch, and task_advantages=True "
                "takes those of earlier batches, whose tokens are not kept: leave one of them out"
            )
        if self.baseline != "group" and self.scale_rewards not in ("batch", "none"):
            raise ValueError(
                f"baseline={self.baseline!r} compares rewards across prompts, and scale_rewards={self.scale_rewards!r} "
                "divides them by the spread of one group: set scale_rewards='batch' or 'none'"
            )
        if self.group_size == "single" and self.needs_siblings:
            raise ValueError(
                f"group_size='single' leaves a completion alone in its group, and baseline={self.baseline!r} compares "
                "it with others of its group: set baseline='batch' or 'predicted', or another group_size"
            )
        if self.group_size == "single" and self.dynamic_sampling_rounds > 0:
            raise ValueError(
                "dynamic_sampling_rounds replaces groups without spread, and with group_size='single' no group has "
                "any: set dynamic_sampling_rounds=0, and curriculum='predicted' to avoid hopeless prompts"
            )
        if self.reuse_drift_limit is not None:
            if not self.reuse_drift_limit > 0:
                raise ValueError(f"reuse_drift_limit={self.reuse_drift_limit} must be positive: try 0.1")
            if self.num_iterations == 1:
                raise ValueError(
                    f"reuse_drift_limit={self.reuse_drift_limit} guards further passes over a batch, and "
                    "num_iterations=1 makes none: raise num_iterations, or leave reuse_drift_limit out"
                )

    @property
    def group_size_bounds(self) -> tuple[int, int]:
        """Completions of the smallest and of the largest group."""
        if self.group_size == "single":  # larger groups only where the dataset is smaller than the batch
            return 1, self.generation_batch_size
        smallest = max(2, self.num_generations // 2) if self.min_group_size is None else self.min_group_size
        return smallest, 2 * self.num_generations if self.max_group_size is None else self.max_group_size

    def check_group_sizes(self) -> None:
        """Raise `ValueError` when groups of different sizes cannot fill a generation batch."""
        smallest, largest = self.group_size_bounds
        if not smallest <= self.num_generations <= largest:
            raise ValueError(
                f"num_generations={self.num_generations} is outside min_group_size={smallest} to "
                f"max_group_size={largest}: it is the mean group size, so set it between them"
            )
        if self.generation_batch_size < 2 * smallest:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} rows cannot hold two groups of "
                f"min_group_size={smallest}, and one group has nothing to trade with: raise "
                "per_device_train_batch_size, steps_per_generation or gradient_accumulation_steps, or lower "
                "min_group_size"
            )

    def check_variance_sizes(self) -> None:
        """Raise `ValueError` when no group could give a row to another, the number of prompts being that of TRL."""
        smallest, largest = self.group_size_bounds
        if self.num_generations in (smallest, largest):
            raise ValueError(
                f"num_generations={self.num_generations} equals a bound of the group size ({smallest} to {largest}), "
                "so no group could give a row to another: set min_group_size below and max_group_size above it, or "
                "raise num_generations"
            )
        if self.generation_batch_size < 2 * self.num_generations:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} rows hold one prompt with num_generations="
                f"{self.num_generations} completions, and one group has nothing to trade with: raise "
                "per_device_train_batch_size, steps_per_generation or gradient_accumulation_steps, or lower "
                "num_generations"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, choices))}")


def check_clipping(clip_range: Sequence[float] | None, quantiles: Sequence[float] | None, on: str) -> None:
    """Raise `ValueError` with value, rule and remedy for clipping options that make no sense."""
    if clip_range is not None and not (len(clip_range) == 2 and clip_range[0] < clip_range[1]):
        raise ValueError(f"reward_clip_range={list(clip_range)} must be [low, high] with low < high, such as [-10, 10]")
    if quantiles is not None and not (len(quantiles) == 2 and 0 <= quantiles[0] < quantiles[1] <= 1):
        raise ValueError(
            f"reward_clip_quantiles={list(quantiles)} must be [low, high] with 0 <= low < high <= 1, "
            "such as [0.05, 0.95]"
        )
    if on not in ("each", "total"):
        raise ValueError(f"reward_clip_on={on!r} is unknown: use 'each' or 'total'")


def check_kl(kl_target: float, kl_horizon: float, beta: float | None = None) -> None:
    """Raise `ValueError` with value, rule and remedy for options of adaptive KL that cannot work."""
    if not (0 < kl_target < math.inf):
        raise ValueError(f"kl_target={kl_target} must be positive and finite: try 0.05 (nats per token)")
    if not (0 < kl_horizon < math.inf):
        raise ValueError(f"kl_horizon={kl_horizon} must be positive and finite: try 10000 (rollouts)")
    if beta is not None and not beta > 0:
        raise ValueError(
            f"kl_target={kl_target} needs beta above 0, and beta={beta}: the rule multiplies β, so it can never leave "
            "0, and TRL loads no reference model for it. Set beta, for example to 0.04, or leave kl_target unset"
        )


def check_held_out(
    num_samples: int, temperature: float | None, pass_at: Sequence[int], pass_threshold: float, patience: int | None
) -> None:
    """Raise `ValueError` with value, rule and remedy for options of held-out evaluation that cannot work."""
    if num_samples < 1:
        raise ValueError(f"num_generations_eval={num_samples} leaves no answer: use at least 1")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"eval_temperature={temperature} must be finite and not negative: use 0 for greedy answers")
    if temperature == 0 and num_samples > 1:
        raise ValueError(
            f"num_generations_eval={num_samples} greedy answers to a prompt are all equal: set num_generations_eval=1, "
            "or eval_temperature above 0"
        )
    if not isinstance(pass_at, list | tuple):
        raise ValueError(f"eval_pass_at={pass_at!r} is no list: write [{pass_at}]")
    wrong = [k for k in pass_at if not 1 <= k <= num_samples]
    if wrong:
        raise ValueError(
            f"eval_pass_at={list(pass_at)} asks for pass@{wrong[0]} of num_generations_eval={num_samples} answers to a "
            "prompt: raise num_generations_eval, or use from 1 to that number"
        )
    if not math.isfinite(pass_threshold):
        raise ValueError(f"eval_pass_threshold={pass_threshold} must be finite: try 1.0")
    if patience is not None and patience < 1:
        raise ValueError(f"eval_patience={patience} stops before it looks: use at least 1, or leave it out")


def check_task_mixing(weights: Any, power: float, floor: float) -> None:
    """Raise `ValueError` with value, rule and remedy for shares of tasks that make no sense."""
    if weights is not None:
        values = weights.values() if isinstance(weights, Mapping) else ()
        are_numbers = all(isinstance(value, int | float) and 0 <= value < math.inf for value in values)
        if not (values and are_numbers and any(value > 0 for value in values)):
            raise ValueError(
                f'task_weights={weights!r} must map tasks to weights, such as {{"math": 2, "chat": 1}} (JSON on the '
                "command line): finite numbers, none below 0, and one above"
            )
    if not 0 <= power < math.inf:
        raise ValueError(f"task_power={power} must be finite and not negative: try 0.5")
    if not 0 <= floor <= 1:
        raise ValueError(f"task_floor={floor} must be between 0 (no floor) and 1 (all tasks alike): try 0.2")


def check_on_alarm(on_alarm: Any, alarm_names: Sequence[str] = ALARMS) -> None:
    """Raise `ValueError` with value, rule and remedy unless `on_alarm` maps names of alarms to names of actions."""
    if not isinstance(on_alarm, Mapping):
        raise ValueError(
            f'on_alarm={on_alarm!r} must map alarms to actions, such as {{"kl_spike": "cool_lr"}} (JSON on the command '
            "line)"
        )
    for alarm, action in on_alarm.items():
        if alarm not in alarm_names:
            raise ValueError(f"on_alarm has no alarm {alarm!r}: use one of {', '.join(map(repr, alarm_names))}")
        if action not in ACTIONS:
            raise ValueError(f"on_alarm asks for {action!r} on {alarm!r}: use one of {', '.join(map(repr, ACTIONS))}")
