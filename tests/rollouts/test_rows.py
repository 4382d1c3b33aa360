"""Rows as they are fetched: made by a transform, in another format, without a prompt, from a stream, or none at all."""

import pytest
from datasets import Dataset, IterableDataset
from kit import batches_of
from rollout_helpers import length_of_text, make_conversations, user

from trl_grpo_ext import GRPOCallback
from trl_grpo_ext.hooks import Answer, RolloutSequence

TREE = {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 2, "per_device_train_batch_size": 18}
TREE |= {"num_generations": 2}


def raw(count: int = 24) -> Dataset:
    return Dataset.from_dict({"question": [f"say {i}" for i in range(count)], "level": [i % 3 for i in range(count)]})


def turned(columns):
    """One to three turns, with what reward functions need for each."""
    questions = columns["question"]
    turns = [["why?"] * (int(question.split()[1]) % 3) for question in questions]
    letters = [[f"letter {i}" for i in range(len(said) + 1)] for said in turns]
    return {"prompt": [[user(question)] for question in questions], "turns": turns, "letter": letters}


def asked(columns):
    return {"prompt": [[user(question)] for question in columns["question"]], "plain": columns["question"]}


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_conversations_that_a_transform_makes(history, trained):
    seen = set()

    def reward(completions, letter, turn, **kwargs):
        assert [f"letter {number - 1}" for number in turn] == letter
        seen.update(turn)
        return length_of_text(completions)

    options = {"rollout": "multi_turn", "turn_columns": ["letter"], "history": history, "curriculum": "online"}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    dataset = raw().with_transform(turned)
    trainer = trained(reward_funcs=reward, dataset=dataset, **options)
    assert seen == {1, 2, 3}
    assert max(batch.turns.max().item() for batch in batches_of(trainer)) == 2
    callback = next(c for c in trainer.grpo_callbacks if hasattr(c, "num_turns"))
    assert callback.num_turns.tolist() == [1 + i % 3 for i in range(24)]


def test_trees_that_a_transform_makes(trained):
    dataset = raw().with_transform(asked)
    trainer = trained(dataset=dataset, curriculum="online", max_steps=1, **TREE)
    assert all("say " in sequence.prompt[-1]["content"] for sequence in trainer.seen[0][0][:3])


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        ({"turn_columns": ["level"]}, turned, r"names 'level', which is not a column of .*, only \['prompt', 'turns'"),
        (
            {"turn_columns": ["letter"]},
            lambda c: {**turned(c), "letter": [["a"]] * len(c["question"])},
            "Row 1 of the training dataset has 2 turns and letter=.*give a list with one value for each turn",
        ),
        ({}, lambda c: {**turned(c), "turn": c["level"]}, "Column 'turn' of the training dataset is what reward"),
        ({}, asked, "Every conversation has one turn"),
        ({}, lambda c: {"messages": asked(c)["prompt"]}, r"'prompt', and row 0 of train_dataset has only \['messages'"),
        ({}, lambda c: {"prompt": c["question"]}, "needs conversational prompts, and that of row 0 of train_dataset"),
        (TREE, turned, "Row 1 of the training dataset has 2 turns: a plan is made for prompts of one turn"),
        (
            TREE,
            lambda c: {**asked(c), "plan": c["level"], "turn": c["level"]},
            r"The columns \['plan', 'turn'\] of the training dataset would be replaced .*: rename them",
        ),
        (
            TREE,
            lambda c: {"messages": asked(c)["prompt"]},
            r"'prompt', and row 0 of train_dataset has only \['messages'",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(options, make, message, make_trainer):
    for dataset in (raw().with_transform(make), Dataset.from_dict(make(raw()[:]))):
        with pytest.raises(ValueError, match=message):
            make_trainer(dataset=dataset, **{"rollout": "multi_turn", **options})


def test_values_of_turns_may_be_tensors(trained):
    seen = []

    def reward(completions, score, turn, **kwargs):
        seen.extend(zip(turn, map(float, score), strict=True))
        return [1.0] * len(completions)

    rows = [{"prompt": [user("a")], "turns": ["b", "c"], "score": [0.5, 1.5, 2.5]}] * 12
    dataset = Dataset.from_list(rows).with_format("torch")
    trained(reward_funcs=reward, dataset=dataset, rollout="multi_turn", turn_columns=["score"], max_steps=1)
    assert {(turn, score) for turn, score in seen} == {(1, 0.5), (2, 1.5), (3, 2.5)}


# Evaluation


@pytest.fixture
def build(make_trainer):
    def make(dataset, eval_dataset, callbacks=(), **options):
        options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, **options}
        options = {"per_device_eval_batch_size": 4, **options}
        return make_trainer(dataset=dataset, eval_dataset=eval_dataset, callbacks=callbacks, **options)

    return make


