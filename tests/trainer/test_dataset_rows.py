"""Rows of completions: each its own objects, of the dataset that is there now, merged by what each round has."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from kit import Record, batches_of, count_vowels
from trl import GRPOTrainer

from trl_grpo_ext.shape.resampling import replace_rows

# Objects of their own


def moves(seen):
    """A reward that plays on the board and the notes of its row, in place."""

    def play(completions, board, notes, **kwargs):
        for one_board, one_notes in zip(board, notes, strict=True):
            one_board.append(1)
            one_notes["goals"].pop()
            seen.append(len(one_board) + 10 * len(one_notes["goals"]))
        return [float(len(c) % 3) for c in completions]

    return play


@pytest.mark.parametrize(
    "options",
    [
        {"curriculum": "online"},
        {"group_size": "variance"},
        {"dynamic_sampling_rounds": 1},
        {"group_size": "single", "baseline": "batch", "scale_rewards": "batch"},
    ],
)
def test_every_completion_has_its_own_row(options, trained):
    rows = {"prompt": ["say a"] * 16, "board": [[0, 0]] * 16, "notes": [{"goals": ["a", "b"]}] * 16}
    seen: dict[str, list[int]] = {"stock": [], "ours": []}
    given = {"dataset": Dataset.from_dict(rows), "max_steps": 2}
    trained(reward_funcs=moves(seen["stock"]), cls=GRPOTrainer, **given)
    trained(reward_funcs=moves(seen["ours"]), **given, **options)
    assert set(seen["ours"]) == set(seen["stock"]) == {13}


def test_a_transform_that_draws_gives_one_draw_to_a_group(trained, dataset):
    def draw(rows):
        return {**rows, "drawn": [torch.rand(()).item() for _ in rows["prompt"]]}

    dataset.set_transform(draw)
    (batch,) = batches_of(trained(callbacks=[Record], curriculum="online", max_steps=1))
    drawn = [row["drawn"] for row in batch.rows]
    assert [len(set(drawn[:4])), len(set(drawn[4:])), len(set(drawn))] == [1, 1, 2]


# Another dataset


@pytest.mark.parametrize("size", [5, 60])
@pytest.mark.parametrize(
    "options", [{"curriculum": "online"}, {"group_size": "threshold"}, {"curriculum": "predicted"}]
)
def test_a_replaced_dataset_is_drawn_from_as_a_whole_and_known_anew(options, size, trained):
    asked: list[str] = []

    def reward(prompts, completions, **kwargs):
        asked.extend(prompts)
        return count_vowels(completions)

    trainer = trained(reward_funcs=reward, max_steps=30, logging_steps=100, **options)
    before = trainer._planner
    trainer.train_dataset = Dataset.from_dict({"prompt": [f"tell {i}" for i in range(size)]})
    asked.clear()
    trainer.train()
    assert trainer._planner is not before
    numbers = {int(prompt.removeprefix("tell ")) for prompt in asked}
    assert max(numbers) >= min(size - 1, 40)
    assert len(numbers) >= min(size, 30)


def test_a_replaced_dataset_that_does_not_fit_is_refused(make_trainer, dataset):
    trainer = make_trainer(curriculum="online")
    trainer.train_dataset = dataset.select(range(1))
    with pytest.raises(ValueError, match="train_dataset has 1 rows and one generation batch holds 2 prompts"):
        trainer.train()


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        (lambda dataset: DatasetDict(train=dataset), r"dataset\['train'\]"),
        (lambda dataset: list(dataset), r"Dataset.from_list\(rows\)"),
    ],
)
def test_other_kinds_of_datasets_are_refused_with_a_remedy_that_helps(made, remedy, make_trainer, dataset):
    with pytest.raises(ValueError, match=remedy):
        make_trainer(dataset=made(dataset), curriculum="online")


# Merging two rounds


@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)])
def test_the_mask_of_regenerated_rows_is_kept_whichever_round_has_one(masks, trained):
    calls = []

    def rollout(prompts, trainer):
        calls.append(1)
        tokenizer = trainer.processing_class
        output = {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[10 + i % 5, 99, 99, 12, 3] for i in range(len(prompts))],
            "logprobs": None,
            "note": [len(calls)] * len(prompts),
        }
        if masks[(len(calls) - 1) % 2]:
            output["env_mask"] = [[1, 0, 0, 1, 1] for _ in prompts]
        return output

    def reward(completions, note, **kwargs):
        half = len(completions) // 2
        return [1.0] * half + [float(i % 2) for i in range(len(completions) - half)]

    given = {"reward_funcs": reward, "rollout_func": rollout, "callbacks": [Record]}
    (batch,) = batches_of(trained(max_steps=1, dynamic_sampling_rounds=1, **given))
    lengths = {True: 3, False: 5}
    assert batch.completion_lengths.tolist() == [lengths[masks[1]]] * 4 + [lengths[masks[0]]] * 4
    assert [row["note"] for row in batch.rows] == [2] * 4 + [1] * 4


def test_an_entry_of_one_round_alone_is_refused_where_its_absence_says_nothing():
    ids = torch.zeros(2, 3, dtype=torch.long)
    fresh = {"completion_ids": ids, "scores": torch.ones(2)}
    with pytest.raises(ValueError, match="only one has 'scores'"):
        replace_rows({"completion_ids": ids}, fresh, torch.tensor([0]), pad_token_id=0)
