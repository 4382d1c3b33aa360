"""Rows as they are fetched: made by a transform, in another format, without a prompt, from a stream, or none at all."""

import pytest
from datasets import Dataset, IterableDataset
from kit import config_kwargs
from rollout_helpers import Record, length_of_text, make_conversations, make_trainer, user

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
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
def test_conversations_that_a_transform_makes(history, model_path, tmp_path):
    seen = set()

    def reward(completions, letter, turn, **kwargs):
        assert [f"letter {number - 1}" for number in turn] == letter
        seen.update(turn)
        return length_of_text(completions)

    options = {"rollout": "multi_turn", "turn_columns": ["letter"], "history": history, "curriculum": "online"}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    record = Record()
    dataset = raw().with_transform(turned)
    trainer = make_trainer(model_path, tmp_path, reward, dataset, [record], **options)
    trainer.train()
    assert seen == {1, 2, 3}
    assert max(batch.turns.max().item() for batch in record.batches) == 2
    callback = next(c for c in trainer.grpo_callbacks if hasattr(c, "num_turns"))
    assert callback.num_turns.tolist() == [1 + i % 3 for i in range(24)]


def test_trees_that_a_transform_makes(model_path, tmp_path):
    dataset = raw().with_transform(asked)
    trainer = make_trainer(model_path, tmp_path, dataset=dataset, curriculum="online", max_steps=1, **TREE)
    trainer.train()
    assert all("say " in sequence.prompt[-1]["content"] for sequence in trainer.seen[0][0][:3])


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        ({"turn_columns": ["level"]}, turned, r"names 'level', which is not a column of .*, only \['prompt', 'turns'"),
        (
            {"turn_columns": ["letter"]},
            lambda c: {**turned(c), "letter": [["a"]] * len(c["question"])},
            "Row 1 of the training dataset has 2 turns and letter=",
        ),
        ({}, lambda c: {**turned(c), "turn": c["level"]}, "Column 'turn' of the training dataset is what reward"),
        ({}, asked, "Every conversation has one turn"),
        ({}, lambda c: {"messages": asked(c)["prompt"]}, r"'prompt', and row 0 of train_dataset has only \['messages'"),
        ({}, lambda c: {"prompt": c["question"]}, "needs conversational prompts, and that of row 0 of train_dataset"),
        (TREE, turned, "Row 1 of the training dataset has 2 turns: a plan is made for prompts of one turn"),
        (TREE, lambda c: {**asked(c), "plan": c["level"]}, r"The columns \['plan'\] of the training dataset would be"),
        (
            TREE,
            lambda c: {"messages": asked(c)["prompt"]},
            r"'prompt', and row 0 of train_dataset has only \['messages'",
        ),
    ],
)
def test_rows_of_a_transform_that_do_not_fit_are_refused(options, make, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_path, tmp_path, dataset=raw().with_transform(make), **{"rollout": "multi_turn", **options})


@pytest.mark.parametrize("rollout", ["multi_turn", "hierarchical"])
def test_messages_without_a_prompt_are_refused(rollout, model_path, tmp_path):
    dataset = Dataset.from_list([{"messages": [user("a")], "turns": ["b"]}] * 24)
    with pytest.raises(ValueError, match=r"needs a column 'prompt', and row 0 of train_dataset has only \['messages'"):
        make_trainer(model_path, tmp_path, dataset=dataset, **{**TREE, "rollout": rollout})


def test_values_of_turns_may_be_tensors(model_path, tmp_path):
    seen = []

    def reward(completions, score, turn, **kwargs):
        seen.extend(zip(turn, map(float, score), strict=True))
        return [1.0] * len(completions)

    rows = [{"prompt": [user("a")], "turns": ["b", "c"], "score": [0.5, 1.5, 2.5]}] * 12
    dataset = Dataset.from_list(rows).with_format("torch")
    make_trainer(
        model_path, tmp_path, reward, dataset, rollout="multi_turn", turn_columns=["score"], max_steps=1
    ).train()
    assert {(turn, score) for turn, score in seen} == {(1, 0.5), (2, 1.5), (3, 2.5)}


# Evaluation


def build(model_path, out, dataset, eval_dataset, callbacks=(), **options):
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, **options}
    options = {"per_device_train_batch_size": 16, "num_generations_eval": 1, **options}
    args = AdaptiveGRPOConfig(**config_kwargs(out, **options))
    return AdaptiveGRPOTrainer(model_path, length_of_text, args, dataset, eval_dataset, callbacks=list(callbacks))


ROLLOUTS = {"multi_turn": {"rollout": "multi_turn"}, "hierarchical": TREE}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_row_is_taken_from_a_stream(name, model_path, tmp_path):
    """A stream that can be read once still has all its rows when evaluation begins."""
    data = make_conversations() if name == "multi_turn" else make_conversations().remove_columns("turns")
    left = list(data.select(range(4)))

    def pull():
        while left:
            yield left.pop(0)

    trainer = build(model_path, tmp_path, data, IterableDataset.from_generator(pull), **ROLLOUTS[name])
    assert len(left) == 4
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert not left
    assert evaluated[0]["eval_num_tokens"] > 0
    assert len(trainer.rollout.sequences) == 4


@pytest.mark.parametrize("name", ROLLOUTS)
def test_an_evaluation_set_without_rows(name, model_path, tmp_path):
    data = make_conversations() if name == "multi_turn" else make_conversations().remove_columns("turns")
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\] is empty: pass at least one conversation, or leave"):
        build(model_path, tmp_path, data, {"one": data, "two": data.select([])}, **ROLLOUTS[name])
    empty = IterableDataset.from_generator(lambda: iter(()))  # only reading it would say so
    build(model_path, tmp_path, data, empty, **ROLLOUTS[name]).train()


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
def test_rows_of_a_stream_are_checked_when_they_come(options, row, message, model_path, tmp_path):
    data = make_conversations()
    data = data if options["rollout"] == "multi_turn" else data.remove_columns("turns")
    trainer = build(model_path, tmp_path, data, IterableDataset.from_generator(lambda: iter([row] * 4)), **options)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()


def test_a_callback_that_generates_leaves_a_stream_of_prompts_whole(model_path, tmp_path):
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
    trainer = build(model_path, tmp_path, stream, None, [Echo()], eval_strategy="no")
    assert not pulled
    trainer.train()
    assert pulled
