"""One's own data: what a file, a name or a row may look like, and what is said about those that do not fit."""

import csv
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.recipe.datasets import load_prompts
from trl_grpo_ext.recipe.layouts import LAYOUTS, from_messages, from_sharegpt
from trl_grpo_ext.recipe.normal import as_text, is_blank, without_control
from trl_grpo_ext.recipe.reading import Place, line_numbers
from trl_grpo_ext.recipe.script import DataArguments
from trl_grpo_ext.rewards import as_reward


def write(path, rows, between="\n"):
    path.write_text(between.join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Columns


QUESTIONS = [{"question": f"q{i}", "answer": f"a{i}", "reference": "no"} for i in range(11)]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_go_by_other_names_and_the_system_speaks_first(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    names = {"prompt_column": "question", "reference_column": "answer", "columns": ["reference"]}
    prompts = load_prompts(path, **names, system_prompt="Be brief.", max_test=2, streaming=streaming)
    rows = [*prompts["test"], *prompts["train"]]
    assert len(rows) == 11
    for row in rows:
        system, asked = row["prompt"]
        assert system == {"role": "system", "content": "Be brief."}
        assert row["reference"] == asked["content"].replace("q", "a")
        assert row["answer"] == row["reference"]  # a reward that reads it by its own name still can


def test_a_system_prompt_takes_the_place_of_those_of_the_rows(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "Ramble."}, user(f"q{i}")]} for i in range(2)]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_prompts(path, system_prompt="Be brief.")["train"][0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        user("q1"),
    ]
    assert load_prompts(path)["train"][0]["prompt"] == rows[1]["prompt"]
    with pytest.raises(ValueError, match="system_prompt=' ' says nothing: leave it out"):
        load_prompts(path, system_prompt=" ")


def test_the_arguments_of_a_recipe_reach_the_rows(tmp_path):
    path, names = write(tmp_path / "a.jsonl", QUESTIONS), {"prompt_column": "question", "reference_column": "answer"}
    arguments = DataArguments(dataset_name=path, system_prompt="Be brief.", **names)
    row = arguments.load(columns=("reference",))["train"][0]
    assert ([message["content"] for message in row["prompt"]], row["reference"]) == (["Be brief.", "q1"], "a1")


def test_what_helps_is_said_where_a_column_is_missing(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match=r"no column 'prompt', only .*: pass layout='gsm8k'"):
        load_prompts(path)
    with pytest.raises(ValueError, match=r"no column 'query', only .*'question'"):
        load_prompts(path, prompt_column="query")
    with pytest.raises(ValueError, match="prompt_column='question' and layout='gsm8k' both make the prompt"):
        load_prompts(path, prompt_column="question", layout="gsm8k")
    path = write(tmp_path / "b.jsonl", [{"text": "q"}] * 2)
    with pytest.raises(ValueError, match=r"no column 'prompt', only .*: name the one .* as prompt_column"):
        load_prompts(path)
    (tmp_path / "c.csv").write_text("prompt;reference\nq;a\n")
    with pytest.raises(ValueError, match=r"no column 'prompt', only .*: separate the columns by commas"):
        load_prompts(str(tmp_path / "c.csv"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_names_a_layout_that_fits(tmp_path, layout):
    columns = LAYOUTS[layout].columns
    path = write(tmp_path / "a.jsonl", [dict.fromkeys(columns, "x")] * 2)
    with pytest.raises(ValueError, match=rf"pass layout='{layout}' \(--dataset_layout {layout}\)"):
        load_prompts(path)
    assert layout in DataArguments.__dataclass_fields__["dataset_layout"].metadata["help"]


# Conversations

TALK = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(messages):
    return [{"from": SPEAKERS[message["role"]], "value": message["content"]} for message in messages]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["messages", "sharegpt"])
def test_the_last_answer_of_a_conversation_is_the_reference(tmp_path, layout, streaming):
    column = LAYOUTS[layout].columns[0]
    talks = [[*TALK[:3], user(f"Bye {i}"), assistant(f"See you {i}.")] for i in range(3)]
    rows = [{column: sharegpt(talk) if layout == "sharegpt" else talk, "source": i} for i, talk in enumerate(talks)]
    path = write(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(path, layout=layout, columns=["reference"], max_test=1, streaming=streaming)
    assert list(prompts["train"]) == [
        {"source": i, "prompt": talks[i][:-1], "reference": f"See you {i}."} for i in (1, 2)
    ]


def test_a_conversation_in_which_the_user_has_the_last_word_has_no_reference(tmp_path):
    assert from_messages({"messages": TALK[:4]}) == {"prompt": TALK[:4], "reference": None}
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[:4]}, {"messages": TALK[:2]}])
    with pytest.raises(ValueError, match=r"Line 2 of .* has no reference, which the reward reads"):
        load_prompts(path, layout="messages", columns=["reference"])
    assert len(load_prompts(path, layout="messages")["train"]) == 1  # the first two have one prompt


