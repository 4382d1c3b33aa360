"""What a reward function gets, what it may return, and what it is told when it does not fit the call."""

import asyncio
import copy
import functools
import json
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_helpers import settle

from trl_grpo_ext.rewards import Length, Relevance, RewardError, as_reward, at_end, of_plan
from trl_grpo_ext.rewards.errors import CallError


def say(role, content):
    return {"role": role, "content": content}


def rows_of(count, **columns):
    texts = {"prompts": ["p"] * count, "completions": ["a"] * count, "completion_ids": [[1, 2] for _ in range(count)]}
    return {**texts, **columns}


# --- a copy for each call ---------------------------------------------------------------------------------------------


class Spoiler:
    """Changes whatever it can in place, after it has looked: its value is the sum of what it finds."""

    def __init__(self, fails=0):
        self.fails, self.num_calls = fails, 0

    def __call__(self, completions, board, **kwargs):
        self.num_calls += 1
        values = [float(sum(row)) for row in board]
        for row in board:
            row += [100]
            row[0] += 100
        for value in kwargs.values():  # messages, token ids and other columns
            for item in value if isinstance(value, list) else ():
                spoil(item)
        for item in completions:
            spoil(item)
        completions.clear()
        if self.num_calls <= self.fails:
            raise OSError("again")
        return values


class AsyncSpoiler(Spoiler):
    async def __call__(self, completions, board, **kwargs):
        await asyncio.sleep(0)
        return super().__call__(completions, board, **kwargs)


def spoil(item):
    if isinstance(item, dict):
        for value in item.values():
            spoil(value)
        item["content"] = "spoilt"
    elif isinstance(item, list):
        for value in item:
            spoil(value)
        item.append("spoilt")
    elif isinstance(item, np.ndarray | torch.Tensor):
        item[:] = -1


def nested_rows():
    return {
        "prompts": [[say("user", "Hi")] for _ in range(3)],
        "completions": [[say("assistant", f"Ho {row}")] for row in range(3)],
        "completion_ids": [[1, 2], [3], []],
        "board": [[1, 2], [3], [4, 5]],
        "info": [{"goals": ["x", {"y": [row]}]} for row in range(3)],
        "array": [np.arange(3) for _ in range(3)],
        "tensor": [torch.arange(3) for _ in range(3)],
    }


BOARDS = [3.0, 3.0, 9.0]
WAYS = {
    "two leaves of one tree": lambda kind: as_reward(kind(), "one") + as_reward(kind(), "two") - as_reward(kind(), "x"),
    "retries": lambda kind: as_reward(kind(fails=2)).retry(2, wait=0.0),
    "retries with a cache": lambda kind: as_reward(kind(fails=2)).retry(2, wait=0.0).cached(),
    "skipped errors": lambda kind: as_reward(kind()).on_error("skip"),
}


@pytest.mark.parametrize("kind", [Spoiler, AsyncSpoiler])
@pytest.mark.parametrize("way", WAYS)
def test_no_call_sees_what_another_one_changed(kind, way):
    rows = nested_rows()
    for _ in range(2):  # the second call too
        assert settle(WAYS[way](kind)(**rows)) == BOARDS
    assert repr(rows) == repr(nested_rows())


def test_sync_and_async_leaves_of_one_tree_have_their_own_rows():
    rows = nested_rows()
    tree = as_reward(Spoiler(), "one") + as_reward(AsyncSpoiler(), "two") + as_reward(AsyncSpoiler(), "three")
    assert settle(tree(**rows)) == [3 * value for value in BOARDS]
    assert repr(rows) == repr(nested_rows())


def test_rows_of_one_prompt_that_share_an_object_do_not_share_it_in_a_call():
    board = [1, 2]
    rows = rows_of(4, board=[board] * 4)
    for reward in (as_reward(play), as_reward(play).retry(0), as_reward(play).in_processes(1)):
        assert reward(**rows) == [3.0] * 4
    assert board == [1, 2]


def play(completions, board, **kwargs):
    values = []
    for row in board:
        row.append(1)
        values.append(float(len(row)))
    return values


def test_views_show_copies():
    history = [say("user", "Hi"), say("assistant", "Ho"), say("user", "Hi")]
    rows = {
        "prompts": [history[:1], history],
        "completions": [[say("assistant", "Ho")], [say("assistant", "Ha")]],
        "board": [[1], [2]],
        "plan": ["first", "second"],
        "turn": [1, 2],
        "last_turn": [False, True],
    }
    before = copy.deepcopy(rows)
    assert at_end(as_reward(Spoiler()) + as_reward(Spoiler(), "other"))(**rows) == [None, 4.0]
    plans = {**rows, "prompts": [[say("user", "Hi"), say("assistant", "plan"), say("user", "do")]] * 2}
    assert of_plan(as_reward(Spoiler()))(**plans) == [1.0, 2.0]
    assert rows == before


