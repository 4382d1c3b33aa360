"""Which task a prompt belongs to, and which share of the prompts each task gets."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import args_of, batch_of, set_up, through_a_file

from trl_grpo_ext import TaskMixingCallback
from trl_grpo_ext.plan.tasks import mixed_weights, read_tasks, said_instead, tasks_of

NAMES = ["chat", "math"]
ROWS = {"prompt": ["a", "b", "c", "d"], "task": ["math", "chat", "math", "math"]}  # 1 chat, 3 math


def mixing(**options) -> TaskMixingCallback:
    return set_up(TaskMixingCallback("task", **options), **ROWS)


def batch(chat: list[float], math_: list[float], **fields):
    """One group of each task; prompt 1 is chat, prompt 0 is math."""
    tasks = torch.tensor([0] * len(chat) + [1] * len(math_))
    return batch_of({1: chat, 0: math_}, tasks=tasks, task_names=NAMES, **fields)


# Properties


@given(
    weights=st.lists(st.floats(0.0625, 100, width=32), min_size=1, max_size=12),
    places=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    shares=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
def test_a_task_gets_its_share_and_its_prompts_keep_their_proportions(weights, places, shares):
    weights, tasks = torch.tensor(weights), torch.tensor(places[: len(weights)])
    wanted = torch.tensor(shares) / sum(shares)
    mixed = mixed_weights(weights, tasks, wanted)
    for task in range(3):
        own = tasks == task
        if own.any():
            assert mixed[own].sum().item() == pytest.approx(wanted[task].item(), rel=1e-4)
            ratio = mixed[own] / weights[own]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    seen=st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.floats(-5, 5), min_size=1, max_size=4)), max_size=6),
    floor=st.floats(0, 1),
)
def test_adaptive_shares_keep_their_floor_whatever_comes(seen, floor):
    callback = mixing(floor=floor)
    for name, rewards in seen:
        rows = torch.full((len(rewards),), 0)
        callback.on_rollouts(
            batch=batch_of({0: rewards}, tasks=rows, task_names=[name], advantages=torch.tensor(rewards))
        )
        shares = callback.shares()
        assert shares.sum().item() == pytest.approx(1.0)
        assert (shares >= floor / 2 - 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), level=st.floats(-1e3, 1e3))
def test_adaptive_shares_do_not_depend_on_the_scale_of_a_reward(scale, level):
    plain, other = mixing(), mixing()
    for rewards in ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]):
        plain.on_rollouts(batch=batch([0.0, 1.0], rewards))
        other.on_rollouts(batch=batch([0.0, 1.0], [level + scale * 4 * r for r in rewards]))
    torch.testing.assert_close(plain.shares(), other.shares(), rtol=1e-2, atol=1e-2)


# By hand


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"mixing": "weights", "weights": {"math": 1, "chat": 3}}, [0.75, 0.25]),
        ({"mixing": "weights", "weights": {"math": 1, "chat": 0}}, [0.0, 1.0]),
        ({"mixing": "size", "power": 1.0}, [0.25, 0.75]),
        ({"mixing": "size", "power": 0.0}, [0.5, 0.5]),
        ({"mixing": "size", "power": 0.5}, [1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5)]),
        ({"mixing": "adaptive"}, [0.5, 0.5]),  # nothing is known yet
    ],
)
def test_shares_by_hand(options, shares):
    assert mixing(**options).shares().tolist() == pytest.approx(shares)


def test_adaptive_gives_to_the_task_that_teaches():
    callback = mixing(floor=0.2)
    callback.on_rollouts(batch=(seen := batch([1.0, 1.0], [0.0, 1.0])))
    # Chat is flat and gets only its half of the floor.
    assert seen.metrics == pytest.approx({"tasks/chat/wanted": 0.1, "tasks/math/wanted": 0.9})
    weights = callback.on_prompt_weights(weights=torch.ones(4))
    assert weights.tolist() == pytest.approx([0.3, 0.1, 0.3, 0.3])


def test_what_was_thrown_away_counts():
    callback = mixing()
    callback.on_rollouts(batch=(kept := batch([0.0, 1.0], [0.0, 1.0])))
    assert kept.metrics["tasks/math/wanted"] == pytest.approx(0.5)
    fresh = batch([0.0, 1.0], [0.0, 1.0])
    fresh.discarded = batch_of({2: [1.0, 1.0]}, tasks=torch.zeros(2, dtype=torch.long), task_names=["math"])
    other = mixing()
    other.on_rollouts(batch=fresh)
    assert other.learnable.tolist() == [1.0, 0.5]


def test_a_curriculum_that_rules_a_task_out_leaves_it_out():
    weights = mixing(mixing="size").on_prompt_weights(weights=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert weights[1] == 0
    assert weights[0] == weights[2] > 0


def test_groups_of_one_are_compared_among_themselves():
    callback = mixing()
    tasks, advantages = torch.tensor([1, 1, 1]), torch.tensor([1.0, 0.0, 1.0])
    callback.on_rollouts(
        batch=batch_of({0: [1.0], 2: [0.0], 3: [2.0]}, tasks=tasks, task_names=NAMES, advantages=advantages)
    )
    assert callback.learnable.tolist() == pytest.approx([-1, 2 / 3])
    assert callback.spread.tolist() == pytest.approx([-1, 1.0])


def test_it_goes_on_where_it_was():
    one, other = mixing(), mixing()
    one.on_rollouts(batch=batch([0.0, 1.0], [0.0, 0.0]))
    other.load_state_dict(through_a_file(one.state_dict()))
    for callback in (one, other):
        callback.on_rollouts(batch=batch([0.0, 3.0], [0.0, 1.0]))
    assert one.shares().tolist() == other.shares().tolist()
    changed = set_up(TaskMixingCallback("task"), prompt=["a", "b"], task=["code", "math"])
    with pytest.raises(ValueError, match=r"'names' are .*resume with the dataset"):
        changed.load_state_dict(one.state_dict())


# Bad input


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kind": ["a"]}, "'task' is not a column of the training dataset, which has 'kind'"),
        ({"tasks": ["a"]}, "did you mean 'tasks'"),
        ({"task": ["math", None, "chat"]}, "1 of 3 rows name no task: row 1 has task=None"),
        ({"task": ["math", ""]}, "row 1 has task=''"),
        ({"task": [1, 2]}, "2 of 2 rows name no task: row 0 has task=1"),
        ({"task": [str(i) for i in range(101)]}, "101 different texts"),
    ],
)
def test_a_column_that_holds_no_tasks_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        read_tasks(Dataset.from_dict(columns), "task")


def test_a_transform_may_name_the_tasks():
    dataset = Dataset.from_dict({"kind": ["m", "c"]})
    dataset.set_transform(lambda columns: {"prompt": columns["kind"], "task": [f"{k}_" for k in columns["kind"]]})
    assert read_tasks(dataset, "task") == ["m_", "c_"]


def test_rows_without_a_task_have_none():
    assert tasks_of([{"task": "x"}, {"task": math.nan}, {}], "task") == ["x", None, None]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"maths": 1, "chat": 1}, "names the task 'maths', unknown to the dataset.*did you mean 'math'"),
        ({"math": 1}, "leaves out the task 'chat'"),
    ],
)
def test_weights_must_fit_the_dataset(weights, message):
    with pytest.raises(ValueError, match=message):
        mixing(mixing="weights", weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "none"}, "mixing='none' is unknown"),
        ({"mixing": "weights"}, "needs weights"),
        ({"mixing": "weights", "weights": {}}, "must map tasks to weights"),
        ({"mixing": "weights", "weights": {"math": -1}}, "must map tasks to weights"),
        ({"mixing": "weights", "weights": {"math": 0}}, "must map tasks to weights"),
        ({"power": -1}, "task_power=-1"),
        ({"floor": 2}, "task_floor=2"),
        ({"memory": 1}, "memory=1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TaskMixingCallback("task", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_mixing": "size"}, "task_mixing='size' needs task_column"),
        ({"task_advantages": True}, "task_advantages=True needs task_column"),
        ({"task_column": "task", "task_mixing": "even"}, "task_mixing='even' is unknown"),
        ({"task_column": "task", "task_mixing": "weights"}, "do not fit"),
        ({"task_column": "task", "task_weights": {"math": 1}}, "do not fit"),
        ({"task_column": "task", "task_advantages": True}, "no effect on scale_rewards='group'"),
        (
            {"task_column": "task", "task_advantages": True, "scale_rewards": "none"},
            "no effect on baseline='group' with scale_rewards='none'",
        ),
    ],
)
def test_the_configuration_refuses_what_has_no_effect(options, message):
    with pytest.raises(ValueError, match=message):
        args_of(**options)


def test_weights_come_as_json_on_the_command_line():
    args = args_of(task_column="task", task_mixing="weights", task_weights='{"math": 2, "chat": 1}')
    assert args.task_weights == {"math": 2, "chat": 1}


def test_a_name_far_from_all_is_not_guessed():
    assert said_instead("zzz", ["math"]) == ", which has 'math': use one of these"


def test_set_up_reads_the_dataset_of_the_trainer():
    trainer = SimpleNamespace(train_dataset=Dataset.from_dict({"prompt": ["a"], "task": [""]}))
    with pytest.raises(ValueError, match="name no task"):
        TaskMixingCallback("task").on_setup(trainer=trainer)