def test_a_reference_column_goes_before_the_last_answer(tmp_path):
    rows = [{"messages": [user(f"q{i}"), assistant("no")], "gold": f"a{i}"} for i in range(2)]
    path = write(tmp_path / "a.jsonl", rows)
    train = load_prompts(path, layout="messages", reference_column="gold")["train"]
    assert (train[0]["prompt"], train[0]["reference"]) == ([user("q1")], "a1")


@pytest.mark.parametrize(
    ("convert", "row", "problem"),
    [
        (from_messages, {"messages": None}, "messages=None is no list of messages"),
        (from_messages, {"messages": []}, "is no list of messages"),
        (from_messages, {"messages": [{"role": "user"}]}, "each of which says something"),
        (from_messages, {"messages": [assistant("Hi")]}, "holds nothing but an answer"),
        (from_sharegpt, {"conversations": "Hi"}, "conversations='Hi' is no list of messages"),
        (from_sharegpt, {"conversations": [{"from": "observation", "value": "x"}]}, "from 'observation': only 'human'"),
    ],
)
def test_conversations_of_another_form_are_refused(convert, row, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        convert(row)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_both_forms_of_a_conversation_are_read_alike(asked, answered):
    talk = [message for pair in zip(map(user, asked), map(assistant, answered), strict=False) for message in pair]
    assert from_messages({"messages": talk}) == from_sharegpt({"conversations": sharegpt(talk)})
    assert from_messages({"messages": talk}) == {"prompt": talk[:-1], "reference": talk[-1]["content"]}


# Names


def test_a_shipped_name_misspelt_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, meant in {"helpfull": "helpful", "Harmless": "harmless", "multi-turn": "multi_turn"}.items():
        with pytest.raises(ValueError, match=rf"looked for {tmp_path}/{name}\): did you mean '{meant}'\?"):
            load_prompts(name)


@pytest.mark.parametrize("name", ["./nodir", "../no/dir", "/no/dir", "~/no/dir", "a/b/c", "data.jsonl", "data/x.csv"])
def test_paths_are_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.setattr("trl_grpo_ext.recipe.reading.load_dataset", lambda *args, **kwargs: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"There is no file or folder '{name}' \(looked for /.*\): check the path, or use a shipped"
    ):
        load_prompts(name)


def test_what_the_hub_does_not_have_is_told_with_the_shipped_sets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nmore")

    monkeypatch.setattr("trl_grpo_ext.recipe.reading.load_dataset", offline)
    for name in ("my/questions", "questions"):
        with pytest.raises(ValueError, match=r"none of the shipped sets 'harmless', 'helpful', .*: Couldn't reach it$"):
            load_prompts(name)


def test_a_folder_wins_over_a_shipped_set_as_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helpful").mkdir()
    with pytest.raises(ValueError, match=rf"The folder './helpful' \({tmp_path}/helpful\) cannot be read"):
        load_prompts("./helpful")
    write(tmp_path / "helpful" / "train.jsonl", [{"prompt": f"q{i}"} for i in range(3)])
    assert len(load_prompts("./helpful")["train"]) == 2
    assert len(load_prompts("helpful")["train"]) == 192
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_prompts("~/helpful/train.jsonl")["train"]) == 2


# Row numbers


@given(st.data())
def test_lines_are_those_of_the_file(data):
    texts = data.draw(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=8))
    blanks = data.draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts)))
    with tempfile.TemporaryDirectory() as folder:
        jsonl, expected = "", []
        for text, blank in zip(texts, blanks, strict=True):
            jsonl += "\n" * blank
            expected.append(jsonl.count("\n") + 1)
            jsonl += json.dumps({"prompt": text}) + "\n"
        Path(folder, "a.jsonl").write_text(jsonl, encoding="utf-8")
        assert list(line_numbers(f"{folder}/a.jsonl")) == expected

        out, expected = io.StringIO(newline=""), []
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(["prompt", "n"])
        for number, (text, blank) in enumerate(zip(texts, blanks, strict=True)):
            out.write("\n" * blank)
            expected.append(len(re.findall("\r\n|\r|\n", out.getvalue())) + 1)
            writer.writerow([text, number])
        Path(folder, "a.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
        assert list(line_numbers(f"{folder}/a.csv")) == expected


def in_file(folder, rows, ending):
    path = folder / f"a{ending}"
    if ending == ".jsonl":
        return write(path, rows, between="\n\n")
    if ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("ending", "named"),
    [
        (".jsonl", "Line {jsonl}"),
        (".csv", "Line {csv}"),
        (".json", r"Row {row} \(from 0\)"),
        (".parquet", r"Row {row} \(from 0\)"),
    ],
)
@pytest.mark.parametrize("bad", [0, 7, 10, 23])
def test_the_row_of_the_file_is_named_whatever_was_held_out(tmp_path, ending, named, bad, streaming):
    for columns in ({}, {"split": "train"}):  # with splits in between too
        rows = [{"prompt": f"q{i}", "n": i, **columns} for i in range(24)]
        if columns:
            rows[3]["split"] = rows[5]["split"] = "test"
        rows[bad]["prompt"] = "  "
        path = in_file(tmp_path, rows, ending)
        expected = named.format(jsonl=2 * bad + 1, csv=bad + 2, row=bad)
        with pytest.raises(Exception, match=rf"{expected} of '{re.escape(path)}' has no prompt"):
            list(load_prompts(path, max_test=2, streaming=streaming)["train"])


