"""Runs with several tasks: what is logged of each, on one process and on two, in one go and resumed."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from kit import (
    Record,
    batches_of,
    count_vowels,
    has_answer,
    have_same_weights,
    interrupt,
    launch,
    logs_of,
    make_letters,
    trainer_of,
    weights_of,
)

from trl_grpo_ext import TaskCallback, TaskMixingCallback
from trl_grpo_ext.rewards import as_reward, by_task

TASKS = {"task_column": "task"}
ADAPTIVE = {**TASKS, "task_mixing": "adaptive", "task_advantages": True, "scale_rewards": "batch"}


def data(size: int = 26, **columns) -> Dataset:
    tasks = ["math" if number % 3 else "chat" for number in range(size)]
    letters = make_letters().select(range(size))
    for name, values in {"task": tasks, **columns}.items():
        letters = letters.add_column(name, values)
    return letters


def routed():
    return by_task({"math": has_answer, "chat": 10.0 * as_reward(count_vowels) - 3.0})


def trained(model_path, out, dataset=None, reward=None, callbacks=(), **options):
    dataset, reward = data() if dataset is None else dataset, has_answer if reward is None else reward
    trainer = trainer_of(model_path, dataset, out, reward, [Record, *callbacks], **options)
    trainer.train()
    return trainer


def test_metrics_of_tasks_are_those_of_their_rows(model_path, tmp_path):
    trainer = trained(model_path, tmp_path, reward=count_vowels, per_device_train_batch_size=16, max_steps=2, **TASKS)
    for batch, logs in zip(batches_of(trainer), logs_of(trainer), strict=True):
        of_rows = [row["task"] for row in batch.rows]
        assert [batch.task_names[task] for task in batch.tasks] == of_rows
        total = 0.0
        for name in set(of_rows):
            own = torch.tensor([task == name for task in of_rows])
            assert logs[f"tasks/{name}/reward"] == pytest.approx(batch.rewards[own].mean().item())
            assert logs[f"tasks/{name}/length"] == pytest.approx(batch.completion_lengths[own].float().mean().item())
            assert logs[f"tasks/{name}/informative"] == pytest.approx(
                (~batch.flat_completions())[own].float().mean().item()
            )
            total += logs[f"tasks/{name}/share"] * logs[f"tasks/{name}/truncated"]
        assert total == pytest.approx(logs["completions/clipped_ratio"])


def test_a_masked_completion_keeps_its_length(model_path, tmp_path):
    trainer = trained(model_path, tmp_path, mask_truncated_completions=True, max_steps=1, **TASKS)
    (logs,) = logs_of(trainer)
    lengths = sum(
        logs[f"tasks/{name}/share"] * logs[f"tasks/{name}/length"] for name in batches_of(trainer)[0].task_names
    )
    assert lengths == pytest.approx(logs["completions/mean_length"])


@pytest.mark.training
def test_looking_at_tasks_changes_nothing(model_path, tmp_path):
    plain = trained(model_path, tmp_path / "plain", reward=count_vowels)
    looked = trained(model_path, tmp_path / "looked", reward=count_vowels, **TASKS)
    assert have_same_weights(plain, looked)


@pytest.mark.training
def test_a_run_goes_on_as_if_it_had_not_stopped(model_path, tmp_path):
    def make(name):
        options = {"curriculum": "online", "max_steps": 4, "baseline": "shrunk", **ADAPTIVE}
        return trainer_of(model_path, data(), tmp_path / name, routed(), [Record], **options)

    whole, _, resumed = interrupt(make, 2)
    assert have_same_weights(whole, resumed)
    assert [b.prompt_index.tolist() for b in batches_of(whole)[2:]] == [
        b.prompt_index.tolist() for b in batches_of(resumed)
    ]
    keys = [key for key in logs_of(whole)[-1] if key.startswith("tasks/")]
    assert {key: logs_of(whole)[-1][key] for key in keys} == {key: logs_of(resumed)[-1][key] for key in keys}


def test_groups_that_were_replaced_keep_their_tasks(model_path, tmp_path):
    trainer = trained(
        model_path, tmp_path, reward=count_vowels, dynamic_sampling_rounds=2, per_device_train_batch_size=16, **ADAPTIVE
    )
    seen = [part for batch in batches_of(trainer) for part in batch.parts]
    assert len(seen) > len(batches_of(trainer))
    tasks = data()["task"]
    for part in seen:
        assert [part.task_names[task] for task in part.group_tasks] == [tasks[i] for i in part.prompt_index.tolist()]


def test_a_stream_may_hold_rows_without_a_task(model_path, tmp_path):
    rows = [
        {"prompt": f"say {a}", "answer": a, "task": task} for a, task in zip("abcd", ["m", None, 3, ""], strict=True)
    ]
    stream = IterableDataset.from_generator(lambda: (row for _ in range(20) for row in rows))
    trainer = trained(model_path, tmp_path, dataset=stream, per_device_train_batch_size=16, max_steps=1, **TASKS)
    (logs,), (batch,) = logs_of(trainer), batches_of(trainer)
    without = [row["task"] != "m" for row in batch.rows]
    assert logs["tasks/missing"] == sum(without) / 16 == (batch.tasks == -1).float().mean()
    assert logs.get("tasks/m/share", 0.0) == 1 - logs["tasks/missing"]


# Two processes


def train(model_path, out) -> dict:
    """A batch of two groups of four on two processes: a rank sees one task, and now and then that of the other."""
    trainer = trained(
        model_path,
        f"{out}/run",
        reward=routed(),
        per_device_train_batch_size=4,
        max_steps=4,
        baseline="shrunk",
        **ADAPTIVE,
    )
    return {
        "own": [sorted({row["task"] for row in batch.rows}) for batch in batches_of(trainer)],
        "tasks": [batch.tasks.tolist() for batch in batches_of(trainer)],
        "advantages": [batch.advantages.tolist() for batch in batches_of(trainer)],
        "states": [callback.state_dict() for callback in trainer.grpo_callbacks],
        "logs": [{k: v for k, v in entry.items() if "time" not in k} for entry in logs_of(trainer)],
        "weights": {name: value.sum().item() for name, value in weights_of(trainer).items()},
    }


def train_a_broken_stream(model_path, out) -> str:
    """One process has rows without a task: that counts as on any other."""
    rows = [{"prompt": f"say {a}", "answer": a, "task": "m" if a < "c" else None} for a in "abcd"]
    stream = IterableDataset.from_generator(lambda: (row for _ in range(20) for row in rows))
    options = {"per_device_train_batch_size": 8, "shuffle_dataset": False}
    trainer = trained(model_path, f"{out}/stream", dataset=stream, max_steps=1, **options, **TASKS)
    return logs_of(trainer)[0]["tasks/missing"]


@pytest.mark.training
def test_ranks_that_see_different_tasks_agree(model_path, tmp_path):
    first, second = launch(model_path, tmp_path / "out", train)
    assert any(one != two for one, two in zip(first.pop("own"), second.pop("own"), strict=True))
    assert str(first) == str(second)


@pytest.mark.training
def test_ranks_agree_on_rows_without_a_task(model_path, tmp_path):
    assert launch(model_path, tmp_path / "out", train_a_broken_stream) == [0.5, 0.5]


# Bad input


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (has_answer, {"task_column": "taks"}, "task_column='taks' is not a column.*did you mean 'task'"),
        (has_answer, {"task_column": "score"}, "26 of 26 rows name no task: row 0 has score=0.0"),
        (has_answer, {**TASKS, "remove_unused_columns": True}, "remove_unused_columns=True takes the column 'task'"),
        (by_task({"maths": has_answer}), TASKS, "a reward for the task 'maths', unknown.*did you mean 'math'"),
        (by_task({"math": has_answer}), TASKS, "no reward for the task 'chat' of the dataset"),
        (
            has_answer,
            {**TASKS, "task_mixing": "weights", "task_weights": {"math": 1, "code": 2}},
            "names the task 'code', unknown to the dataset",
        ),
    ],
)
def test_what_does_not_fit_the_dataset_is_refused(model_path, tmp_path, reward, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(model_path, data(), tmp_path, reward, **options)


def test_routes_by_another_column_are_no_concern(model_path, tmp_path):
    reward = by_task({"easy": has_answer, "hard": count_vowels, "medium": count_vowels}, column="difficulty")
    trainer_of(model_path, data(), tmp_path, [reward, count_vowels], **TASKS)


def test_callbacks_read_one_column(model_path, tmp_path):
    callbacks = [TaskCallback("task"), TaskMixingCallback("difficulty")]
    with pytest.raises(ValueError, match=r"Callbacks read tasks from the columns \['difficulty', 'task'\]"):
        trained(model_path, tmp_path, callbacks=callbacks)