def test_what_is_not_of_the_row_is_passed_as_it_is():
    environment, state = [object()], {"step": [1]}
    seen = {}

    def spy(completions, **kwargs):
        seen.update(kwargs)
        return [1.0]

    as_reward(spy)(**rows_of(1), environments=[environment], trainer_state=state, lock=[seen])
    assert seen["environments"][0] is environment
    assert seen["trainer_state"] is state


# --- numbers ----------------------------------------------------------------------------------------------------------

HALVES = [
    0.5, Decimal("0.5"), Fraction(1, 2), np.float16(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]),
    np.array([[0.5]]), np.array([Decimal("0.5")], dtype=object), torch.tensor(0.5), torch.tensor([0.5]),
    torch.tensor([[0.5]], dtype=torch.bfloat16), torch.tensor([0.5], requires_grad=True),
]  # fmt: skip
ONES = [1, True, np.bool_(True), np.int8(1), np.array([True]), torch.tensor(True), torch.tensor([1], dtype=torch.int8)]
NO_NUMBERS = [
    "0.5", b"1", [0.5], (0.5,), {}, {0.5}, 0.5j, float, object(), np.str_("1"), np.array(["1"]), np.zeros(2),
    np.array([]), np.complex64(1), np.datetime64("2020-01-01"), np.timedelta64(3, "s"), np.timedelta64(3, "ns"),
    torch.zeros(2),
    torch.zeros(0), torch.tensor(1j), torch.empty(1, device="meta"), Decimal("NaN"), Decimal("sNaN"),
    Decimal("-Infinity"),
    np.float32("nan"), torch.tensor([float("inf")]), 10**400, Fraction(10**400), Decimal("1e400"), np.float64(1e39),
]  # fmt: skip
MODES = {
    "all rows": lambda reward: reward,
    "row by row": lambda reward: reward.retry(0).on_error("raise"),
    "in a tree": lambda reward: 1.0 * reward + 0.0,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_number_is_read(mode):
    for number, values in ((0.5, HALVES), (1.0, ONES)):
        for value in values:
            reward = MODES[mode](
                as_reward(lambda completions, value=value, **kwargs: [value] * len(completions), "any")
            )
            assert reward(**rows_of(2)) == [number] * 2, repr(value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "value", NO_NUMBERS, ids=lambda value: f"{type(value).__name__} {value!r:.15}".split(" object")[0]
)
def test_the_rest_is_refused_with_its_row(mode, value):
    reward = MODES[mode](as_reward(lambda completions, **kwargs: [value] * len(completions), "any"))
    with pytest.raises(RewardError, match=r"^reward 'any', row 0: .* is not a finite number"):
        reward(**rows_of(2))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000) | st.fractions(-1000, 1000))
def test_exact_numbers_become_the_nearest_float(value):
    assert as_reward(lambda completions, **kwargs: [value], "any")(**rows_of(1)) == [float(value)]


def returning(values):
    return as_reward(lambda completions, **kwargs: values, "any")