DATA = {"multi_turn": make_conversations(), "hierarchical": make_conversations().remove_columns("turns")}
ROLLOUTS = {"multi_turn": {"rollout": "multi_turn"}, "hierarchical": TREE}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_row_is_taken_from_a_stream(name, build):
    """A stream that can be read once still has all its rows when evaluation begins."""
    left = list(DATA[name].select(range(4)))

    def pull():
        while left:
            yield left.pop(0)

    trainer = build(DATA[name], IterableDataset.from_generator(pull), **ROLLOUTS[name])
    assert len(left) == 4
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert not left
    assert evaluated[0]["eval_num_tokens"] > 0
    assert len(trainer.rollout.sequences) == 4


@pytest.mark.parametrize("name", ROLLOUTS)
def test_an_evaluation_set_without_rows(name, build):
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\] is empty: pass at least one conversation, or leave"):
        build(DATA[name], {"one": DATA[name], "two": DATA[name].select([])}, **ROLLOUTS[name])
    empty = IterableDataset.from_generator(lambda: iter(()))  # only reading it would say so
    build(DATA[name], empty, **ROLLOUTS[name]).train()


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"rollout": "multi_turn"}, {"prompt": "a"}, "needs conversational prompts, and that of row 0 of the batch"),
        ({"rollout": "multi_turn"}, {"messages": [user("a")]}, "needs a column 'prompt', and row 0 of the batch"),
        ({"rollout": "multi_turn"}, {"prompt": [user("a")], "turns": [7]}, "Row 0 of the batch: turns="),
        (
            {"rollout": "multi_turn", "turn_columns": ["letter"]},
            {"prompt": [user("a")]},
            "names 'letter', which is not",
        ),
        ({"rollout": "multi_turn"}, {"prompt": [user("a")], "turn": 3}, "Column 'turn' of row 0 of the batch"),
        (TREE, {"prompt": [user("a")], "turns": ["b"]}, "Row 0 of the batch has 2 turns: a plan is made for"),
        (TREE, {"prompt": [user("a")], "plan": "c"}, r"The columns \['plan'\] of row 0 of the batch would be replaced"),
    ],
)
def test_rows_of_a_stream_are_checked_when_they_come(options, row, message, build):
    trainer = build(DATA[options["rollout"]], IterableDataset.from_generator(lambda: iter([row] * 4)), **options)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()


def test_a_callback_that_generates_leaves_a_stream_of_prompts_whole(build):
    class Echo(GRPOCallback):
        def on_setup(self, trainer, **kwargs):
            self.trainer = trainer

        def on_generate(self, rows, **kwargs):
            ids = self.trainer.tokenize([row["prompt"] for row in rows])
            completions, _ = self.trainer.generate(ids)
            return [
                RolloutSequence(prompt, [Answer(row["prompt"], completion, "x", is_last=True)])
                for row, prompt, completion in zip(rows, ids, completions, strict=True)
            ]

    pulled = []

    def pull():
        for row in make_conversations():
            pulled.append(row)
            yield row

    stream = IterableDataset.from_generator(pull)
    trainer = build(stream, None, [Echo()], eval_strategy="no")
    assert not pulled
    trainer.train()
    assert pulled