@pytest.mark.parametrize(("split", "bad"), [("train", 2), ("test", 1)])
def test_rows_of_other_places_are_counted_in_their_split(tmp_path, split, bad):
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {i}"} for i in range(3)]
        if name == split:
            rows[bad] = {"prompt": "\n"}
        write(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(ValueError, match=rf"Row {bad} \(from 0\) of '{split}' of '{tmp_path}' has no prompt"):
        load_prompts(str(tmp_path))


def test_a_file_that_csv_reads_more_strictly_is_counted_in_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt\n{'x' * (csv.field_size_limit() + 1)}\nb\n")
    assert Place("a.csv", file=str(path)).of_row(1) == "Row 1 (from 0) of 'a.csv'"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"Line 2 of .* is no JSON: Expecting value"),
        ('{"prompt": "a"}\n"b"\n', r"Line 2 of .* is 'b': write an object"),
        ('\n{"prompt": "\\ud800"}\n', r"Line 2 of .* holds half of a pair of surrogates"),
        ("", r"holds no rows: write at least one prompt"),
        ("[]", r"holds no rows: write at least one prompt"),
        ('[{"prompt": "a"}, 3]', r"Row 1 \(from 0\) of .* is 3: write an object"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path, text, problem):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_prompts(str(tmp_path / "a.jsonl"))


# Texts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": None}, "has no prompt: remove it"),
        ({"prompt": ""}, "has no prompt"),
        ({"prompt": " \t\n"}, "has no prompt"),
        ({"prompt": "\u200b\u00a0"}, "has no prompt"),
        ({"prompt": "\u202e\x00"}, "has no prompt"),
        ({"prompt": []}, "has no prompt"),
        ({"prompt": [user("  ")]}, "in which the user says nothing"),
        ({"prompt": [user("Hi"), assistant("Hello"), user(None)]}, "in which the user says nothing"),
        ({"prompt": [{"role": None, "content": "Hi"}]}, "write text or a list of messages"),
        ({"prompt": "Hi", "turns": ["Why?", " "]}, "in one of which the user says nothing"),
        ({"prompt": 3}, "has the prompt 3: write text"),
    ],
)
def test_blank_prompts_are_refused(tmp_path, row, problem, streaming):
    path = write(tmp_path / "a.jsonl", [row, row])
    with pytest.raises(Exception, match=rf"Line 1 of .* {problem}"):
        list(load_prompts(path, max_test=1, streaming=streaming)["train"])


@given(st.text())
def test_what_is_removed_cannot_be_seen(text):
    cleaned = without_control(text)
    assert without_control(cleaned) == cleaned
    assert [c for c in cleaned if c.isprintable()] == [c for c in text if c.isprintable()]
    assert without_control({"a": [text, 3, None]}) == {"a": [cleaned, 3, None]}
    assert is_blank(text) == is_blank(cleaned)


def test_what_is_removed_and_what_stays():
    kept = "tab\tline\r\nHaus \u0645\u0631\u062d\u0628\u0627 \u0915\u094d\u200d\u0937 \U0001f468\u200d\U0001f469"
    assert without_control(kept) == kept
    assert without_control("a\x00b\x1b[31m\x7f\x85\u202edc\u2066\u200f\u061c\ufeff") == "ab[31mdc"


@pytest.mark.parametrize("streaming", [False, True])
def test_control_characters_go_with_a_word(tmp_path, caplog, streaming):
    rows = [{"prompt": [user(f"q{i}")], "reference": "a", "turns": ["so"]} for i in range(4)]
    rows[2] = {"prompt": [user("q\u202e2\x00")], "reference": "a\x07", "turns": ["s\u2066o"]}
    path = write(tmp_path / "a.jsonl", rows)
    train = list(load_prompts(path, max_test=1, streaming=streaming)["train"])
    assert train[1] == {"prompt": [user("q2")], "reference": "a", "turns": ["so"]}
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"removed control characters and marks of direction from the texts.* first .*Line 3 of", said)


