"""Options that cannot work are refused at construction with value, rule and remedy; the rest reaches TRL's parser."""

import dataclasses
import sys
from functools import partial

import pytest
from datasets import IterableDataset
from kit import args_of, config_kwargs, count_vowels
from trl import GRPOConfig, TrlParser

from trl_grpo_ext import (
    AdaptiveGRPOConfig,
    AdaptiveGRPOTrainer,
    DynamicSamplingCallback,
    OnlineCurriculumCallback,
    RewardClipCallback,
    StagedCurriculumCallback,
    TargetCurriculumCallback,
    ThresholdGroupSizeCallback,
    VarianceGroupSizeCallback,
)
from trl_grpo_ext.host import seams

REFUSED = {
    "group_size": ({"group_size": "dynamic"}, "group_size='dynamic' is unknown: use one of 'fixed', 'single', 'thr"),
    "curriculum": ({"curriculum": "easy"}, "curriculum='easy' is unknown: use one of 'none', 'staged', 'online', 'pre"),
    "clip_on": ({"reward_clip_on": "all"}, "reward_clip_on='all' is unknown: use 'each' or 'total'"),
    "min_above_max": (
        {"min_group_size": 8, "max_group_size": 4},
        "min_group_size=8 exceeds max_group_size=4: lower one of them",
    ),
    "min_above_default_max": ({"min_group_size": 9}, "min_group_size=9 exceeds max_group_size=8: lower one"),
    "min_of_one": ({"min_group_size": 1}, "min_group_size=1 is below 2: .* Use at least 2"),
    "generations_below_min": (
        {"group_size": "variance", "min_group_size": 5},
        "num_generations=4 is outside min_group_size=5 to max_group_size=8: .* set it between them",
    ),
    "generations_above_max": (
        {"group_size": "threshold", "max_group_size": 3},
        "num_generations=4 is outside min_group_size=2 to max_group_size=3: .* set it between them",
    ),
    "variance_at_a_bound": (
        {"group_size": "variance", "min_group_size": 4},
        r"num_generations=4 equals a bound of the group size \(4 to 8\).* set min_group_size below",
    ),
    "no_room_for_two_groups": (
        {"group_size": "threshold", "per_device_train_batch_size": 4, "min_group_size": 3},
        "generation_batch_size=4 rows cannot hold two groups of min_group_size=3.* lower min_group_size",
    ),
    "no_room_for_two_prompts": (
        {"group_size": "variance", "per_device_train_batch_size": 4},
        "generation_batch_size=4 rows hold one prompt with num_generations=4 .* or lower num_generations",
    ),
    "alarms_without_logs": (
        {"monitor": True, "on_alarm": {"nan_loss": "save_and_stop"}, "logging_strategy": "no"},
        "on_alarm=.* needs logs, which the alarms read, and logging_strategy='no' makes none",
    ),
    "threshold": ({"group_std_threshold": -0.5}, "group_std_threshold=-0.5 must not be negative: try 0.1"),
    "rounds": ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds=-1 must not be negative: use 0 to switch it"),
    "range_order": ({"reward_clip_range": [10, -10]}, r"reward_clip_range=\[10, -10\] must be .*low < high.*-10, 10"),
    "range_length": ({"reward_clip_range": [10]}, r"reward_clip_range=\[10\] must be \[low, high\] with low < high"),
    "range_empty": ({"reward_clip_range": [1.0, 1.0]}, r"reward_clip_range=\[1.0, 1.0\] must be"),
    "range_nan": ({"reward_clip_range": [float("nan"), 1.0]}, r"reward_clip_range=\[nan, 1.0\] must be"),
    "quantile_order": (
        {"reward_clip_quantiles": [0.9, 0.1]},
        r"reward_clip_quantiles=\[0.9, 0.1\] must be .*0 <= low < high <= 1, such as \[0.05, 0.95\]",
    ),
    "quantile_percent": ({"reward_clip_quantiles": [5, 95]}, r"reward_clip_quantiles=\[5, 95\] must be .* such as"),
    "quantile_below": ({"reward_clip_quantiles": [-0.1, 0.9]}, r"reward_clip_quantiles=\[-0.1, 0.9\] must be"),
    "staged_column": (
        {"curriculum": "staged"},
        "'staged' needs difficulty_column.* set it, or use curriculum='online'",
    ),
    "target_column": (
        {"curriculum": "target"},
        "'target' needs difficulty_column.* set it, or use curriculum='online'",
    ),
    "exploration": ({"curriculum_exploration": 1.5}, "curriculum_exploration=1.5 must be between 0 and 1: try 0.1"),
    "exploration_below": ({"curriculum_exploration": -0.1}, "curriculum_exploration=-0.1 must be between 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_work_are_refused(name, config):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_nothing_is_switched_on_by_default(config):
    args = config()
    assert (args.group_size, args.curriculum, args.dynamic_sampling_rounds) == ("fixed", "none", 0)
    assert args.reward_clip_range is args.reward_clip_quantiles is args.difficulty_column is None


def test_every_default_of_trl_is_kept(tmp_path):
    ours, stock = AdaptiveGRPOConfig(str(tmp_path), use_cpu=True), GRPOConfig(str(tmp_path), use_cpu=True)
    differing = {key for key, value in stock.to_dict().items() if ours.to_dict()[key] != value}
    assert differing <= {"logging_dir", "run_name"}  # may hold the time


@pytest.mark.parametrize(("generations", "low", "high"), [(2, 2, 4), (4, 2, 8), (8, 4, 16)])
def test_bounds_follow_num_generations(generations, low, high, config):
    assert config(num_generations=generations).group_size_bounds == (low, high)
    assert config(num_generations=generations, min_group_size=2, max_group_size=9).group_size_bounds == (2, 9)
    # What nobody set stays unset, and follows another number of generations. TRL's own derived option has to be unset.
    changes = {"num_generations": generations, "generation_batch_size": None}
    assert dataclasses.replace(config(group_size="threshold"), **changes).group_size_bounds == (low, high)


def test_options_survive_a_round_trip(config):
    args = config(group_size="variance", reward_clip_range=[-1, 1], curriculum="online", difficulty_levels=["a", "b"])
    again = AdaptiveGRPOConfig(**{key: getattr(args, key) for key in OPTIONS}, **config_kwargs(args.output_dir))
    assert {key: getattr(again, key) for key in OPTIONS} == {key: getattr(args, key) for key in OPTIONS}


OPTIONS = sorted(AdaptiveGRPOConfig.__dataclass_fields__.keys() - GRPOConfig.__dataclass_fields__.keys())


def test_every_option_has_help_for_the_command_line():
    assert len(OPTIONS) >= 13
    for name in OPTIONS:
        assert len(AdaptiveGRPOConfig.__dataclass_fields__[name].metadata["help"]) > 20
        assert f"{name} (`" in AdaptiveGRPOConfig.__doc__


# TRL's parser


YAML = """
per_device_train_batch_size: 32
group_size: variance
min_group_size: 2
reward_clip_range: [-10, 10]
reward_clip_quantiles: [0.05, 0.95]
curriculum: staged
difficulty_column: level
difficulty_levels: [a, b]
curriculum_exploration: 0.25
dynamic_sampling_rounds: 2
learning_rate: 1.0e-6
"""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    def run(*flags, yaml=""):
        (tmp_path / "config.yaml").write_text(yaml)
        common = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        given = ["--config", str(tmp_path / "config.yaml")] if yaml else []
        monkeypatch.setattr(sys, "argv", ["train.py", *given, *common, *flags])
        (args,) = TrlParser(AdaptiveGRPOConfig).parse_args_and_config()
        return args

    return run


def test_yaml_is_parsed(parse):
    args = parse(yaml=YAML)
    assert (args.group_size, args.group_size_bounds) == ("variance", (2, 16))
    assert args.reward_clip_range == [-10, 10]
    assert args.reward_clip_quantiles == [0.05, 0.95]
    assert (args.curriculum, args.difficulty_column, args.difficulty_levels) == ("staged", "level", ["a", "b"])
    assert (args.curriculum_exploration, args.dynamic_sampling_rounds, args.learning_rate) == (0.25, 2, 1e-6)


def test_command_line_is_parsed(parse):
    args = parse(
        *("--reward_clip_range", "-10", "10", "--reward_clip_quantiles", "0.05", "0.95", "--reward_clip_on", "total"),
        *("--group_size", "threshold", "--group_std_threshold", "0.3", "--max_group_size", "12"),
        *("--curriculum", "target", "--difficulty_column", "level", "--difficulty_levels", "low", "mid", "high"),
        *("--curriculum_goal", "0.7", "--dynamic_sampling_rounds", "1"),
    )
    assert args.reward_clip_range == [-10.0, 10.0]
    assert (args.reward_clip_quantiles, args.reward_clip_on) == ([0.05, 0.95], "total")
    assert (args.group_size, args.group_std_threshold, args.max_group_size) == ("threshold", 0.3, 12)
    assert (args.curriculum, args.difficulty_levels) == ("target", ["low", "mid", "high"])
    assert (args.curriculum_goal, args.dynamic_sampling_rounds) == (0.7, 1)


def test_flags_win_over_yaml(parse):
    args = parse("--reward_clip_range", "-1", "1", "--curriculum", "none", yaml=YAML)
    assert args.reward_clip_range == [-1.0, 1.0]
    assert args.curriculum == "none"
    assert args.difficulty_column == "level"


def test_choices_are_checked_by_the_parser(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--group_size", "dynamic")
    assert "invalid choice: 'dynamic'" in capsys.readouterr().err


# Trainer construction


@pytest.fixture
def make(make_trainer):
    return partial(make_trainer, reward_funcs=count_vowels)


STAGED = {"curriculum": "staged", "difficulty_column": "difficulty"}
TARGET = {"curriculum": "target", "difficulty_column": "difficulty"}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, []),
        (STAGED, [StagedCurriculumCallback]),
        (TARGET, [TargetCurriculumCallback]),
        ({"curriculum": "online"}, [OnlineCurriculumCallback]),
        ({"group_size": "threshold"}, [ThresholdGroupSizeCallback]),
        ({"group_size": "variance"}, [VarianceGroupSizeCallback]),
        ({"reward_clip_range": [-1, 1]}, [RewardClipCallback]),
        ({"reward_clip_quantiles": [0.1, 0.9]}, [RewardClipCallback]),
        ({"dynamic_sampling_rounds": 1}, [DynamicSamplingCallback]),
    ],
)
def test_options_switch_on_their_callbacks(options, kinds, make):
    assert [type(callback) for callback in make(**options).grpo_callbacks] == kinds


