"""Prompts for the recipes, in one form."""

import json

import pytest

from trl_grpo_ext.datasets import load_prompts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_shipped_set_is_balanced_and_disjoint():
    prompts = load_prompts("helpful")
    questions = {name: [p[-1]["content"].lower() for p in prompts[name]["prompt"]] for name in prompts}
    assert not set(questions["train"]) & set(questions["test"])
    for name, share in (("train", 64), ("test", 16)):
        levels = list(prompts[name]["difficulty"])
        assert {level: levels.count(level) for level in set(levels)} == dict.fromkeys(["easy", "medium", "hard"], share)
        assert all(prompts[name]["reference"])


def test_a_local_file_with_splits(tmp_path):
    rows = [{"prompt": f"q{i}", "split": "test" if i == 3 else "train"} for i in range(6)]
    prompts = load_prompts(write(tmp_path / "a.jsonl", rows))
    assert [p[0] for p in prompts["test"]["prompt"]] == [{"role": "user", "content": "q3"}]
    assert len(prompts["train"]) == 5


def test_without_a_test_split_every_tenth_prompt_is_held_out(tmp_path):
    prompts = load_prompts(write(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(20)]))
    assert [p[0]["content"] for p in prompts["test"]["prompt"]] == ["q0", "q10"]
    assert len(prompts["train"]) == 18


def test_csv_and_messages_are_taken_too(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,reference\nwhy,because\nhow,so\n")
    assert load_prompts(str(tmp_path / "a.csv"))["train"]["reference"][0] == "so"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why"}]
    prompts = load_prompts(write(tmp_path / "b.jsonl", [{"prompt": messages}] * 2))
    assert prompts["train"]["prompt"][0] == messages


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "why"}], "no column 'prompt', only \\['question'\\]"),
        ([{"prompt": "why"}, {"prompt": ""}], "Row 0 of .* has no prompt: remove it"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    path = tmp_path / "a.jsonl"
    # The bad row is the first of the training split.
    rows = [{"split": "train", **row} for row in reversed(rows)]
    with pytest.raises(ValueError, match=message):
        load_prompts(write(path, rows))


def test_paths_endings_and_splits_are_checked(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        load_prompts(str(tmp_path / "missing.jsonl"))
    (tmp_path / "a.txt").write_text("why")
    with pytest.raises(ValueError, match=r"ends in '.txt': use one of .jsonl"):
        load_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="no split 'validation', only"):
        load_prompts("helpful", train_split="validation")
