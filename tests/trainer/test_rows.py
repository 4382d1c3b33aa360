"""Rows of completions: each its own objects, of the dataset that is there now, merged by what each round has."""

import pytest
import torch
from datasets import Dataset
from kit import config_kwargs, count_vowels, make_letters
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.shape.resampling import replace_rows


def trained(model_path, dataset, tmp_path, reward, config=AdaptiveGRPOConfig, trainer=AdaptiveGRPOTrainer, **options):
    args = config(**config_kwargs(tmp_path, **{"max_steps": 2, **options}))
    made = trainer(model=model_path, reward_funcs=reward, args=args, train_dataset=dataset)
    made.train()
    return made


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
def test_every_completion_has_its_own_row(options, model_path, tmp_path):
    rows = {"prompt": ["say a"] * 16, "board": [[0, 0]] * 16, "notes": [{"goals": ["a", "b"]}] * 16}
    seen: dict[str, list[int]] = {"stock": [], "ours": []}
    trained(model_path, Dataset.from_dict(rows), tmp_path, moves(seen["stock"]), GRPOConfig, GRPOTrainer)
    trained(model_path, Dataset.from_dict(rows), tmp_path, moves(seen["ours"]), **options)
    assert set(seen["ours"]) == set(seen["stock"]) == {13}


def test_a_transform_that_draws_gives_one_draw_to_a_group(model_path, tmp_path):
    def draw(rows):
        return {**rows, "drawn": [torch.rand(()).item() for _ in rows["prompt"]]}

    drawn: list[list[float]] = []

    class Look(GRPOCallback):
        def on_rollouts(self, batch, **kwargs):
            drawn.append([row["drawn"] for row in batch.rows])

    dataset = make_letters()
    dataset.set_transform(draw)
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, curriculum="online", max_steps=1))
    trainer = AdaptiveGRPOTrainer(
        model=model_path, reward_funcs=count_vowels, args=args, train_dataset=dataset, callbacks=[Look()]
    )
    trainer.train()
    assert [len(set(drawn[0][:4])), len(set(drawn[0][4:])), len(set(drawn[0]))] == [1, 1, 2]


# Another dataset


@pytest.mark.parametrize("size", [5, 60])
@pytest.mark.parametrize(
    "options", [{"curriculum": "online"}, {"group_size": "threshold"}, {"curriculum": "predicted"}]
)
def test_a_replaced_dataset_is_drawn_from_as_a_whole_and_known_anew(options, size, model_path, tmp_path):
    asked: list[str] = []

    def reward(prompts, completions, **kwargs):
        asked.extend(prompts)
        return count_vowels(completions)

    trainer = trained(model_path, make_letters(), tmp_path, reward, max_steps=30, logging_steps=100, **options)
    before = trainer._planner
    trainer.train_dataset = Dataset.from_dict({"prompt": [f"tell {i}" for i in range(size)]})
    asked.clear()
    trainer.train()
    assert trainer._planner is not before
    numbers = {int(prompt.removeprefix("tell ")) for prompt in asked}
    assert max(numbers) >= min(size - 1, 40)
    assert len(numbers) >= min(size, 30)


def test_a_replaced_dataset_that_does_not_fit_is_refused(model_path, tmp_path):
    trainer = trained(model_path, make_letters(), tmp_path, count_vowels, curriculum="online")
    trainer.train_dataset = make_letters().select(range(1))
    with pytest.raises(ValueError, match="train_dataset has 1 rows and one generation batch holds 2 prompts"):
        trainer.train()


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        (lambda dataset: __import__("datasets").DatasetDict(train=dataset), r"dataset\['train'\]"),
        (lambda dataset: list(dataset), r"Dataset.from_list\(rows\)"),
    ],
)
def test_other_kinds_of_datasets_are_refused_with_a_remedy_that_helps(made, remedy, model_path, tmp_path):
    with pytest.raises(ValueError, match=remedy):
        trained(model_path, made(make_letters()), tmp_path, count_vowels, curriculum="online")


# Merging two rounds


@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)])
def test_the_mask_of_regenerated_rows_is_kept_whichever_round_has_one(masks, model_path, tmp_path):
    calls, seen = [], []

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

    class Look(GRPOCallback):
        def on_rollouts(self, batch, **kwargs):
            seen.append((batch.completion_lengths.tolist(), [row["note"] for row in batch.rows]))

    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_steps=1, dynamic_sampling_rounds=1))
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=args,
        train_dataset=make_letters(),
        rollout_func=rollout,
        callbacks=[Look()],
    )
    trainer.train()
    lengths = {True: 3, False: 5}
    assert seen[0] == ([lengths[masks[1]]] * 4 + [lengths[masks[0]]] * 4, [2] * 4 + [1] * 4)


def test_an_entry_of_one_round_alone_is_refused_where_its_absence_says_nothing():
    ids = torch.zeros(2, 3, dtype=torch.long)
    fresh = {"completion_ids": ids, "scores": torch.ones(2)}
    with pytest.raises(ValueError, match="only one has 'scores'"):
        replace_rows({"completion_ids": ids}, fresh, torch.tensor([0]), pad_token_id=0)