def test_options_reach_their_callbacks(make):
    options = {"group_size": "threshold", "group_std_threshold": 0.7, "dynamic_sampling_rounds": 3}
    options |= {"reward_clip_range": [-2, 2], "reward_clip_quantiles": [0.2, 0.8], "reward_clip_on": "total"}
    options |= {"curriculum": "target", "difficulty_column": "difficulty", "curriculum_goal": 0.9}
    options |= {"curriculum_exploration": 0.3, "difficulty_levels": ["easy", "medium", "hard"]}
    target, size, clip, sampling = make(**options).grpo_callbacks
    assert (target.column, target.goal, target.exploration) == ("difficulty", 0.9, 0.3)
    assert target.levels == ["easy", "medium", "hard"]
    assert size.std_threshold == 0.7
    assert (clip.clip_range, clip.quantiles, clip.on) == ([-2, 2], [0.2, 0.8], "total")
    assert sampling.max_rounds == 3


def test_config_of_trl_is_refused(model_path, dataset, tmp_path):
    with pytest.raises(TypeError, match="args is a GRPOConfig: use AdaptiveGRPOConfig, which takes the same arguments"):
        AdaptiveGRPOTrainer(model_path, count_vowels, GRPOConfig(**config_kwargs(tmp_path)), dataset)


