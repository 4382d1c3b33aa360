"""Curricula move through difficulty, keep a floor of exploration, and refuse data they cannot read."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kit import NAN, Record, args_of, batch_of, batches_of, count_vowels, logs_of, set_up, state_at

from trl_grpo_ext import (
    OnlineCurriculumCallback,
    StagedCurriculumCallback,
    TargetCurriculumCallback,
)
from trl_grpo_ext.plan.curriculum import move_target, staged_weights, with_exploration


def weights_of(callback, num_prompts, state=None) -> torch.Tensor:
    return callback.on_prompt_weights(state=state or state_at(0), weights=torch.ones(num_prompts))


# Staged

widths = st.one_of(st.just(0.0), st.floats(1e-3, 3))


@st.composite
def stages(draw):
    """Level of each prompt, with levels possibly empty, and their number."""
    num_levels = draw(st.integers(2, 5))
    levels = draw(st.lists(st.integers(0, num_levels - 1), min_size=1, max_size=20))
    return torch.tensor(levels), num_levels


@given(stages(), st.floats(0, 1), widths)
@settings(max_examples=200)
def test_staged_weights_are_a_distribution_over_levels(case, progress, smoothing):
    levels, num_levels = case
    weights = staged_weights(levels, num_levels, progress, smoothing)
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    for level in levels.unique():
        assert weights[levels == level].unique().numel() == 1


@given(stages(), st.floats(0, 1), widths)
@settings(max_examples=200)
def test_the_nearest_level_weighs_most(case, progress, smoothing):
    levels, num_levels = case
    total = torch.zeros(num_levels).index_add(0, levels, staged_weights(levels, num_levels, progress, smoothing))
    position = min(max(num_levels * progress - 0.5, 0.0), num_levels - 1.0)
    distance = {level: abs(level - position) for level in levels.unique().tolist()}
    for near in distance:
        for far in distance:
            if distance[near] < distance[far] - 1e-3:
                assert total[near] >= total[far] - 1e-6
                if smoothing < 0.02 and distance[far] - distance[near] > 0.1:  # as good as switching at once
                    assert total[far] == pytest.approx(0, abs=1e-6)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=20), st.floats(0.1, 1.5))
def test_mean_level_rises_with_progress(levels, smoothing):
    levels = torch.tensor(levels)
    means = [(staged_weights(levels, 3, i / 20, smoothing) * levels).sum().item() for i in range(21)]
    assert all(later >= earlier - 1e-5 for earlier, later in pairwise(means))


def test_stages_come_in_order():
    levels = torch.tensor([0, 1, 1, 1, 2])
    for progress, stage in {0.0: 0, 1 / 6: 0, 0.5: 1, 5 / 6: 2, 1.0: 2}.items():
        weights = staged_weights(levels, 3, progress, smoothing=0)
        assert weights.tolist() == pytest.approx([(level == stage) / (1, 3, 1)[stage] for level in levels.tolist()])
        assert staged_weights(levels, 3, progress, smoothing=0.3)[levels == stage].sum() > 0.9


def test_staged_weights_by_hand():
    # at the middle of training the second of three levels leads: exp(-2), 1, exp(-2) for half a level's width
    total = 1 + 2 * math.exp(-2)
    expected = [math.exp(-2) / total, 0.5 / total, 0.5 / total, math.exp(-2) / total]
    assert staged_weights(torch.tensor([0, 1, 1, 2]), 3, 0.5, 0.5).tolist() == pytest.approx(expected)


def test_levels_by_name():
    names = ["hard", "easy", "medium", "easy"]
    callback = set_up(StagedCurriculumCallback("d", smoothing=0, exploration=0), d=names)
    assert callback.difficulty.tolist() == [2, 0, 1, 0]
    assert weights_of(callback, 4, state_at(0)).tolist() == [0.0, 0.5, 0.0, 0.5]
    assert weights_of(callback, 4, state_at(50)).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert weights_of(callback, 4, state_at(100)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_levels_by_own_names():
    callback = set_up(StagedCurriculumCallback("d", levels=["b", "a"], smoothing=0, exploration=0), d=["a", "b", "b"])
    assert weights_of(callback, 3, state_at(0)).tolist() == [0.0, 0.5, 0.5]


def test_numbers_are_cut_into_levels_of_equal_size():
    callback = set_up(StagedCurriculumCallback("d"), d=[5.0, -1.0, 3.0, 9.0, 4.0, 8.0])
    assert callback.difficulty.tolist() == [1, 0, 0, 2, 1, 2]


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=30).filter(lambda numbers: len(set(numbers)) > 1))
def test_equal_numbers_share_a_level_and_larger_ones_are_no_easier(numbers):
    assume(len(set(numbers)) > 1)
    difficulty = set_up(StagedCurriculumCallback("d"), d=numbers).difficulty.tolist()
    by_number = sorted(zip(numbers, difficulty, strict=True))
    assert min(difficulty) == 0
    assert max(difficulty) <= 2
    for (number, level), (next_number, next_level) in pairwise(by_number):
        assert level <= next_level
        assert number < next_number or level == next_level
    if len(set(numbers)) == len(numbers):  # no ties: sizes differ by at most one
        counts = [difficulty.count(level) for level in range(3)]
        assert max(counts) - min(counts) <= 1


def test_staged_logs_its_position():
    callback = set_up(StagedCurriculumCallback("d"), d=["easy", "medium", "hard"])
    for step, position in {0: 0.0, 50: 0.5, 100: 1.0}.items():
        batch = batch_of({0: [0.0], 2: [1.0], 1: [1.0]})
        callback.on_rollouts(state=state_at(step), batch=batch)
        assert batch.metrics == {"curriculum/position": position, "curriculum/difficulty": 1.0}


# Exploration


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-20, 1e6)), min_size=1, max_size=20), st.floats(0, 1))
def test_every_prompt_keeps_its_share_of_exploration(weights, exploration):
    mixed = with_exploration(torch.tensor(weights), exploration)
    assert mixed.sum().item() == pytest.approx(1, abs=1e-5)
    assert mixed.min() >= exploration / len(weights) - 1e-6
    total = sum(weights)
    if total > 0:
        expected = [(1 - exploration) * w / total + exploration / len(weights) for w in weights]
        assert mixed.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", [StagedCurriculumCallback, TargetCurriculumCallback])
@given(step=st.integers(0, 100), exploration=st.floats(0.01, 1), target=st.floats(0, 1))
def test_no_prompt_falls_below_the_floor(kind, step, exploration, target):
    callback = set_up(kind("d", exploration=exploration), d=[0.0, 1.0, 2.0, 50.0, 100.0])
    callback.target = target
    weights = weights_of(callback, 5, state_at(step))
    assert weights.min() >= exploration / 5 - 1e-6
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [StagedCurriculumCallback, TargetCurriculumCallback, OnlineCurriculumCallback])
def test_weights_of_earlier_hooks_are_kept(kind):
    column = () if kind is OnlineCurriculumCallback else ("d",)
    callback = set_up(kind(*column, exploration=0.5), d=[0.0, 1.0, 2.0])
    earlier = torch.tensor([0.0, 1.0, 2.0])
    later = callback.on_prompt_weights(state=state_at(50), weights=earlier.clone())
    torch.testing.assert_close(later, earlier * weights_of(callback, 3, state_at(50)))


# Online


HARD, UNCERTAIN, EASY = [0.0] * 4, [0.0, 1.0, 1.0, 0.0], [1.0] * 4


def online(num_prompts, batches, **kwargs) -> OnlineCurriculumCallback:
    callback = set_up(OnlineCurriculumCallback(**kwargs), d=[0] * num_prompts)
    for batch in batches:
        weights_of(callback, num_prompts)
        callback.on_rollouts(batch=batch_of(batch))
    return callback


def test_online_is_uniform_before_anything_is_known():
    assert weights_of(online(4, []), 4).tolist() == pytest.approx([0.25] * 4)


def test_online_draws_uncertain_prompts_more():
    callback = online(5, [{0: HARD, 1: UNCERTAIN, 2: EASY, 3: UNCERTAIN}] * 3, exploration=0.1)
    hard, uncertain, easy, also_uncertain, unseen = weights_of(callback, 5).tolist()
    assert hard == easy < unseen < uncertain == also_uncertain
    assert uncertain > 3 * hard
    assert hard >= 0.1 / 5


def test_online_follows_the_policy():
    callback = online(2, [{0: HARD, 1: UNCERTAIN}] * 4)
    before = weights_of(callback, 2)
    for _ in range(4):
        callback.on_rollouts(batch=batch_of({0: UNCERTAIN, 1: EASY}))
    after = weights_of(callback, 2)
    assert before[0] < before[1]
    assert after[0] > after[1]


def test_power_sharpens_the_draw():
    batches = [{0: HARD, 1: UNCERTAIN, 2: EASY}]
    soft, sharp = (weights_of(online(3, batches, power=power, exploration=0), 3) for power in (1.0, 4.0))
    assert weights_of(online(3, batches, power=0.0), 3).tolist() == pytest.approx([1 / 3] * 3)
    assert (sharp[1] / sharp[0]).item() == pytest.approx((soft[1] / soft[0]).item() ** 4, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_online_does_not_depend_on_the_unit_of_the_reward(scale):
    plain = [{0: HARD, 1: UNCERTAIN, 2: EASY, 3: [0.0, 0.0, 0.0, 1.0]}]
    scaled = [{prompt: [r * scale for r in group] for prompt, group in plain[0].items()}]
    torch.testing.assert_close(weights_of(online(5, scaled), 5), weights_of(online(5, plain), 5), rtol=1e-3, atol=1e-6)


def test_online_logs_over_how_many_prompts_the_draw_spreads():
    callback = online(4, [])
    for expected in (4.0, None):
        weights = weights_of(callback, 4)
        batch = batch_of({0: HARD, 1: UNCERTAIN, 2: HARD, 3: HARD})
        callback.on_rollouts(batch=batch)
        expected = expected or (1 / weights.square().sum()).item()
        assert batch.metrics["curriculum/effective_prompts"] == pytest.approx(expected)
    assert expected < 3


def test_online_state_round_trip():
    first = online(4, [{0: HARD, 1: UNCERTAIN}])
    second = online(4, [])
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for batch in ({1: EASY, 2: UNCERTAIN}, {0: UNCERTAIN, 3: HARD}):
        assert torch.equal(weights_of(second, 4), weights_of(first, 4))
        for callback in (first, second):
            callback.on_rollouts(batch=batch_of(batch))
    assert torch.equal(weights_of(second, 4), weights_of(first, 4))


@pytest.mark.parametrize("power", [-1.0, NAN])
def test_online_power_that_cannot_work_is_refused(power):
    with pytest.raises(ValueError, match=f"power={power}"):
        OnlineCurriculumCallback(power=power)


# Target (AdaRFT)


def test_target_by_hand():
    options = {"goal": 0.5, "step_size": 5.0, "sensitivity": 2.0, "low": 0.0, "high": 100.0}
    assert move_target(50.0, reward=0.5, **options) == 50.0
    assert move_target(50.0, reward=1.0, **options) == pytest.approx(50 + 5 * math.tanh(1.0))
    assert move_target(50.0, reward=0.25, **options) == pytest.approx(50 - 5 * math.tanh(0.5))
    assert move_target(98.0, reward=9.0, **options) == 100.0
    assert move_target(1.0, reward=-9.0, **options) == 0.0


@given(st.floats(0, 1), st.lists(st.floats(-10, 10), max_size=20))
def test_target_stays_in_range_and_moves_with_the_reward(target, rewards):
    for reward in rewards:
        moved = move_target(target, reward, goal=0.5, step_size=0.05, sensitivity=2.0, low=0.0, high=1.0)
        assert 0 <= moved <= 1
        assert abs(moved - target) <= 0.05 + 1e-12
        assert (moved - target) * (reward - 0.5) >= 0
        target = moved


def test_target_rises_while_the_reward_is_above_the_goal():
    callback = set_up(TargetCurriculumCallback("d", goal=0.5, step_size=0.3, sensitivity=2.0), d=[0.0, 10.0, 30.0])
    assert callback.difficulty.tolist() == pytest.approx([0.0, 1 / 3, 1.0])
    position = 0.0
    for reward in (1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, NAN):
        batch = batch_of({0: [reward], 1: [reward, NAN]})
        callback.on_rollouts(batch=batch)
        move = 0.0 if math.isnan(reward) else 0.3 * math.tanh(2 * (reward - 0.5))
        position = min(max(position + move, 0.0), 1.0)
        assert batch.metrics["curriculum/position"] == callback.target == pytest.approx(position)
        assert batch.metrics["curriculum/difficulty"] == pytest.approx(1 / 6)
    assert 0.5 < position < 1.0


def test_target_counts_what_was_sampled_and_thrown_away():
    callback = set_up(TargetCurriculumCallback("d", goal=0.9, step_size=0.3, sensitivity=2.0), d=[0.0, 10.0, 30.0])
    batch = batch_of({0: [1.0, 0.0, 1.0, 1.0]})
    batch.discarded = batch_of({1: [1.0] * 8, 2: [1.0] * 8})
    callback.on_rollouts(batch=batch)
    assert callback.target == pytest.approx(0.3 * math.tanh(2 * (19 / 20 - 0.9)))


def test_target_draws_prompts_near_it():
    callback = set_up(TargetCurriculumCallback("d", width=0.1, exploration=0.0), d=["easy", "hard", "medium"])
    for target, nearest in {0.0: 0, 0.5: 2, 1.0: 1}.items():
        callback.target = target
        assert weights_of(callback, 3).argmax() == nearest
        assert weights_of(callback, 3)[nearest] > 0.99


def test_target_weights_by_hand():
    callback = set_up(TargetCurriculumCallback("d", width=0.5, exploration=0.2), d=[0.0, 5.0, 10.0])
    weights = [1, math.exp(-0.5), math.exp(-2)]
    expected = [0.8 * w / sum(weights) + 0.2 / 3 for w in weights]
    assert weights_of(callback, 3).tolist() == pytest.approx(expected)


def test_target_state_round_trip():
    first, second = (set_up(TargetCurriculumCallback("d"), d=[0.0, 1.0]) for _ in range(2))
    first.on_rollouts(batch=batch_of({0: [1.0]}))
    second.load_state_dict(first.state_dict())
    assert torch.equal(weights_of(second, 2), weights_of(first, 2))
    assert second.target == first.target > 0


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagedCurriculumCallback("d", exploration=1.5), "exploration=1.5 must be between 0 .* try 0.1"),
        (lambda: OnlineCurriculumCallback(exploration=-0.1), "exploration=-0.1 must be between 0"),
        (lambda: StagedCurriculumCallback("d", smoothing=-1), "smoothing=-1 must not be negative: use 0"),
        (lambda: StagedCurriculumCallback("d", levels=["a"]), r"\['a'\] must be at least two different names"),
        (lambda: StagedCurriculumCallback("d", levels=["a", "a"]), "must be at least two different names"),
        (lambda: TargetCurriculumCallback("d", levels=["a", "a"]), "must be at least two different names"),
        (lambda: TargetCurriculumCallback("d", width=0), "width=0 must be positive: try 0.15"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Rows:
    """A dataset whose column may mix kinds, which `Dataset.from_dict` does not allow."""

    column_names = ("prompt", "d")
    format = {"type": None}  # noqa: RUF012 (as a Dataset has)

    def __init__(self, values):
        self.values = values

    def with_format(self, kind):
        return self

    def __getitem__(self, column):
        return self.values


@pytest.mark.parametrize("kind", [StagedCurriculumCallback, TargetCurriculumCallback])
def test_names_and_numbers_do_not_mix(kind):
    with pytest.raises(ValueError, match="Column 'd' mixes names and numbers: use one kind"):
        kind("d").on_setup(args=args_of(), trainer=SimpleNamespace(train_dataset=Rows(["easy", 3, "hard"])))


@pytest.mark.parametrize("curriculum", ["staged", "target"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "level",
            "brutal",
            "Row 3 has level='brutal', which is neither .* nor one of the levels .*'hard'.* `difficulty_levels`",
        ),
        ("level", None, "Row 3 has level=None, which is neither .* number nor one of the levels"),
        ("number", NAN, "Row 3 has number=nan, which is neither a finite number nor"),
        ("number", None, "Row 3 has number=None, which is neither a finite number nor"),
        ("flag", True, "Row 0 has flag=True, which is neither"),
        ("absent", None, r"difficulty_column='absent' is not a column .* \['prompt', .*curriculum='online'"),
    ],
)
def test_unreadable_difficulty_is_refused_at_construction(curriculum, column, value, message, make_trainer):
    data = {"prompt": list("abcdef"), "level": ["easy", "hard"] * 3, "number": [1.0, 2.0] * 3, "flag": [True] * 6}
    if column in data:
        data[column][3] = value
    with pytest.raises(ValueError, match=message):
        make_trainer(dataset=Dataset.from_dict(data), curriculum=curriculum, difficulty_column=column)


@pytest.mark.parametrize("curriculum", ["staged", "target"])
def test_one_difficulty_for_all_is_refused_at_construction(curriculum, make_trainer):
    data = Dataset.from_dict({"prompt": list("abcdef"), "d": ["hard"] * 6})
    with pytest.raises(ValueError, match=r"All prompts have d='hard'.* a curriculum needs different"):
        make_trainer(dataset=data, curriculum=curriculum, difficulty_column="d")


@pytest.mark.parametrize("curriculum", ["staged", "target", "online"])
def test_streams_are_refused_at_construction(curriculum, make_trainer, dataset):
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    with pytest.raises(ValueError, match=r"a IterableDataset does not allow: pass a datasets.Dataset|streaming=False"):
        make_trainer(dataset=stream, curriculum=curriculum, difficulty_column="difficulty")


# Real runs


OPTIONS = {"reward_funcs": count_vowels, "max_completion_length": 2}


def test_staged_run_goes_from_easy_to_hard(trained, dataset):
    options = {"curriculum": "staged", "difficulty_column": "difficulty", "curriculum_exploration": 0.0, **OPTIONS}
    trainer = trained(callbacks=[Record], max_steps=6, num_generations=2, **options)
    level = torch.tensor([("easy", "medium", "hard").index(name) for name in dataset["difficulty"]]).float()
    means = [level[batch.prompt_index].mean().item() for batch in batches_of(trainer)]
    assert sum(means[:2]) < sum(means[2:4]) < sum(means[4:])
    logs = logs_of(trainer)
    assert [entry["curriculum/difficulty"] for entry in logs] == pytest.approx(means)
    assert [entry["curriculum/position"] for entry in logs] == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75, 1.0])


def test_target_run_by_numbers_moves_the_target(trained):
    trainer = trained(curriculum="target", difficulty_column="score", curriculum_goal=-1.0, **OPTIONS)
    positions = [entry["curriculum/position"] for entry in logs_of(trainer)]
    assert 0 < positions[0] < positions[1] < positions[2]


def test_difficulty_is_read_from_a_dataset_of_tensors_too(make_trainer, dataset):
    trainer = make_trainer(dataset=dataset.with_format("torch"), curriculum="target", difficulty_column="score")
    assert trainer.grpo_callbacks[0].difficulty[[0, -1]].tolist() == [0.0, 1.0]
