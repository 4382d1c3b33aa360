"""Conversations: rows, tokens and credit of both histories, simulated users, and everything they combine with."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from kit import batches_of, make_model, make_tokenizer, trainer_of
from rollout_helpers import first_turns, has_letter, length_of_text, make_conversations, patient, use_vllm, user
from trl import GRPOTrainer, chat_template_utils

from trl_grpo_ext import GRPOCallback, MultiTurnCallback
from trl_grpo_ext.credit.turns import leave_one_out_advantages, returns
from trl_grpo_ext.hooks.records import Answer
from trl_grpo_ext.rewards import Length, RewardError, as_reward, at_end
from trl_grpo_ext.rollouts.dialogue import RolloutError, read_turns
from trl_grpo_ext.rollouts.shared import fill_with_conversations

OPTIONS = {"rollout": "multi_turn", "turn_columns": ["letter"]}

# The dataset


def test_a_conversation_is_read_from_turns_or_from_missing_answers():
    system, missing = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": None}
    expected = ([system, user("a")], [[user("b")], [user("c")]])
    assert read_turns({"prompt": [system, user("a")], "turns": ["b", user("c")]}) == expected
    assert read_turns({"prompt": [system, user("a"), missing, user("b"), missing, user("c")]}) == expected
    assert read_turns({"prompt": [user("a"), {"role": "assistant", "content": ""}]}) == ([user("a")], [])
    given_answer = {"role": "assistant", "content": "Hello."}
    assert read_turns({"prompt": [user("a"), given_answer, user("b")], "turns": None})[0][1] == given_answer
    with pytest.raises(ValueError, match="is no list of messages"):
        read_turns({"prompt": "a"})
    with pytest.raises(ValueError, match="the user says nothing"):
        read_turns({"prompt": [user("a"), missing, missing, user("b")]})


@given(
    st.lists(st.integers(1, 5), min_size=27, max_size=36),  # as many as there may be rows for, which is what is drawn
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_conversations_fill_the_rows_of_every_process(turns, group_size, num_processes, extra):
    num_rows = 5 * group_size + extra
    chosen = fill_with_conversations(turns, num_rows, group_size, num_processes)
    positions = [position for own in chosen for position, _ in own]
    assert len(chosen) == num_processes
    assert len(set(positions)) == len(positions)
    for own in chosen:
        assert sum(sum(sizes) for _, sizes in own) == num_rows
        sizes = [size for _, sizes in own for size in sizes]
        assert min(sizes) >= group_size
        assert max(sizes) - min(sizes) <= 1
        assert all(len(sizes) == turns[position] for position, sizes in own)


# Shared history


def test_shared_history_is_plain_grpo_on_the_flattened_rows(model_path, tmp_path, monkeypatch, make_trainer):
    """Stock TRL, given the same prompts and completions with equal groups, makes the same tensors and the same loss."""
    dataset = make_conversations().filter(lambda row: len(row["letter"]) == 2)
    options = {**OPTIONS, "max_steps": 1, "beta": 0.1}
    trainer = make_trainer(reward_funcs=[length_of_text, has_letter], dataset=dataset, **options)
    trainer.model.train()
    output = trainer._generate_and_score_completions([])
    rows = trainer.rollout.sequences
    answers = [row.answers[0] for row in rows]
    assert [answer.turn for answer in answers] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4

    flat = [{"prompt": a.prompt, "letter": a.columns["letter"]} for a in answers]
    options = {"per_device_train_batch_size": 16, "beta": 0.1, "cls": GRPOTrainer}
    stock = trainer_of(model_path, Dataset.from_list(flat), tmp_path, [length_of_text, has_letter], **options)
    stock.model.load_state_dict(trainer.model.state_dict())
    monkeypatch.setattr(stock, "_tokenize_prompts", lambda prompts: ([row.prompt_ids for row in rows], None, {}))
    monkeypatch.setattr(stock, "_generate_single_turn", lambda *args, **kwargs: ([a.ids for a in answers], None))
    stock.model.train()
    expected = stock._generate_and_score_completions(flat)
    assert expected.keys() == output.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, msg=name)
    assert output["advantages"].abs().sum() > 1
    losses = []
    for one, batch in ((trainer, output), (stock, expected)):
        one.current_gradient_accumulation_steps = 1
        losses.append(one._compute_loss(one.model, batch))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    for (name, value), other in zip(trainer.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("carry", ["random", "best", lambda history, answers: len(answers) - 1])
def test_a_turn_is_sampled_from_what_one_answer_carried_on(carry, trained):
    callback = MultiTurnCallback(carry=carry, turn_columns=["letter"])
    trainer = trained(callbacks=[callback], per_device_train_batch_size=24)
    tokenizer, choices = trainer.processing_class, set()
    for (rows, _), batch in zip(trainer.seen, batches_of(trainer), strict=True):
        assert len(rows) == 24
        for number, row in enumerate(rows):
            answer = row.answers[0]
            if answer.turn == 0:
                assert row.parent is None
                continue
            before = rows[row.parent]
            # By tokens, nothing tokenised again: prompt, answer, end of turn if it was cut off, and what the user says.
            said = f"<|im_start|>user {row.answers[0].prompt[-1]['content']}<|im_end|><|im_start|>assistant "
            end = [] if before.answers[0].ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
            glue = end + tokenizer(said, add_special_tokens=False)["input_ids"]
            assert row.prompt_ids == before.prompt_ids + before.answers[0].ids + glue
            assert answer.prompt[:-1] == before.answers[0].prompt + before.answers[0].completion
            group = batch.group_ids == batch.group_ids[row.parent]
            choices.add(int(group[: row.parent].sum()))
            if carry == "best":
                assert batch.rewards[row.parent] == batch.rewards[group].max()
            assert batch.parents[number] == row.parent
        # One history per group.
        for group in range(batch.num_groups):
            own = (batch.group_ids == group).nonzero().flatten().tolist()
            assert len({tuple(rows[i].prompt_ids) for i in own}) == 1
            assert len(own) >= 4
    if carry == "random":
        assert len(choices) > 1
    elif carry != "best":
        assert min(choices) >= 3


def test_reward_functions_are_told_the_turn(trained):
    calls = []

    def spy(prompts, completions, letter, turn, last_turn, **kwargs):
        calls.extend(zip(prompts, letter, turn, last_turn, strict=True))
        return [1.0] * len(prompts)

    trained(reward_funcs=spy, **OPTIONS)
    assert len(calls) == 3 * 16
    lengths = set()
    for prompt, letter, turn, last_turn in calls:
        first = ord(prompt[0]["content"][-1]) - ord("a")
        turns = 1 + first // 3 % 3
        assert letter == chr(ord("a") + (first + turn - 1) % 26)
        assert len(prompt) == 2 * turn - 1
        assert last_turn == (turn == turns)
        lengths.add(turns)
    assert lengths == {1, 2, 3}


# Independent history


def test_conversations_are_one_row_each_and_users_are_never_trained_on(trained):
    options = {**OPTIONS, "history": "independent", "scale_rewards": "none"}
    trainer = trained(**options)
    for (rows, output), batch in zip(trainer.seen, batches_of(trainer), strict=True):
        assert len(rows) == 16
        following = returns(batch.rewards, batch.parents)
        torch.testing.assert_close(
            batch.advantages, leave_one_out_advantages(following, batch.group_ids, batch.num_groups)
        )
        number = 0
        for index, row in enumerate(rows):
            trained = output["tool_mask"][index] * output["completion_mask"][index] > 0
            written = [token for answer in row.answers for token in answer.ids]
            assert output["completion_ids"][index][trained].tolist() == written
            assert (output["advantages"][index][~trained] == 0).all()
            credit = [batch.advantages[number + i] for i, a in enumerate(row.answers) for _ in a.ids]
            assert output["advantages"][index][trained].tolist() == [c.item() for c in credit]
            text = trainer.processing_class.decode(row.prompt_ids + output["completion_ids"][index].tolist())
            assert all(answer.prompt[-1]["content"] in text for answer in row.answers)
            number += len(row.answers)
        assert output["num_items_in_batch"] == sum(len(a.ids) for row in rows for a in row.answers)
        assert batch.completion_lengths.tolist() == [len(a.ids) for row in rows for a in row.answers]
    logs = trainer.state.log_history[0]
    assert logs["rollouts/total"] == batches_of(trainer)[0].turns.numel()
    assert logs["multi_turn/turns"] == pytest.approx(batches_of(trainer)[0].turns.numel() / 16)


def can_be_tokenised_again(row, trainer) -> bool:
    """What the model writes may be no text whose tokens are those, which is why we do not tokenise it again."""
    tokenizer = trainer.processing_class
    own = [[t for t in a.ids if t != tokenizer.eos_token_id] for a in row.answers]
    return len(own) > 1 and own == [tokenizer(a.text)["input_ids"] for a in row.answers]


@pytest.mark.parametrize("closing", [None, "<|im_end|>", "<|im_end|>\n", "\n", ""])
def test_a_conversation_is_the_same_by_tokens_and_by_template(closing, trained):
    """Also in base models, whose end of text, here ~, is no token with which the template closes a turn."""
    tokenizer = make_tokenizer()
    if closing is not None:
        tokenizer.eos_token = "~"
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", closing)
    options = {**OPTIONS, "history": "independent"}
    trainer = trained(model=make_model(tokenizer), processing_class=tokenizer, **options)
    compared = 0
    for row in (row for rows, _ in trainer.seen for row in rows if can_be_tokenised_again(row, trainer)):
        ids = row.prompt_ids + [t for a in row.answers for t in a.glue_ids + a.ids]
        rendered = tokenizer.apply_chat_template(row.prompt + row.completion, tokenize=False)
        compared += 1
        assert rendered.startswith(tokenizer.decode([t for t in ids if closing is None or t != tokenizer.eos_token_id]))
    assert compared > 5


def test_rewards_of_each_turn_are_logged(tmp_path, trained):
    options = {**OPTIONS, "history": "independent", "eval_strategy": "steps", "eval_steps": 3}
    options |= {"per_device_eval_batch_size": 8, "log_completions": True}
    reward = as_reward(length_of_text) + as_reward(has_letter)
    trainer = trained(reward_funcs=[reward, length_of_text], **options)
    logs, batch = trainer.state.log_history[0], batches_of(trainer)[0]
    for turn in range(3):
        own = batch.raw_rewards_per_func[batch.turns == turn, 1]
        assert logs[f"rewards/length_of_text/turn_{turn + 1}/mean"] == pytest.approx(own.mean().item())
    total = batch.rewards.sum().item() / 16
    assert logs["reward"] == pytest.approx(total, rel=1e-5)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_rewards/length_of_text/turn_3/mean"] > 0
    assert evaluated["eval_multi_turn/turns"] == pytest.approx((1 + 2 + 3 + 1) / 4)
    tables = sorted((tmp_path / "run" / "completions").iterdir())
    assert tables
    import pandas

    table = pandas.read_parquet(tables[0])
    assert len(table) == 16
    assert table["advantage"].notna().all()
    # A part of a composed reward has a value for each turn. Before TRL 1.15, the table holds text, not messages.
    if not isinstance(table["completion"][0], str):
        assert [len(values) for values in table["has_letter"]] == [(len(c) + 1) // 2 for c in table["completion"]]


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_rows_of_training_and_evaluation_fit_into_one_table(history, tmp_path, trained):
    options = {"history": history, "log_completions": True, "num_completions_to_print": 0, "max_steps": 4}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    reward = as_reward(length_of_text) + 0.5 * Length("characters")
    trained(reward_funcs=reward, num_generations_eval=1, **OPTIONS, **options)
    counts = set()
    for path in sorted((tmp_path / "run" / "completions").glob("*.parquet")):
        table = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        for completion, lengths in zip(table["completion"], table["length"], strict=True):
            counts.add(len(lengths))
            if not isinstance(completion, str):  # up to TRL 1.14, the table holds the whole conversation as text
                texts = [message["content"] for message in completion if message["role"] == "assistant"]
                assert lengths == [float(len(text)) for text in texts]
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_reward_may_see_the_whole_conversation_at_its_end(history, trained):
    seen = []

    def whole(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    reward = as_reward(length_of_text) + at_end(whole)
    trainer = trained(reward_funcs=reward, history=history, max_steps=1, **OPTIONS)
    ends = [a for rows, _ in trainer.seen for row in rows for a in row.answers if a.is_last]
    assert len(seen) == len(ends)
    for prompt, completion in seen:
        assert len(prompt) == 1
        assert [m["role"] for m in completion] == (["assistant", "user"] * 3)[: len(completion)]
        assert completion[-1]["role"] == "assistant"
    assert at_end(Length("characters") > 3).__name__ == "length_at_end>3"
    said = [{"role": "assistant", "content": "one two"}]
    ends = {"prompts": [[]], "completions": [said], "completion_ids": [[1, 2]], "last_turn": [True]}
    assert at_end(Length("words"))(**ends) == [2.0]
    with pytest.raises(RewardError, match="words"):  # the ids are those of the last answer alone
        at_end(Length())(**ends)


def test_what_a_reward_of_the_whole_conversation_logs_keeps_its_rows():
    def judge(completions, log_extra, **kwargs):
        log_extra(column="verdict", values=[completion[-1]["content"] for completion in completions])
        return [1.0] * len(completions)

    history = [{"role": "user", "content": "Hi"}]
    said = [[{"role": "assistant", "content": text}] for text in ("a1", "a2", "b1", "b2")]
    later = [*history, *said[0], *history]
    columns = {}
    values = at_end(judge)(
        prompts=[history, later, history, later],
        completions=said,
        turn=[1, 2, 1, 2],
        last_turn=[False, True, False, True],
        log_extra=columns.__setitem__,
    )
    assert values == [None, 1.0, None, 1.0]
    assert columns["verdict"] == [None, "a2", None, "b2"]


# Simulated users


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_user_ends_the_conversation(history, trained):
    callback = MultiTurnCallback(history=history, user=patient, max_turns=3)
    trainer = trained(dataset=first_turns(), callbacks=[callback])
    lengths = set()
    for rows, output in trainer.seen:
        assert len(rows) == len(output["completion_ids"]) == 16
        carried = {row.parent for row in rows}
        for number, row in enumerate(rows):
            for turn, answer in enumerate(row.answers):
                wants_no_more = bool(set("aeiou") & set(answer.text))
                lengths.add(answer.turn + 1)
                if history == "independent":
                    assert answer.turn == turn
                    assert answer.is_last == (wants_no_more or turn == 2) == (turn + 1 == len(row.answers))
                elif number in carried:
                    assert not answer.is_last
                    assert not wants_no_more
                    assert answer.turn < 2
    assert lengths == {1, 2, 3}


def test_a_shared_conversation_that_ends_early_begins_again(trained):
    """The number of rows is fixed, so the rows of the turns that did not happen hold its first turn once more."""
    callback = MultiTurnCallback(user=lambda history: None, max_turns=2)
    trainer = trained(dataset=first_turns(), callbacks=[callback])
    batch = batches_of(trainer)[0]
    assert batch.turns.tolist() == [0] * 16
    assert batch.parents.tolist() == [-1] * 16
    assert batch.num_groups == 4
    prompts = [row.prompt_ids for row in trainer.seen[0][0]]
    assert prompts[:4] == prompts[4:8] != prompts[8:12]


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (lambda history: 1 / 0, r"user, row \d+ of the dataset, turn 1: raised ZeroDivisionError"),
        (lambda history: 7, r"user, row \d+ of the dataset, turn 1: returned 7: return a message of the user"),
        (lambda history: {"role": "assistant", "content": "no"}, "turn 1: returned .*return a message of the user"),
    ],
)
def test_errors_of_a_user_name_row_and_turn(behave, message, trained):
    for history, where in (
        ("shared", message),
        ("independent", r"row 0 of the batch, which begins 'say .', turn 1"),
    ):
        callback = MultiTurnCallback(history=history, user=behave, max_turns=2)
        with pytest.raises(RolloutError, match=where):
            trained(dataset=first_turns(), callbacks=[callback])


def test_a_choice_that_is_no_position_is_refused(trained):
    callback = MultiTurnCallback(carry=lambda history, answers: len(answers), turn_columns=["letter"])
    with pytest.raises(RolloutError, match=r"carry, row \d+ of the dataset, turn 1: returned 4: return a position"):
        trained(callbacks=[callback])


# Limits


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_conversation_ends_where_the_context_does(history, trained):
    """The first answer begins after 12 tokens, the second after up to 32, the third after up to 52; each takes 6."""
    trainer = trained(history=history, max_conversation_length=40, max_steps=2, **OPTIONS)
    turns = {answer.turn for rows, _ in trainer.seen for row in rows for answer in row.answers}
    assert turns == {0, 1}
    longest = max(
        len(row.prompt_ids) + sum(len(a.glue_ids + a.ids) for a in row.answers)
        for rows, _ in trainer.seen
        for row in rows
    )
    assert longest <= 40
    assert any(logs.get("multi_turn/overflowed", 0) > 0 for logs in trainer.state.log_history)
    for rows, _ in trainer.seen:
        cut = [a for row in rows for a in row.answers if a.turn == 1]
        assert cut
        assert all(answer.is_last for answer in cut)


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_prompt_that_leaves_no_room_is_not_answered(history, trained):
    dataset = Dataset.from_list([{"prompt": [user(text)], "turns": ["go on"]} for text in ("hm", "m" * 60) * 6])
    options = {"rollout": "multi_turn", "history": history, "max_conversation_length": 60, "max_steps": 2}
    trainer = trained(dataset=dataset, **options)
    shares = []
    for rows, output in trainer.seen:
        is_long = torch.tensor([len(row.prompt_ids) + trainer.max_completion_length > 60 for row in rows])
        shares.append(is_long.float().mean().item())
        for row, without_room in zip(rows, is_long.tolist(), strict=True):
            if without_room:
                assert [answer.ids for answer in row.answers] == [[trainer.processing_class.eos_token_id]]
            assert row.answers[0].is_scored != without_room
        assert (output["advantages"][is_long] == 0).all()
        assert (output["advantages"][~is_long] != 0).any()
    assert min(shares) > 0
    assert all(entry["multi_turn/overflowed"] > 0 for entry in trainer.state.log_history[:2])


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_vllm_gets_one_prompt_per_answer_and_keeps_its_log_probabilities(history, monkeypatch, make_trainer):
    trainer = make_trainer(history=history, max_steps=1, **OPTIONS)
    engine = use_vllm(trainer, monkeypatch)
    trainer.train()
    rows, output = trainer.seen[0]
    asked = []
    for row, logprobs in zip(rows, output["sampling_per_token_logps"].tolist(), strict=True):
        ids, expected = list(row.prompt_ids), []
        for answer in row.answers:
            asked.append(ids + answer.glue_ids)
            ids += answer.glue_ids + answer.ids
            expected += [0.0] * len(answer.glue_ids) + engine.logprobs[str((asked[-1], answer.ids))]
        assert logprobs[: len(expected)] == pytest.approx(expected)
    assert sorted(engine.asked) == sorted(asked)


# Combinations


def test_adaptive_group_size_gives_uncertain_conversations_more_rows(trained):
    options = {**OPTIONS, "history": "independent", "group_size": "variance", "max_steps": 5}
    trainer = trained(dataset=make_conversations(4), min_group_size=2, max_group_size=8, **options)
    sizes = [batch.group_sizes[:4].tolist() for batch in batches_of(trainer)]
    assert any(len(set(batch)) > 1 for batch in sizes[1:])
    assert all(int((batch.turns == 0).sum()) == 16 for batch in batches_of(trainer))


@pytest.mark.parametrize("options", [{}, {"rollout": "multi_turn", **OPTIONS}])
def test_a_callback_may_give_one_advantage_per_token(options, trained):
    class Decay(GRPOCallback):
        def on_advantages(self, batch, **kwargs):
            assert batch.turns.shape == batch.rewards.shape
            longest = int(batch.completion_lengths.max())
            self.given = batch.advantages[:, None] * 0.5 ** torch.arange(longest)
            return self.given

    decay = Decay()
    trainer = trained(callbacks=[decay], max_steps=1, **options)
    (batch,), slices = batches_of(trainer), trainer._buffered_inputs
    got = torch.cat([batch["advantages"] for batch in slices])
    mask = torch.cat([batch["completion_mask"] for batch in slices])
    assert got.shape == mask.shape
    expected = decay.given[:, : mask.size(1)]
    order = got[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close((got * mask)[order[0]], (expected * mask[order[0]][order[1].argsort()])[order[1]])
    table = list(trainer._logs["advantages"])
    is_token = torch.arange(expected.size(1)) < batch.completion_lengths[:, None]
    mean = (expected * is_token).sum(1) / batch.completion_lengths
    torch.testing.assert_close(torch.tensor(table), mean)


def test_advantages_of_another_shape_are_refused(make_trainer):
    class Wrong(GRPOCallback):
        def on_advantages(self, batch, **kwargs):
            return batch.advantages[:, None].expand(-1, 999)

    trainer = make_trainer(callbacks=[Wrong()], **OPTIONS)
    with pytest.raises(
        ValueError, match=r"Wrong.on_advantages returned shape \(16, 999\): return .*\(16,\) or \(16, 6\)"
    ):
        trainer.train()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [MultiTurnCallback()]}, "both generate: pass one of them"),
        ({"dynamic_sampling_rounds": 1}, "replaces groups one by one.*set dynamic_sampling_rounds=0"),
        ({"group_size": "variance"}, "history='shared' has a group for each turn: set group_size='fixed'"),
        ({"group_size": "threshold", "history": "independent"}, "use group_size='variance'"),
        (
            {"history": "independent", "multi_objective_aggregation": "normalize_then_sum"},
            "history='independent' sums rewards over turns",
        ),
        (
            {"per_device_train_batch_size": 8},
            "3 turns with num_generations=4 needs 12 rows on one process, which has 8",
        ),
        ({"rollout": "tree"}, "rollout='tree' is unknown"),
        ({"history": "none"}, "history='none' is unknown"),
        ({"carry": "worst"}, "carry='worst' is unknown"),
        ({"max_conversation_length": 6}, "max_completion_length=6 leaves no room for a prompt in a conversation of 6"),
        *[
            (
                {"dataset": make_conversations(3), "history": history},
                "has 3 rows and one generation batch holds 4 prompts",
            )
            for history in ("shared", "independent")
        ],
    ],
)
def test_what_does_not_fit_is_refused(options, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**OPTIONS, **options})


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="user is given, so a conversation may go on for ever: set max_turns"):
        MultiTurnCallback(user=patient)
    with pytest.raises(ValueError, match="max_turns=0 leaves no turn"):
        MultiTurnCallback(max_turns=0)
    with pytest.raises(ValueError, match="user='bob' cannot be called"):
        MultiTurnCallback(user="bob", max_turns=2)


@pytest.mark.parametrize("rollout", ["multi_turn", "hierarchical"])
def test_evaluation_data_are_checked_too(rollout, make_trainer):
    conversations = make_conversations()

    def build(**eval_datasets):
        data = conversations if rollout == "multi_turn" else conversations.remove_columns("turns")
        options = {**OPTIONS, "rollout": rollout, "per_device_train_batch_size": 20}
        return make_trainer(dataset=data, eval_dataset=eval_datasets, **options)

    plain = Dataset.from_dict({"prompt": ["a", "b"]})
    with pytest.raises(
        ValueError, match=r"that of row 0 of eval_dataset\['two'\] is 'a': make each prompt a list of messages"
    ):
        build(one=conversations.select([0]), two=plain)
    if rollout == "multi_turn":
        with pytest.raises(ValueError, match=r"'letter', which is not a column of eval_dataset\['one'\], only"):
            build(one=conversations.remove_columns("letter"))
    else:
        with pytest.raises(ValueError, match=r"Row 1 of eval_dataset\['one'\] has 2 turns: a plan is made for"):
            build(one=conversations)
    build(one=conversations.select([0, 3]), two=conversations.select([0]).to_iterable_dataset())


def test_rows_without_what_is_said_later_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"remove_unused_columns=True takes \['letter', 'turns'\] out of the rows"):
        make_trainer(remove_unused_columns=True, **OPTIONS)
    rows = [{"prompt": [user("a"), {"role": "assistant", "content": ""}, user("b")]}] * 12  # nothing is lost
    options = {**OPTIONS, "turn_columns": [], "dataset": Dataset.from_list(rows)}
    make_trainer(remove_unused_columns=True, **options)


def test_an_answer_that_ends_with_another_token_is_closed_too(make_trainer):
    trainer = make_trainer(history="independent", **OPTIONS)
    talk = trainer.grpo_callbacks[0].talk
    end, other = talk.template.closing[0], trainer.processing_class.pad_token_id
    talk.template.eos_token_ids = [end, other]
    (dialogue,) = talk.open([{"prompt": [user("a")], "turns": ["b"]}], ["here"])
    for ids, closed in (([9, end], False), ([9, other], True), ([9], True)):
        answer = Answer(prompt=dialogue.messages, ids=ids, text="x", logprobs=None, glue_ids=[], turn=0)
        after = talk.carry_on(dialogue, answer, [user("b")], [])
        assert (after.glue_ids[0] == end) == closed


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def test_a_template_that_knows_no_tools_is_fine(make_trainer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALTERNATING
    trainer = make_trainer(processing_class=tokenizer, history="independent", **OPTIONS)
    between = trainer.grpo_callbacks[0].talk.template.between([user("a")], [user("hi")])
    assert tokenizer.decode(between) == "<|im_end|><|im_start|>user hi<|im_end|><|im_start|>assistant "


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6"])
def test_templates_that_change_the_last_answer_are_those_of_trl_for_training(name, make_trainer):
    tokenizer = make_tokenizer()
    path = Path(chat_template_utils.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {name}")
    tokenizer.chat_template = path.read_text()
    trainer = make_trainer(processing_class=tokenizer, history="independent", **OPTIONS)
    between = trainer.grpo_callbacks[0].talk.template.between([user("a")], [user("hi")])
    said = "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(between).startswith(said)


def test_every_conversation_of_an_epoch_is_held(trained):
    trainer = trained(dataset=make_conversations(9), max_steps=6, **OPTIONS)  # 18 turns, of which a batch holds 4
    first = dict.fromkeys(index for batch in batches_of(trainer) for index in batch.prompt_index.tolist())
    assert set(first) == set(range(9))


class ReadsFeatures(GRPOCallback):
    reads_prompt_features = True


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_features_are_those_of_the_prompt_of_each_group(history, trained):
    trainer = trained(history=history, callbacks=[ReadsFeatures()], max_steps=1, **OPTIONS)
    (batch,) = batches_of(trainer)
    assert len(batch.prompt_features) == batch.num_groups
    if history == "independent":  # the turns of one conversation begin with one prompt, and other prompts differ
        same_prompt = batch.prompt_index[:, None] == batch.prompt_index
        same_features = torch.cdist(batch.prompt_features, batch.prompt_features) < 1e-4
        assert torch.equal(same_prompt, same_features)
        assert not same_prompt.all()