def test_empty_dataset_is_refused(dataset, make):
    with pytest.raises(ValueError, match="train_dataset is empty: pass at least one prompt"):
        make(dataset=dataset.select([]))
    with pytest.raises(ValueError, match="train_dataset has 0 rows and one generation batch holds 2 prompts"):
        make(dataset=dataset.select([]), curriculum="online")


def test_reward_functions_of_one_name_are_refused(make):
    with pytest.raises(ValueError, match=r"share the name 'count_vowels'.*rename one"):
        make(reward_funcs=[count_vowels, count_vowels])


PLANNING = [
    {"group_size": "threshold"},
    {"group_size": "variance"},
    {"curriculum": "online"},
    {"dynamic_sampling_rounds": 1},
    STAGED,
    TARGET,
]


@pytest.mark.parametrize("options", PLANNING)
def test_dataset_smaller_than_a_batch_is_refused(options, dataset, make):
    message = r"has 3 rows and one generation batch holds 4 prompts \(generation_batch_size=16 / num_generations=4\)"
    with pytest.raises(ValueError, match=message):
        make(dataset=dataset.select(range(3)), per_device_train_batch_size=16, **options)


@pytest.mark.parametrize("options", PLANNING)
def test_planning_without_a_dataset_is_refused(options, make):
    with pytest.raises(ValueError, match=r"there is none .* pass train_dataset, or leave them off"):
        make(dataset=None, **options)


