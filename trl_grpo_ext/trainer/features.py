"""From options to callbacks: what each option of [`AdaptiveGRPOConfig`] switches on."""

from ..config import AdaptiveGRPOConfig
from ..credit.baselines import BaselineCallback
from ..credit.tasks import TaskAdvantagesCallback
from ..hooks.callback import GRPOCallback
from ..observe.evaluation import HeldOutCallback
from ..observe.kl import AdaptiveKLCallback
from ..observe.monitor import MonitorCallback
from ..observe.tasks import TaskCallback
from ..plan.curriculum import OnlineCurriculumCallback, StagedCurriculumCallback, TargetCurriculumCallback
from ..plan.group_size import SingleGroupSizeCallback, ThresholdGroupSizeCallback, VarianceGroupSizeCallback
from ..plan.predicted import PredictedCurriculumCallback
from ..plan.tasks import TaskMixingCallback
from ..rollouts import HierarchicalCallback, MultiTurnCallback
from ..rollouts.hierarchical import IMPLEMENTATION_TEMPLATE, PLAN_TEMPLATE
from ..shape.clipping import RewardClipCallback
from ..shape.resampling import DynamicSamplingCallback
from .reuse import ReuseGuardCallback


def callbacks_of(args: AdaptiveGRPOConfig) -> list[GRPOCallback]:
    """The callbacks behind the options. They have no access that a user's callback does not have."""
    callbacks: list[GRPOCallback] = []
    column, levels, exploration = args.difficulty_column, args.difficulty_levels, args.curriculum_exploration
    if args.curriculum == "staged":
        callbacks.append(StagedCurriculumCallback(column, levels, exploration=exploration))
    elif args.curriculum == "target":
        goal = args.curriculum_goal
        callbacks.append(TargetCurriculumCallback(column, levels, goal=goal, exploration=exploration))
    elif args.curriculum == "predicted":
        callbacks.append(PredictedCurriculumCallback(exploration=exploration))
    elif args.curriculum == "online":
        callbacks.append(OnlineCurriculumCallback(exploration=exploration))
    if args.task_column is not None and args.task_mixing != "none":  # behind the curriculum, inside of which it mixes
        assert not isinstance(args.task_weights, str)  # __post_init__ has parsed it
        shares = (args.task_weights, args.task_power, args.task_floor)
        callbacks.append(TaskMixingCallback(args.task_column, args.task_mixing, *shares))
    if args.group_size == "single":
        callbacks.append(SingleGroupSizeCallback())
    elif args.group_size == "threshold":
        callbacks.append(ThresholdGroupSizeCallback(args.group_std_threshold))
    elif args.group_size == "variance":
        callbacks.append(VarianceGroupSizeCallback())
    if args.reward_clip_range is not None or args.reward_clip_quantiles is not None:
        callbacks.append(RewardClipCallback(args.reward_clip_range, args.reward_clip_quantiles, args.reward_clip_on))
    if args.task_column is not None and args.task_advantages:
        callbacks.append(TaskAdvantagesCallback(args.task_column, args.baseline, args.baseline_shift))
    elif args.baseline != "group":
        callbacks.append(BaselineCallback(args.baseline, args.baseline_shift, by_tokens=args.token_weighted_baseline))
    if args.dynamic_sampling_rounds > 0:
        callbacks.append(DynamicSamplingCallback(args.dynamic_sampling_rounds))
    if args.reuse_drift_limit is not None:
        callbacks.append(ReuseGuardCallback(args.reuse_drift_limit))
    length = args.max_conversation_length
    if args.rollout == "multi_turn":
        columns = args.turn_columns
        callbacks.append(
            MultiTurnCallback(args.history, carry=args.carry, turn_columns=columns, max_conversation_length=length)
        )
    elif args.rollout == "hierarchical":
        templates = (args.plan_template or PLAN_TEMPLATE, args.implementation_template or IMPLEMENTATION_TEMPLATE)
        callbacks.append(HierarchicalCallback(args.num_plans, args.num_implementations, *templates, length))
    if args.kl_target is not None:
        callbacks.append(AdaptiveKLCallback(args.kl_target, args.kl_horizon))
    if args.evaluates_held_out:
        passing = (args.eval_pass_at or (), args.eval_pass_threshold)
        num_samples = args.num_generations_eval or args.num_generations
        given = (args.eval_metrics or (), num_samples, args.eval_temperature, *passing, args.eval_patience)
        callbacks.append(HeldOutCallback(*given))
    if args.task_column is not None:
        callbacks.append(TaskCallback(args.task_column))
    if args.monitor:
        assert not isinstance(args.on_alarm, str)  # __post_init__ has parsed it
        callbacks.append(MonitorCallback(args.on_alarm))
    return callbacks