@pytest.mark.parametrize("of", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_a_column_of_one_number_for_each_row_is_read(of):
    assert returning((1, 0))(**rows_of(2)) == [1.0, 0.0]
    for values in ([1.0, 2.0], [[1.0], [2.0]], [[[1.0]], [[2.0]]]):
        assert returning(of(values))(**rows_of(2)) == [1.0, 2.0]
    for values in ([[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(RewardError, match="reward 'any'"):
            returning(of(values))(**rows_of(2))


# --- signatures -------------------------------------------------------------------------------------------------------


def no_kwargs(completions):
    return [1.0] * len(completions)


async def async_no_kwargs(completions):
    return [1.0] * len(completions)


def other_column(completions, solution, **kwargs):
    return [1.0] * len(completions)


def other_name(texts):
    return [1.0] * len(texts)


def by_position(completions, /, **kwargs):
    return [1.0] * len(completions)


class NoKwargs:
    def __call__(self, prompts, completions):
        return [1.0] * len(completions)


@functools.wraps(no_kwargs)
def wrapped(*args, **kwargs):
    return no_kwargs(*args, **kwargs)


REST = r"'completion_ids', 'answer'"
SIGNATURES = [
    (
        no_kwargs,
        rf"^reward 'no_kwargs' does not take 'prompts', {REST}, .*\*\*kwargs, as in \(completions, \*\*kwargs\)$",
    ),
    (async_no_kwargs, r"^reward 'async_no_kwargs' does not take 'prompts', .* \(completions, \*\*kwargs\)$"),
    (wrapped, r"^reward 'no_kwargs' does not take 'prompts', .* \(completions, \*\*kwargs\)$"),
    (NoKwargs(), rf"^reward 'NoKwargs' does not take {REST}, .* \(prompts, completions, \*\*kwargs\)$"),
    (
        functools.partial(other_column),
        r"^reward 'other_column' needs the argument 'solution', .* columns 'answer': rename",
    ),
    (other_name, r"needs the argument 'texts', .*; it does not take 'prompts', .* \(completions, \*\*kwargs\)$"),
    (by_position, r"positional-only .* by name: remove the / from \(completions, /, \*\*kwargs\)$"),
]
CHANGES = {
    "as it is": lambda reward: reward,
    "skip": lambda reward: reward.on_error("skip"),
    "retry": lambda reward: reward.retry(3, wait=30.0),
    "cached": lambda reward: reward.cached(),
    "tree": lambda reward: (2 * reward + Length("words")).on_error("skip"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("function", "message"), SIGNATURES, ids=[getattr(f, "__name__", "") for f, _ in SIGNATURES])
def test_a_wrong_signature_stops_the_run_and_is_never_skipped(function, message, change):
    with pytest.raises(RewardError, match=message) as error:
        settle(CHANGES[change](as_reward(function))(**rows_of(2, answer=["x", "y"])))
    assert isinstance(error.value.__cause__, TypeError)
    assert "on_error" not in str(error.value)


def test_a_wrong_signature_in_a_process_stops_the_run():
    for function, message in (
        (no_kwargs, "'no_kwargs' does not take 'prompts'"),
        (other_column, "needs .* 'solution'"),
    ):
        with pytest.raises(CallError, match=message):
            as_reward(function).in_processes(1).retry(3, wait=30.0)(**rows_of(2, answer=["x", "y"]))


def test_a_mistake_inside_the_function_is_not_taken_for_a_wrong_signature():
    def careless(completions, **kwargs):
        return no_kwargs(completions, 3)

    def defaults(completions, strict=False, **kwargs):
        return no_kwargs()

    for function in (careless, defaults):
        with pytest.raises(RewardError, match=r"raised TypeError: .*no_kwargs\(\).*on_error") as error:
            as_reward(function)(**rows_of(1))
        assert not isinstance(error.value, CallError)
        assert as_reward(function).on_error("skip")(**rows_of(1)) == [None]


def test_a_function_that_names_all_arguments_needs_no_kwargs():
    def all_named(prompts, completions, completion_ids, answer):
        return [1.0] * len(completions)

    assert as_reward(all_named)(**rows_of(2, answer=["x", "y"])) == [1.0, 1.0]


def test_a_column_that_is_not_there_is_never_skipped():
    with pytest.raises(
        CallError, match=r"reward 'relevance': the dataset has no column 'reference', only \['answer'\]"
    ):
        Relevance().on_error("skip")(prompts=["p"], completions=["a"], answer=["x"])
    with pytest.raises(CallError, match="of_plan needs the column 'plan'"):
        of_plan(Length("words")).on_error("skip")(**rows_of(1))


# --- texts and messages -----------------------------------------------------------------------------------------------

MESSAGES = {"prompts": [[say("user", "Hi")]], "completions": [[say("assistant", "4")]]}
TEXTS = {"prompts": ["Hi"], "completions": ["4"]}


@pytest.mark.parametrize(
    "use",
    [
        lambda completion: completion.strip(),
        lambda completion: completion[0].lower(),
        lambda completion: completion["content"],
        lambda completion: re.search("a", completion),
        lambda completion: float(completion),
        lambda completion: json.loads(completion),
        lambda completion: completion + "",
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_messages_taken_for_a_text_are_told(use, mode):
    reward = MODES[mode](as_reward(lambda completions, **kwargs: [use(text) and 1.0 for text in completions], "any"))
    with pytest.raises(
        RewardError, match=r'list of messages .*: read the text with completion\[0\]\["content"\]$'
    ) as error:
        reward(**MESSAGES)
    assert "on_error" not in str(error.value)


def stripped(completions, **kwargs):
    return [float(text.strip() == "4") for text in completions]


def contents(completions, **kwargs):
    return [float(completion[0]["content"] == "4") for completion in completions]


def test_what_a_process_raises_is_told_as_well():
    reward = as_reward(stripped).in_processes(1).on_error("raise")
    with pytest.raises(RewardError, match=r"'list' object has no attribute 'strip': .*completion\[0\]\[\"content\"\]$"):
        reward(**MESSAGES)
    assert reward(**TEXTS) == [1.0]


def test_a_text_taken_for_messages_is_told():
    with pytest.raises(
        RewardError, match=r"string indices must be integers.*: the prompts are texts, so each completion"
    ):
        as_reward(contents)(**TEXTS)
    with pytest.raises(RewardError, match=r"no attribute 'get': the prompts are texts"):
        as_reward(lambda completions, **kwargs: [text.get("content") for text in completions], "any")(**TEXTS)
    assert as_reward(contents)(**MESSAGES) == [1.0]


def test_other_errors_keep_their_remedy():
    """What fails for another reason says nothing about messages."""

    def own_list(completions, **kwargs):
        return [kwargs["prompts"].of_mine]

    def own_text(completions, **kwargs):
        return ["x".of_mine]

    for rows, function in ((MESSAGES, own_list), (TEXTS, own_text)):
        with pytest.raises(RewardError, match=r"of_mine': mend the cause, or leave such rows out"):
            as_reward(function)(**rows)