@pytest.mark.parametrize("options", PLANNING)
def test_planning_over_a_stream_is_refused(options, dataset, make):
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    with pytest.raises(ValueError, match=r"IterableDataset does not allow: pass a datasets.Dataset"):
        make(dataset=stream, **options)


def test_planning_callback_of_the_user_is_checked_like_an_option(dataset, make):
    with pytest.raises(ValueError, match="has 1 rows and one generation batch holds 2 prompts"):
        make(dataset=dataset.select([0]), callbacks=[OnlineCurriculumCallback()])
    with pytest.raises(ValueError, match="has 1 rows and one generation batch holds 2 prompts"):
        make(dataset=dataset.select([0]), callbacks=[OnlineCurriculumCallback])


def test_bounds_that_a_users_size_callback_cannot_meet_are_refused(make):
    options = {"per_device_train_batch_size": 10, "num_generations": 5, "min_group_size": 6, "max_group_size": 8}
    with pytest.raises(ValueError, match="num_generations=5 is outside min_group_size=6 to max_group_size=8"):
        make(callbacks=[VarianceGroupSizeCallback()], **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_group_size": 4}, "equals a bound of the group size"),
        ({"per_device_train_batch_size": 4}, "hold one prompt"),
    ],
)
def test_a_users_variance_callback_is_checked_like_the_option(options, problem, make):
    with pytest.raises(ValueError, match=problem):
        make(callbacks=[VarianceGroupSizeCallback()], **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"skip_zero_advantage": True}, "skip_zero_advantage"),
        ({"kl_target": 0.1, "beta": 0.1}, "kl_target"),
        ({"monitor": True, "beta": 0.1, "on_alarm": {"kl_spike": "adapt_beta"}}, "on_alarm='adapt_beta'"),
    ],
)
def test_what_would_not_reach_the_loss_of_liger_is_refused(options, name, config, monkeypatch, make):
    monkeypatch.setattr(seams, "LIGER_GOES_AROUND", True)
    with pytest.raises(ValueError, match=f"{name} has no effect with use_liger_kernel=True in TRL"):
        make(use_liger_kernel=True, **options)
    make(**options)
    monkeypatch.setattr(seams, "LIGER_GOES_AROUND", False)
    seams.check_liger(config(use_liger_kernel=True, **options))


def test_stream_is_fine_when_nothing_is_planned(dataset, make):
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    make(dataset=stream, reward_clip_range=[-1, 1])


def test_dataset_of_exactly_one_batch_is_fine(dataset, make):
    trainer = make(dataset=dataset.select(range(2)), group_size="variance", max_steps=2)
    trainer.train()
    assert len(trainer.state.log_history) == 3


def test_one_level_is_refused(make):
    message = r"difficulty_levels=\['easy'\] must be at least two different names, from easy to hard"
    with pytest.raises(ValueError, match=message):
        make(difficulty_levels=["easy"], **STAGED)


@pytest.mark.parametrize(("rows", "expected"), [(7, 7), (12, 6), (16, 8), (22, 2), (25, 5)])
def test_single_completions_need_no_arithmetic(rows, expected):
    args = AdaptiveGRPOConfig(output_dir="unused", use_cpu=True, group_size="single", per_device_train_batch_size=rows)
    assert (args.num_generations, args.generation_batch_size) == (expected, rows)
    assert (args.baseline, args.scale_rewards) == ("batch", "batch")


def test_single_completions_keep_what_was_chosen():
    options = {"group_size": "single", "baseline": "predicted", "scale_rewards": "none", "num_generations": 4}
    args = args_of(per_device_train_batch_size=16, **options)
    assert {name: getattr(args, name) for name in options} == options


def test_other_sizes_keep_the_defaults_of_trl():
    args = AdaptiveGRPOConfig(output_dir="unused", use_cpu=True)
    assert (args.num_generations, args.baseline, args.scale_rewards) == (8, "group", "group")
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        AdaptiveGRPOConfig(output_dir="unused", use_cpu=True, per_device_train_batch_size=7)