def equals(completions, reference, **kwargs):
    return [float(completion == gold) for completion, gold in zip(completions, reference, strict=True)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", [str, int])
def test_a_reference_is_text_whatever_the_file(tmp_path, ending, kind, streaming):
    path = in_file(tmp_path, [{"prompt": f"q{i}", "reference": kind(i)} for i in range(4)], ending)
    train = list(load_prompts(path, columns=["reference"], max_test=1, streaming=streaming)["train"])
    assert [row["reference"] for row in train] == ["1", "2", "3"]
    assert as_reward(equals)(prompts=[""] * 3, completions=["1", "2", "x"], reference=["1", "2", "3"]) == [1, 1, 0]


def test_numbers_become_text_with_a_word_and_texts_stay_what_they_are(tmp_path, caplog):
    rows = [{"prompt": "a", "reference": 3}, {"prompt": "b", "reference": 4}]
    load_prompts(write(tmp_path / "a.jsonl", rows))
    assert "read the numbers in the column 'reference' as text" in caplog.text
    mixed = [3, "4", 0.5, True, "2024-01-02", "007", "NA"]
    rows = [{"prompt": f"q{i}", "reference": value} for i, value in enumerate(["x", *mixed])]
    train = load_prompts(write(tmp_path / "b.jsonl", rows))["train"]
    assert list(train["reference"]) == ["3", "4", "0.5", "True", "2024-01-02", "007", "NA"]
    (tmp_path / "c.csv").write_text("prompt,reference,n\nq,x,1\n1,007,2\nNA,None,3\n2024-01-02,1.50,4\n")
    train = load_prompts(str(tmp_path / "c.csv"))["train"]
    assert [row["prompt"][0]["content"] for row in train] == ["1", "NA", "2024-01-02"]
    assert list(train["reference"]) == ["007", "None", "1.50"]
    assert list(train["n"]) == [2, 3, 4]


def test_other_columns_with_numbers_of_a_csv_are_told(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("prompt,answer\nq,1\nr,2\n")
    path = str(tmp_path / "a.csv")
    load_prompts(path, columns=["answer"])
    assert re.search("column 'answer' holds numbers such as 2, and not text", caplog.text)
    assert list(load_prompts(path, reference_column="answer")["train"]["reference"]) == ["2"]


def test_a_missing_reference_is_refused_where_it_is_needed(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,reference\nq,1\nr,\n")
    with pytest.raises(ValueError, match=r"Line 3 of .* has no reference"):
        load_prompts(str(tmp_path / "a.csv"), columns=["reference"])
    assert list(load_prompts(str(tmp_path / "a.csv"))["train"]["reference"]) == [None]


@given(st.lists(st.one_of(st.integers(), st.booleans(), st.text(), st.none()), max_size=4))
def test_as_text_changes_numbers_alone(values):
    found = as_text(values)
    assert as_text(found) == found
    for value, text in zip(values, found, strict=True):
        assert text == (value if value is None or isinstance(value, str) else str(value))


def test_a_mark_of_byte_order_is_no_part_of_a_column(tmp_path):
    for ending, text in {".jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n', ".csv": "prompt\na\nb\n"}.items():
        (tmp_path / f"a{ending}").write_text(text, encoding="utf-8-sig")
        assert len(load_prompts(str(tmp_path / f"a{ending}"))["train"]) == 1


def test_a_blank_reference_is_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "reference": "x"}, {"prompt": "b", "reference": " "}])
    with pytest.raises(ValueError, match=r"Line 2 of .* has no reference, which the reward reads"):
        load_prompts(path, columns=["reference"])


def test_a_split_that_is_not_used_is_told(tmp_path, caplog):
    rows = [{"prompt": f"q{i}", "split": "train" if i < 20 else "valid"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    for options in ({}, {"streaming": True, "max_test": 5}):
        load_prompts(path, **options)
        assert "has no split 'test', and ['valid'] are not used: name one as test_split" in caplog.text
        caplog.clear()
    assert len(load_prompts(path, test_split="valid")["test"]) == 10
    assert "not used" not in caplog.text


def test_a_misspelt_column_is_named_and_a_number_is_no_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match=r"has no column 'qestion', only \['question'\]: did you mean 'question'\?"):
        load_prompts(path, prompt_column="qestion")
    path = write(tmp_path / "b.jsonl", [{"prompt": 7}, {"prompt": 0}])
    with pytest.raises(ValueError, match=r"has the prompt 7: write text or a list of messages"):
        load_prompts(path)
    path = write(tmp_path / "c.jsonl", [{"prompt": 0}])
    with pytest.raises(ValueError, match=r"has the prompt 0: write text or a list of messages"):
        load_prompts(path)
