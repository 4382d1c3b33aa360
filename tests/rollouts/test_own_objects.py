"""Each call of a user's function has objects of its own: what one changes in place, no other call sees."""

import pytest
import torch
from datasets import Dataset
from kit import batches_of
from rollout_helpers import user

from trl_grpo_ext import GRPOCallback, MultiTurnCallback


def boards(count: int = 12) -> Dataset:
    rows = [
        {
            "prompt": [user(f"say {chr(ord('a') + i)}")],
            "turns": [{"role": "user", "content": f"and {t}?"} for t in range(2)],
            "board": [0, 0, 0],
            "info": {"goals": ["a", "b"]},
            "hints": [["x"], ["y"], ["z"]],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


class Vandal:
    """A reward that changes everything it gets, and keeps what it saw before."""

    __name__ = "vandal"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, completion_ids, **columns):
        columns = {key: value for key, value in columns.items() if isinstance(value, list)}
        scores = []
        for i, prompt in enumerate(prompts):
            own = {key: value[i] for key, value in columns.items()}
            self.seen.append((own.get("board"), own.get("info"), own.get("hints"), [m["content"] for m in prompt], own))
            self.seen[-1] = repr(self.seen[-1][:3]), self.seen[-1][3], own.get("turn")
            scores.append(float(sum(map(ord, completions[i][0]["content"]))))
            for message in prompt:
                message["content"] = "gone"
            prompt.append(user("more"))
            completions[i][0]["content"] = "gone"
            completion_ids[i].clear()
            for value in own.values():
                if isinstance(value, list):
                    value.append(["gone"])
                elif isinstance(value, dict):
                    value.clear()
        return scores


CLEAN = {
    "shared": {"history": "shared"},
    "best": {"history": "shared", "carry": "best"},
    "independent": {"history": "independent"},
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_reward_that_changes_its_rows_changes_them_for_nobody(name, trained):
    """Also not for the turns to come, where an answer is scored twice, in evaluation, and for the model."""
    vandal = Vandal()
    options = {"rollout": "multi_turn", "turn_columns": ["hints"], "max_steps": 2, **CLEAN[name]}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = trained(reward_funcs=vandal, dataset=boards(), **options)
    for values, contents, turn in vandal.seen:
        hint = "xyz"[turn - 1]
        assert values == f"([0, 0, 0], {{'goals': ['a', 'b']}}, ['{hint}'])"
        assert contents[0].startswith("say ")
        assert len(contents) == 2 * turn - 1
        assert contents[2::2] == [f"and {t}?" for t in range(turn - 1)]
        assert "gone" not in contents
    for sequences, _ in trainer.seen:
        for sequence in sequences:
            for answer in sequence.answers:
                assert answer.ids
                assert all(message["content"] != "gone" for message in answer.prompt)
    assert all(row["board"] == [0, 0, 0] for batch in batches_of(trainer) for row in batch.rows)


def test_a_reward_that_changes_the_plan_changes_it_for_nobody(trained):
    seen = []

    def vandal(completions, plan_ids, board, **kwargs):
        seen.extend((len(ids), list(row)) for ids, row in zip(plan_ids, board, strict=True))
        for ids, row in zip(plan_ids, board, strict=True):
            ids.clear()
            row.append(1)
        return [1.0] * len(completions)

    options = {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 2, "num_generations": 2}
    options |= {"per_device_train_batch_size": 18, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    data = boards().remove_columns("turns")
    trainer = trained(reward_funcs=vandal, dataset=data, per_device_eval_batch_size=4, **options)
    assert len(seen) > 12
    assert all(length > 0 and board == [0, 0, 0] for length, board in seen)
    assert all(answer.ids for sequences, _ in trainer.seen for sequence in sequences for answer in sequence.answers)


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_user_who_changes_the_history_changes_it_for_nobody(history, trained):
    said = user("more")  # one object for all that this user says

    def forgetful(messages):
        assert all(message["content"] != "gone" for message in messages)
        for message in messages:
            message["content"] = "gone"
        messages.clear()
        return said

    dataset = boards().remove_columns(["turns", "hints"])
    callback = MultiTurnCallback(history, user=forgetful, max_turns=3)
    trainer = trained(dataset=dataset, callbacks=[callback], max_steps=1)
    said["content"] = "changed later"
    for sequences, _ in trainer.seen:
        for sequence in sequences:
            contents = [m["content"] for a in sequence.answers for m in a.prompt if m["role"] == "user"]
            assert set(contents[1:]) <= {"more", *(f"say {chr(ord('a') + i)}" for i in range(12))}
            assert contents[0].startswith("say ")


def test_a_choice_that_changes_the_history_changes_it_for_nobody(trained):
    def last(messages, answers):
        assert all(message["content"] != "gone" for message in messages)
        for message in messages:
            message["content"] = "gone"
        messages.clear()
        number = len(answers) - 1
        answers.clear()
        return number

    callback = MultiTurnCallback(carry=last)
    trainer = trained(dataset=boards(), callbacks=[callback], max_steps=1)
    prompts = [a.prompt for sequences, _ in trainer.seen for sequence in sequences for a in sequence.answers]
    assert {len(prompt) for prompt in prompts} == {1, 3, 5}
    assert all(prompt[0]["content"].startswith("say ") for prompt in prompts)


def test_a_hook_may_change_the_row_of_one_completion(trained):
    counts = []

    class Count(GRPOCallback):
        def on_total_rewards(self, batch, **kwargs):
            for row in batch.rows:
                row["board"].append(1)
                counts.append(len(row["board"]))
            return None

    options = {"rollout": "multi_turn", "history": "independent", "max_steps": 1}
    trained(dataset=boards(), callbacks=[Count()], **options)
    assert set(counts) == {4}


def test_what_cannot_be_copied_is_passed_as_it_is(trained):
    """Such as a handle that a transform puts into its rows."""
    handle = (i for i in range(3))
    seen = []

    def reward(completions, handle, tensor, **kwargs):
        seen.extend(handle)
        for value in tensor:
            assert value.tolist() == [0.0, 0.0]
            value += 1
        return [1.0] * len(completions)

    def transform(columns):
        count = len(columns["prompt"])
        tensor = [torch.zeros(2)] * count  # one for all rows
        return {"prompt": columns["prompt"], "turns": columns["turns"], "handle": [handle] * count, "tensor": tensor}

    dataset = boards().with_transform(transform)
    trained(reward_funcs=reward, dataset=dataset, rollout="multi_turn", max_steps=1)
    assert len(seen) == 16
    assert all(value is handle for value in seen)
