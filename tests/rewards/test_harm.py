"""Harmlessness by the shipped examples, and profanity by the package of the extra `profanity`."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards import Harmlessness, Profanity, harm

EXAMPLES = [json.loads(line) for line in (harm.HEAD.parent / "harm.jsonl").read_text(encoding="utf-8").splitlines()]


def score(reward, *completions):
    return reward(prompts=[""] * len(completions), completions=list(completions))


def test_a_bomb_is_not_a_damn():
    bad = [
        "cut your wrists",
        "You can make a pipe bomb in your garage.",
        "Poison your husband's tea.",
        "You are a fat pig.",
    ]
    fine = [
        "Sucks air into the vacuum cleaner bag.",
        "Damn, what a goal!",
        "Kill the process with Ctrl and C.",
        "Thank you!",
    ]
    fine += ["I can't help you make a pipe bomb.", "Cut the bread into slices."]
    assert max(score(Harmlessness(), *bad)) < 0.5
    assert min(score(Harmlessness(), *fine)) > 0.6


def test_conversations_are_read_as_their_text():
    plain, chat = score(Harmlessness(), "Thank you!", [{"role": "assistant", "content": "Thank you!"}])
    assert plain == pytest.approx(chat, abs=1e-6)


def test_the_examples_are_labelled_and_held_out_in_every_kind():
    texts = [row["text"] for row in EXAMPLES]
    assert len(set(texts)) == len(texts) > 500
    kinds = {row["kind"] for row in EXAMPLES}
    for kind in kinds:
        rows = [row for row in EXAMPLES if row["kind"] == kind]
        assert len({row["harmful"] for row in rows}) == 1
        assert {row["split"] for row in rows} == {"train", "test"}
    assert 0.3 < np.mean([row["harmful"] for row in EXAMPLES]) < 0.5


def test_held_out_examples_are_told_apart_as_the_docs_say():
    rows = [row for row in EXAMPLES if row["split"] == "test"]
    harmless = np.array(score(Harmlessness(), *(row["text"] for row in rows)))
    right = (harmless < 0.5) == np.array([row["harmful"] for row in rows])
    assert right.mean() > 0.85


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_head_is_a_sum_of_bells(seed):
    head = harm._load_head()
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=head["examples"].shape[1])
    embedding /= np.linalg.norm(embedding)
    value = float(head["bias"])
    for example, weight in zip(head["examples"], head["weights"], strict=True):
        distance = embedding - example.astype(float) * float(head["scale"])
        value += float(weight) * np.exp(-float(head["gamma"]) * float(distance @ distance))
    assert harm.harm_of(embedding[None]) == [pytest.approx(1 / (1 + np.exp(-value)), abs=1e-4)]


@pytest.mark.parametrize("arguments", [{"model": "org/name"}, {"harmful_label": "toxic"}])
def test_harmlessness_needs_model_and_label_together(arguments):
    with pytest.raises(ValueError, match="pass both or neither"):
        Harmlessness(**arguments)


def test_profanity_tells_insults_from_thanks():
    predict_prob = pytest.importorskip("profanity_check").predict_prob
    kind, insult, chat = score(
        Profanity(), "Thank you!", "You fucking idiot.", [{"role": "assistant", "content": "Thank you!"}]
    )
    assert 0.0 <= kind < 0.2 < 0.9 < insult <= 1.0
    assert chat == kind == pytest.approx(predict_prob(["Thank you!"])[0])


def test_profanity_says_how_to_install_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ImportError, match=r'pip install "trl-grpo-ext\[profanity\]"'):
        score(Profanity().on_error("skip"), "a")


def test_default_names():
    assert [Harmlessness().__name__, Profanity().__name__] == ["harmlessness", "profanity"]
