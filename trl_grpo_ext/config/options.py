"""[`AdaptiveGRPOConfig`]: every option of this package."""

import dataclasses
import inspect
from dataclasses import dataclass, field

from trl import GRPOConfig

from .rules import BASELINES, CURRICULA, GROUP_SIZES, ROLLOUTS, TASK_MIXINGS, OptionRules


@dataclass
class AdaptiveGRPOConfig(OptionRules):
    """
    Configuration of [`AdaptiveGRPOTrainer`].

    Takes every option of [`~trl.GRPOConfig`], and those below. With nothing set, training is bit for bit that of TRL.
    Finer settings are arguments of the callbacks, which can be passed to the trainer instead.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "on_alarm", "task_weights"]  # noqa: RUF012 (transformers' idiom)

    group_size: str = field(
        default="fixed",
        metadata={
            "help": (
                "How many completions a prompt gets. 'fixed': num_generations. 'single': one, so that a batch holds as "
                "many prompts as rows; baseline and scale_rewards are then 'batch' by default. 'threshold': one more "
                "at its next visit if its rewards varied by more than group_std_threshold, else one fewer. "
                "'variance': uncertain prompts get more of the same number of rows."
            ),
            "choices": list(GROUP_SIZES),
        },
    )
    min_group_size: int | None = field(
        default=None,
        metadata={
            "help": (
                "Smallest group. Defaults to half of num_generations, at least 2. 1 needs another baseline than the "
                "group's."
            ),
        },
    )
    max_group_size: int | None = field(
        default=None,
        metadata={
            "help": ("Largest group. Defaults to twice num_generations."),
        },
    )
    group_std_threshold: float = field(
        default=0.1,
        metadata={
            "help": (
                "For group_size='threshold': the standard deviation above which a group grows, in units of the reward."
            ),
        },
    )
    baseline: str = field(
        default="group",
        metadata={
            "help": (
                "What a reward is compared with. 'group': the mean of its group, as in TRL. 'leave_one_out': the mean "
                "of the others of its group. 'batch': the mean of the others of the batch. 'predicted': a guess for "
                "the prompt from its features, or the mean of the batch where that is lower. 'shrunk': that guess, "
                "corrected by the others of the group. All but 'group' need scale_rewards='batch' or 'none'."
            ),
            "choices": list(BASELINES),
        },
    )
    baseline_shift: float = field(
        default=0.0,
        metadata={
            "help": (
                "How far below its baseline a reward is compared, in standard deviations of the rewards, such as 0.5. "
                "For every baseline but 'group'."
            ),
        },
    )
    token_weighted_baseline: bool = field(
        default=False,
        metadata={
            "help": (
                "Weight each completion by its tokens in the mean and the spread of the batch, as token-mean losses "
                "such as loss_type='dapo' weight it in the gradient. For baseline='batch', 'predicted' and 'shrunk'."
            ),
        },
    )
    reuse_drift_limit: float | None = field(
        default=None,
        metadata={
            "help": (
                "For num_iterations above 1: no further update on a batch once the mean squared log-ratio between the "
                "policy and the policy that sampled the batch exceeds this, such as 0.1."
            ),
        },
    )
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={
            "help": ("Largest number of rounds in which groups with equal rewards are replaced by fresh prompts."),
        },
    )
    reward_clip_range: list[float] | None = field(
        default=None,
        metadata={
            "help": ("Smallest and largest reward, such as [-10, 10]."),
        },
    )
    reward_clip_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": (
                "Quantiles of the batch to clip rewards to, such as [0.05, 0.95]. Applied after reward_clip_range."
            ),
        },
    )
    reward_clip_on: str = field(
        default="each",
        metadata={
            "help": ("What is clipped: 'each' reward function, or the 'total'."),
            "choices": ["each", "total"],
        },
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": (
                "Which prompts. 'none': shuffled epochs. 'staged': from easy to hard by difficulty_column. 'online': "
                "prompts whose rewards vary now. 'predicted': the same, and prompts never drawn by their text, too. "
                "'target': prompts near a difficulty that rises with the reward."
            ),
            "choices": list(CURRICULA),
        },
    )
    difficulty_column: str | None = field(
        default=None,
        metadata={
            "help": ("Dataset column with the difficulty, as numbers or level names."),
        },
    )
    difficulty_levels: list[str] = field(
        default_factory=lambda: ["easy", "medium", "hard"],
        metadata={
            "help": ("Level names from easy to hard. Numbers are cut into as many levels."),
        },
    )
    curriculum_goal: float = field(
        default=0.5,
        metadata={
            "help": ("For curriculum='target': the mean reward at which the target difficulty rests."),
        },
    )
    curriculum_exploration: float = field(
        default=0.1,
        metadata={
            "help": ("Share of the prompts that any curriculum draws from the whole dataset."),
        },
    )
    task_column: str | None = field(
        default=None,
        metadata={
            "help": ("Dataset column with the name of each prompt's task, for metrics and alarms of each task."),
        },
    )
    task_mixing: str = field(
        default="none",
        metadata={
            "help": (
                "Which share of the prompts each task gets, with task_column. 'none': what the dataset or the "
                "curriculum gives it. 'weights': task_weights. 'size': its number of prompts to the power task_power. "
                "'adaptive': more where more can be learnt now, with a floor."
            ),
            "choices": list(TASK_MIXINGS),
        },
    )
    task_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": (
                "For task_mixing='weights': weight of each task, such as {'math': 2, 'chat': 1}; a JSON string on the "
                "command line."
            ),
        },
    )
    task_power: float = field(
        default=0.5,
        metadata={
            "help": ("For task_mixing='size': 1 is the share in the dataset, 0 gives all tasks the same."),
        },
    )
    task_floor: float = field(
        default=0.2,
        metadata={
            "help": ("For task_mixing='adaptive': share of the prompts that all tasks share equally."),
        },
    )
    task_advantages: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether a completion is compared with its own task, with task_column: the mean of the batch, the "
                "guess, and the standard deviation of scale_rewards='batch' are then those of its task."
            ),
        },
    )
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to compute a prompt once for all its completions, in the forward passes of the update and in "
                "generation with transformers. The gradient is the same up to rounding."
            ),
        },
    )
    skip_zero_advantage: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to leave rows whose advantage is zero out of the update. The gradient is the same; needs "
                "beta=0."
            ),
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to generate from a copy of the weights into which the LoRA adapter is merged, with "
                "transformers. It saves two small matrix products per layer and token, and takes room for the adapted "
                "weights once more."
            ),
        },
    )
    rollout: str = field(
        default="single",
        metadata={
            "help": (
                "What is sampled for a prompt: 'single' answers, 'multi_turn' conversations, or 'hierarchical' plans "
                "and implementations of each."
            ),
            "choices": list(ROLLOUTS),
        },
    )
    history: str = field(
        default="shared",
        metadata={
            "help": (
                "For rollout='multi_turn': 'shared' compares answers to one history at each turn; 'independent' "
                "compares whole conversations."
            ),
            "choices": ["shared", "independent"],
        },
    )
    carry: str = field(
        default="random",
        metadata={
            "help": ("For history='shared': which answer carries the conversation on, 'random' or 'best'."),
            "choices": ["random", "best"],
        },
    )
    turn_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": (
                "For rollout='multi_turn': dataset columns with a list of one value per turn, of which reward "
                "functions get that of the turn."
            ),
        },
    )
    num_plans: int = field(
        default=4,
        metadata={
            "help": ("For rollout='hierarchical': plans for each prompt."),
        },
    )
    num_implementations: int = field(
        default=4,
        metadata={
            "help": ("For rollout='hierarchical': implementations of each plan."),
        },
    )
    plan_template: str | None = field(
        default=None,
        metadata={
            "help": ("For rollout='hierarchical': what the user says to get a plan, with {prompt} in it."),
        },
    )
    implementation_template: str | None = field(
        default=None,
        metadata={
            "help": ("For rollout='hierarchical': what the user says after the plan."),
        },
    )
    max_conversation_length: int | None = field(
        default=None,
        metadata={
            "help": (
                "For a rollout of several turns: most tokens of a conversation. Defaults to what the model can hold."
            ),
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": ("KL to the reference model that beta is adapted to hold, in nats per token. Needs beta above 0."),
        },
    )
    kl_horizon: float = field(
        default=10000.0,
        metadata={
            "help": ("Time constant of that adaptation, in completions."),
        },
    )
    monitor: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to log what TRL does not, keep a record of the run in <output_dir>/monitor, and raise alarms."
            ),
        },
    )
    on_alarm: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "For monitor: what an alarm does, such as {'kl_spike': 'adapt_beta'}; a JSON string on the command "
                "line."
            ),
        },
    )

    eval_metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "What to measure on eval_dataset besides the reward: expressions of rewards, such as 'Length()', or "
                "dotted paths of reward functions. This, or any other eval_ option of this table, evaluates on "
                "held-out answers in place of TRL's evaluation; ['reward'] measures nothing more."
            ),
        },
    )
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": (
                "Temperature of held-out answers, 0 for greedy ones. Defaults to 0, or to that of the training where "
                "num_generations_eval asks for several answers to each prompt."
            ),
        },
    )
    eval_pass_at: list[int] | None = field(
        default=None,
        metadata={
            "help": (
                "For which k to log pass@k of each of eval_metrics, or of the reward without any: how likely one of k "
                "answers passes. Needs num_generations_eval of at least k."
            ),
        },
    )
    eval_pass_threshold: float = field(
        default=1.0,
        metadata={
            "help": ("From which value of a metric on an answer passes, for eval_pass_at."),
        },
    )
    eval_patience: int | None = field(
        default=None,
        metadata={
            "help": (
                "Stop after so many evaluations in a row in which the lower bound of the gain since the start reached "
                "no new best. The gain is that of metric_for_best_model, or of the reward."
            ),
        },
    )


def _with_parameters(config: type) -> str:
    """The docstring of the class, with what each option's `help` says as its parameters."""
    lines = [inspect.cleandoc(config.__doc__ or ""), "", "Parameters:"]
    for option in dataclasses.fields(config):
        if option.name not in GRPOConfig.__dataclass_fields__:
            kind = getattr(option.type, "__name__", option.type) if isinstance(option.type, type) else option.type
            lines += [f"    {option.name} (`{kind}`):", f"        {option.metadata['help']}"]
    return "\n".join(lines) + "\n"


AdaptiveGRPOConfig.__doc__ = _with_parameters(AdaptiveGRPOConfig)
