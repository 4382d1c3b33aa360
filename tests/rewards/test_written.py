"""Rewards from text: what a YAML file says is what Python says, and nothing else is run."""

import pytest
from kit import count_vowels

from trl_grpo_ext.rewards import Length, Relevance, as_reward, linear, maximum
from trl_grpo_ext.rewards.written import reward_of_text


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Length", Length()),
        ("Length()", Length()),
        ("Length('characters')", Length("characters")),
        ("Length(unit='words').named('size')", Length("words").named("size")),
        ("Relevance('reference') - 0.01 * Length()", Relevance("reference") - 0.01 * Length()),
        ("-(Length() / 2)", -(Length() / 2)),
        ("(Length() <= 40).clip(0, 1)", (Length() <= 40).clip(0, 1)),
        ("maximum(Length(), 3)", maximum(Length(), 3)),
        ("linear(0, 1) * Length()", linear(0, 1) * Length()),
        ("kit.count_vowels", as_reward(count_vowels)),
        ("0.5 * kit.count_vowels + Length()", 0.5 * as_reward(count_vowels) + Length()),
        ("kit.count_vowels.named('vowels')", as_reward(count_vowels).named("vowels")),
    ],
)
def test_text_stands_for_what_python_makes_of_it(text, reward):
    assert repr(reward_of_text(text)) == repr(reward)
    assert reward_of_text(text).__name__ == reward.__name__


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Lenght()", "there is no reward 'Lenght': did you mean 'Length'"),
        ("nothing", "there is no reward 'nothing': name a function by its dotted path"),
        ("Length(", "is no expression"),
        ("no.such.module", "No module named 'no'"),
        ("kit.no_such", "has no attribute 'no_such'"),
        ("3", "3 is no reward"),
        ("Length('miles')", "miles"),
        ("[x for x in 'ab']", "has no place in a reward"),
        ("(lambda: 1)()", "has no place in a reward"),
        ("__import__('os')", "there is no reward '__import__'"),
        ("os.system('true')", "there is no reward 'os'"),
        ("kit.count_vowels.run()", "has no attribute 'run'"),
        ("Length()._join(3)", "is no reward of this package"),
        ("Length() ** 2", "has no place in a reward"),
    ],
)
def test_what_is_no_reward_is_refused(text, problem):
    with pytest.raises(ValueError, match=r"(?s)" + problem.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        reward_of_text(text)
