"""The word that was meant."""

import string

from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.host.nearest import nearest

words = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)


@given(words, st.lists(words))
def test_a_known_word_is_nearest_to_itself(word, others):
    assert nearest(word, [*others, word]) == word
    assert nearest(word.upper().replace("_", "-"), [*others, word]) == word


@given(words, st.lists(words))
def test_only_known_words_are_named(word, known):
    assert nearest(word, known) in (None, *known)


def test_what_looks_like_nothing_is_nothing():
    assert nearest("colour", ["learning_rate", "max_steps"]) is None
    assert nearest("helpfull", ["helpful", "harmless"], cutoff=0.75) == "helpful"
    assert nearest("harmful", ["helpful", "harmless"], cutoff=0.75) is None
