"""Rewards as text: what `repr` writes is read back, what a text may not do is refused with its place and a remedy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards import Length, OverLength, Relevance, as_reward, constant, linear, maximum, parse_reward


def shout(completions, **kwargs):
    return [float(text.isupper()) for text in completions]


def lookup(name):
    if name in ("shout", "my.rewards.shout"):
        return shout
    if name == "get_quiet":
        return lambda share: lambda completions, **kwargs: [share for _ in completions]
    raise ValueError(f"no {name}")


numbers = st.floats(0.01, 100).map(lambda x: round(x, 2))
leaves = st.sampled_from(
    [Length(), Length("characters"), Relevance("reference"), OverLength(max_length=9, buffer=3), Length().cached(3)]
)


@st.composite
def joined(draw, children):
    left, weight = draw(children), draw(numbers)
    right = draw(st.one_of(children, numbers, st.just(linear(1.0, 0.5))))
    form = draw(st.sampled_from("+-*/ncwtmr"))
    made = {
        "+": lambda: left + right,
        "-": lambda: right - left,
        "*": lambda: weight * left,
        "/": lambda: left / weight,
        "n": lambda: -left,
        "c": lambda: left.clip(0, weight),
        "w": lambda: left.where(left > weight, 0.5),
        "t": lambda: left >= weight,
        "m": lambda: maximum(left, right),
        "r": lambda: left.retry(2).on_error("raise") if left.leaves() == [left] else left * constant(2.0),
    }
    try:
        return made[form]()
    except ValueError:  # two leaves of one name
        return left


@given(st.recursive(leaves, joined, max_leaves=6))
def test_what_repr_writes_is_read_back(reward):
    assert parse_reward(repr(reward)) == reward


def test_values_by_hand():
    reward = parse_reward("2 * Length('characters') - shout.named('loud') + 3 * (Length('characters') > 2)", lookup)
    rows = {"prompts": ["", ""], "completions": ["AB", "abc"]}
    assert reward(**rows) == [2 * 2 - 1, 2 * 3 + 3]
    assert [leaf.name for leaf in reward.leaves()] == ["length", "loud"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Length", Length()),
        ("  +1.0 *\n Length()\n", 1.0 * Length()),
        ("shout", as_reward(shout)),
        ("my.rewards.shout.clip(0, 1)", as_reward(shout).clip(0, 1)),
        ("as_reward('org/model')", as_reward("org/model")),
        ("linear(0, end=1) * Length()", linear(0, end=1) * Length()),
        ("maximum(shout, Length())", maximum(shout, Length())),
    ],
)
def test_forms(text, same):
    assert parse_reward(text, lookup) == same


def test_a_function_that_makes_a_reward_gets_its_arguments():
    assert parse_reward("get_quiet(share=0.25)", lookup)(prompts=[""], completions=["a"]) == [0.25]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "invalid syntax"),
        ("Length(", "was never closed|unexpected EOF"),
        ("Lenght()", "there is no reward 'Lenght': did you mean Length?"),
        ("length", "there is no reward 'length': did you mean Length?"),
        ("3.0", "3.0 is no reward"),
        ("'Length'", "'Length' is no reward"),
        ("linear", "linear: missing 2 required positional arguments"),
        ("maximum", r"maximum needs its arguments: write maximum\(...\)"),
        ("RewardModel()", "RewardModel: missing 1 required positional argument: 'model'"),
        ("RewardModel", "RewardModel: missing 1 required positional argument: 'model'"),
        ("Length(unt='characters')", "Length: got an unexpected keyword argument 'unt'"),
        ("Length() / 0", "divisor other than zero"),
        ("1 / 0 * Length()", "division by zero"),
        ("0 < Length() < 3", r"compare twice: \(a > 0.2\) \* \(a < 0.8\)"),
        ("Length() + 'a'", "'a' cannot stand here: only rewards, schedules and numbers"),
        ("Length() ** 2", r"Length\(\) \*\* 2 cannot stand here: use rewards, numbers"),
        ("9 ** 9 ** 9 * Length()", "cannot stand here"),
        ("'a' * 1000000000 * Length()", "cannot stand here: only rewards"),
        ("Length() if True else Length()", "cannot stand here"),
        ("[f for f in Length()]", "cannot stand here"),
        ("(lambda: Length())()", "cannot stand here: call a reward of this package"),
        ("Length(*[1])", "pass each argument by itself"),
        ("Length(**{'unit': 'tokens'})", "pass each argument by itself"),
        ("Length().leaves()", "cannot stand here: call a reward of this package"),
        ("Length().__class__", "cannot stand here: name a reward"),
        ("Length().map_leaves(print)", "cannot stand here"),
        ("Length.__init__", "there is no reward 'Length.__init__'"),
        ("Length.score.clip(0)", "there is no reward 'Length.score'"),
        ("__import__('os').system('true')", "there is no reward '__import__'|cannot stand here"),
        ("eval('1')", "there is no reward 'eval'"),
        ("f'{Length()}'", "cannot stand here"),
        ("(x := Length())", "cannot stand here"),
        ("Length()\0", "null bytes"),
        ("Length() + Length('characters')", "two different rewards are called 'length'"),
        ("-" * 100_000 + "1", "too deeply"),
    ],
)
def test_what_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        parse_reward(text)
    assert str(caught.value).startswith(f'reward "{text}": ')


def test_names_of_others_are_not_called():
    for text in ("shout(1)", "my.rewards.shout(1)", "os.system('true')"):
        with pytest.raises(ValueError, match="cannot stand here"):
            parse_reward(text, lookup)
    with pytest.raises(ValueError, match="no nothing"):
        parse_reward("nothing", lookup)
    with pytest.raises(ValueError, match=r"get_quiet makes a reward function .* write get_quiet\(...\)"):
        parse_reward("get_quiet", lookup)


def test_numbers_that_json_knows_only_as_words_stay_out():
    with pytest.raises(ValueError, match="there is no reward 'inf'"):
        parse_reward("Length().clip(low=inf)")
    assert parse_reward("Length().clip(low=1e999)") == Length().clip(low=math.inf)


def test_a_dotted_name_is_imported_where_one_asks_for_it():
    with pytest.raises(ValueError, match=r"there is no reward 'foo.bar': pass lookup=import_reward"):
        parse_reward("foo.bar")
    with pytest.raises(ValueError, match=r"there is no reward 'Length.of_something_else': use one of"):
        parse_reward("Length.of_something_else", lambda name: len)
