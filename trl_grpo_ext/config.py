"""[`AdaptiveGRPOConfig`]: what a YAML file or a command line can set."""

import math
from dataclasses import dataclass, field

from transformers.trainer_utils import IntervalStrategy
from trl import GRPOConfig

from .observe.actions import check_on_alarm
from .observe.alarms import make_alarms
from .observe.kl import check_kl
from .shape.clipping import check_clipping

GROUP_SIZES = ("fixed", "threshold", "variance")
CURRICULA = ("none", "staged", "online", "target")
ROLLOUTS = ("single", "multi_turn", "hierarchical")


@dataclass
class AdaptiveGRPOConfig(GRPOConfig):
    """
    Configuration of [`AdaptiveGRPOTrainer`].

    Holds only what [`~trl.GRPOConfig`] does not have; all of that is accepted too. With nothing set, training is bit
    for bit that of TRL. Finer knobs are arguments of the callbacks, which can be passed to the trainer instead.

    Parameters:
        group_size (`str`, *optional*, defaults to `"fixed"`):
            How many completions a prompt gets: `"fixed"` gives each `num_generations`; `"threshold"` one more at its
            next visit if its rewards varied by more than `group_std_threshold`, else one fewer; `"variance"` gives
            uncertain prompts more of the same number of rows, from a decayed posterior per prompt.
        min_group_size (`int`, *optional*):
            Smallest group. Defaults to half of `num_generations`, at least 2.
        max_group_size (`int`, *optional*):
            Largest group. Defaults to twice `num_generations`.
        group_std_threshold (`float`, *optional*, defaults to `0.1`):
            For `group_size="threshold"`: the standard deviation above which a group grows, in units of the reward.
        dynamic_sampling_rounds (`int`, *optional*, defaults to `0`):
            Largest number of rounds in which groups with equal rewards are replaced by fresh prompts.
        reward_clip_range (`list[float]`, *optional*):
            Smallest and largest reward, such as `[-10, 10]`.
        reward_clip_quantiles (`list[float]`, *optional*):
            Quantiles of the batch to clip rewards to, such as `[0.05, 0.95]`. Applied after `reward_clip_range`.
        reward_clip_on (`str`, *optional*, defaults to `"each"`):
            What is clipped: `"each"` reward function, or the `"total"`.
        curriculum (`str`, *optional*, defaults to `"none"`):
            Which prompts: `"none"` walks the dataset in shuffled epochs; `"staged"` goes from easy to hard by
            `difficulty_column`; `"online"` draws prompts whose rewards vary now; `"target"` draws prompts near a
            difficulty that rises with the reward.
        difficulty_column (`str`, *optional*):
            Dataset column with the difficulty, as numbers or level names.
        difficulty_levels (`list[str]`, *optional*, defaults to `["easy", "medium", "hard"]`):
            Level names from easy to hard. Numbers are cut into as many levels.
        curriculum_goal (`float`, *optional*, defaults to `0.5`):
            For `curriculum="target"`: the mean reward at which the target difficulty rests.
        curriculum_exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts that any curriculum draws from the whole dataset.
        share_prompts (`bool`, *optional*, defaults to `False`):
            Whether to compute a prompt once for all its completions, in the forward passes of the update and in
            generation with transformers. The gradient is the same up to rounding.
        skip_zero_advantage (`bool`, *optional*, defaults to `False`):
            Whether to leave rows whose advantage is zero out of the update. The gradient is the same; needs `beta=0`.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            Whether to generate from a copy of the weights into which the LoRA adapter is merged, with transformers. It
            saves two small matrix products per layer and token, and takes room for the adapted weights once more.
        rollout (`str`, *optional*, defaults to `"single"`):
            What is sampled for a prompt: `"single"` answers, `"multi_turn"` conversations, or `"hierarchical"` plans
            and implementations of each.
        history (`str`, *optional*, defaults to `"shared"`):
            For `rollout="multi_turn"`: `"shared"` compares answers to one history at each turn; `"independent"`
            compares whole conversations.
        carry (`str`, *optional*, defaults to `"random"`):
            For `history="shared"`: which answer carries the conversation on, `"random"` or `"best"`.
        turn_columns (`list[str]`, *optional*):
            For `rollout="multi_turn"`: dataset columns with a list of one value per turn, of which reward functions get
            that of the turn.
        num_plans (`int`, *optional*, defaults to `4`):
            For `rollout="hierarchical"`: plans for each prompt.
        num_implementations (`int`, *optional*, defaults to `4`):
            For `rollout="hierarchical"`: implementations of each plan.
        plan_template (`str`, *optional*):
            For `rollout="hierarchical"`: what the user says to get a plan, with `{prompt}` in it.
        implementation_template (`str`, *optional*):
            For `rollout="hierarchical"`: what the user says after the plan.
        max_conversation_length (`int`, *optional*):
            For a rollout of several turns: most tokens of a conversation. Defaults to what the model can hold.
        kl_target (`float`, *optional*):
            KL to the reference model that `beta` is adapted to hold, in nats per token. Needs `beta` above 0.
        kl_horizon (`float`, *optional*, defaults to `10000.0`):
            Time constant of that adaptation, in completions.
        monitor (`bool`, *optional*, defaults to `False`):
            Whether to log what TRL does not, keep a record of the run in `<output_dir>/monitor`, and raise alarms.
        on_alarm (`dict[str, str]` or `str`, *optional*):
            For `monitor`: what an alarm does, such as `{"kl_spike": "adapt_beta"}`; a JSON string on the command line.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "on_alarm"]  # noqa: RUF012 (transformers' idiom)

    group_size: str = field(
        default="fixed",
        metadata={
            "help": "How many completions a prompt gets: 'fixed' (num_generations), 'threshold' (one more or one fewer "
            "at its next visit, by the standard deviation of its rewards) or 'variance' (uncertain prompts get more of "
            "the same number of rows).",
            "choices": list(GROUP_SIZES),
        },
    )
    min_group_size: int | None = field(
        default=None,
        metadata={"help": "Smallest group. Defaults to half of num_generations, at least 2."},
    )
    max_group_size: int | None = field(
        default=None,
        metadata={"help": "Largest group. Defaults to twice num_generations."},
    )
    group_std_threshold: float = field(
        default=0.1,
        metadata={
            "help": "For group_size='threshold': the standard deviation above which a group grows, in units of the "
            "reward."
        },
    )
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={"help": "Largest number of rounds in which groups with equal rewards are replaced by fresh prompts."},
    )
    reward_clip_range: list[float] | None = field(
        default=None,
        metadata={"help": "Smallest and largest reward, such as -10 10."},
    )
    reward_clip_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "Quantiles of the batch to clip rewards to, such as 0.05 0.95. Applied after reward_clip_range."
        },
    )
    reward_clip_on: str = field(
        default="each",
        metadata={"help": "What is clipped: 'each' reward function, or the 'total'.", "choices": ["each", "total"]},
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "Which prompts: 'none' (shuffled epochs), 'staged' (easy to hard by difficulty_column), 'online' "
            "(prompts whose rewards vary now) or 'target' (prompts near a difficulty that rises with the reward).",
            "choices": list(CURRICULA),
        },
    )
    difficulty_column: str | None = field(
        default=None,
        metadata={"help": "Dataset column with the difficulty, as numbers or level names."},
    )
    difficulty_levels: list[str] = field(
        default_factory=lambda: ["easy", "medium", "hard"],
        metadata={"help": "Level names from easy to hard. Numbers are cut into as many levels."},
    )
    curriculum_goal: float = field(
        default=0.5,
        metadata={"help": "For curriculum='target': the mean reward at which the target difficulty rests."},
    )
    curriculum_exploration: float = field(
        default=0.1,
        metadata={"help": "Share of the prompts that any curriculum draws from the whole dataset."},
    )
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute a prompt once for all its completions, in the update and in generation with "
            "transformers. The gradient is the same up to rounding."
        },
    )
    skip_zero_advantage: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave rows whose advantage is zero out of the update. The gradient is the same; needs "
            "beta=0."
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Whether to generate from a copy of the weights into which the LoRA adapter is merged, with "
            "transformers. It takes room for the adapted weights once more."
        },
    )
    rollout: str = field(
        default="single",
        metadata={
            "help": "What is sampled for a prompt: 'single' answers, 'multi_turn' conversations, or 'hierarchical' "
            "plans and implementations of each.",
            "choices": list(ROLLOUTS),
        },
    )
    history: str = field(
        default="shared",
        metadata={
            "help": "For rollout='multi_turn': 'shared' compares answers to one history at each turn, 'independent' "
            "compares whole conversations.",
            "choices": ["shared", "independent"],
        },
    )
    carry: str = field(
        default="random",
        metadata={
            "help": "For history='shared': which answer carries the conversation on.",
            "choices": ["random", "best"],
        },
    )
    turn_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "For rollout='multi_turn': dataset columns with a list of one value per turn, of which reward "
            "functions get that of the turn."
        },
    )
    num_plans: int = field(default=4, metadata={"help": "For rollout='hierarchical': plans for each prompt."})
    num_implementations: int = field(
        default=4, metadata={"help": "For rollout='hierarchical': implementations of each plan."}
    )
    plan_template: str | None = field(
        default=None,
        metadata={"help": "For rollout='hierarchical': what the user says to get a plan, with {prompt} in it."},
    )
    implementation_template: str | None = field(
        default=None, metadata={"help": "For rollout='hierarchical': what the user says after the plan."}
    )
    max_conversation_length: int | None = field(
        default=None,
        metadata={
            "help": "For a rollout of several turns: most tokens of a conversation. Defaults to what the model holds."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "KL to the reference model that beta is adapted to hold, in nats per token. Needs beta above 0."
        },
    )
    kl_horizon: float = field(
        default=10_000.0,
        metadata={"help": "For kl_target: time constant of the adaptation, in completions."},
    )
    monitor: bool = field(
        default=False,
        metadata={
            "help": "Whether to log what TRL does not, keep a record of the run in <output_dir>/monitor, and raise "
            "alarms."
        },
    )
    on_alarm: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "For monitor: what an alarm does (adapt_beta, cool_lr, cap_group_size or save_and_stop), such as "
            '{"kl_spike": "adapt_beta"}.'
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("curriculum", self.curriculum, CURRICULA)
        _check_choice("rollout", self.rollout, ROLLOUTS)
        check_clipping(self.reward_clip_range, self.reward_clip_quantiles, self.reward_clip_on)

        if self.min_group_size is None:
            self.min_group_size = max(2, self.num_generations // 2)
        if self.max_group_size is None:
            self.max_group_size = 2 * self.num_generations
        if self.min_group_size < 2:
            raise ValueError(
                f"min_group_size={self.min_group_size} is below 2: a group of one has no baseline, use at least 2"
            )
        if self.min_group_size > self.max_group_size:
            raise ValueError(
                f"min_group_size={self.min_group_size} exceeds max_group_size={self.max_group_size}: lower one of them"
            )
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
        if self.skip_zero_advantage:
            self._check_skipping()
        if self.kl_target is not None:
            check_kl(self.kl_target, self.kl_horizon, self.beta)
        if self.on_alarm is not None:
            check_on_alarm(self.on_alarm, [alarm.name for alarm in make_alarms()])
            if not self.monitor:
                raise ValueError(f"on_alarm={self.on_alarm} needs monitor=True, which raises the alarms: set it")
            if self.logging_strategy == IntervalStrategy.NO:
                raise ValueError(
                    f"on_alarm={self.on_alarm} needs logs, which the alarms read, and logging_strategy='no' makes "
                    "none: leave it out"
                )

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

    @property
    def group_size_bounds(self) -> tuple[int, int]:
        """Completions of the smallest and of the largest group."""
        assert self.min_group_size is not None  # __post_init__ has set both
        assert self.max_group_size is not None
        return self.min_group_size, self.max_group_size

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
