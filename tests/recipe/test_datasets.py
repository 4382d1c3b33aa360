"""Prompts for the recipes, in one form."""

import gzip
import json

import pytest
from datasets import Dataset, IterableDataset
from kit import count_vowels

from trl_grpo_ext.recipe.datasets import SHIPPED, load_prompts
from trl_grpo_ext.recipe.layouts import from_gsm8k, from_hh_rlhf


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


def test_paths_endings_and_splits_are_checked(tmp_path):
    (tmp_path / "a.txt").write_text("why")
    with pytest.raises(ValueError, match=r"ends in '.txt': use one of .jsonl"):
        load_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="no split 'validation', only"):
        load_prompts("helpful", train_split="validation")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_well_formed(name):
    rows = [json.loads(line) for line in SHIPPED[name].read_text(encoding="utf-8").splitlines()]
    assert len({json.dumps([row["prompt"].lower(), row.get("turns")]) for row in rows}) == len(rows)
    assert {row["split"] for row in rows} == {"train", "test"}
    assert all(row.keys() == rows[0].keys() and all(value not in ("", []) for value in row.values()) for row in rows)
    readme = (SHIPPED[name].parent / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"# {name}.jsonl")[1].split("\n# ")[0]
    assert all(f"| `{column}` |" in section for column in rows[0])
    assert f"| {len(rows)} |" in section


def test_the_harmless_set_is_half_harmful_in_both_splits():
    prompts = load_prompts("harmless", columns=["reference", "harmful"])
    assert [len(prompts[split]) for split in ("train", "test")] == [192, 64]
    assert [sum(prompts[split]["harmful"]) for split in ("train", "test")] == [96, 32]


# Repetitions


def test_repeated_and_leaked_prompts_are_dropped_and_counted(tmp_path, caplog):
    rows = [{"prompt": text, "n": n, "split": "train"} for n, text in enumerate(["a", "b", "a", "c", "b", "d"])]
    rows += [{"prompt": text, "n": n, "split": "test"} for n, text in enumerate(["d", "e", "e"])]
    path = write(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(path)
    assert [row["n"] for row in prompts["train"]] == [0, 1, 3]
    assert [p[0]["content"] for p in prompts["test"]["prompt"]] == ["d", "e"]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "dropped 1 of 3 rows, whose prompts occur before or are held out",
        "dropped 3 of 6 rows, whose prompts occur before or are held out",
    ]


def test_conversations_with_one_opening_and_other_turns_are_kept(tmp_path):
    rows = [{"prompt": "Hi", "turns": [f"turn {n % 3}"], "split": "test" if n == 5 else "train"} for n in range(6)]
    prompts = load_prompts(write(tmp_path / "a.jsonl", rows))
    assert list(prompts["train"]["turns"]) == [["turn 0"], ["turn 1"]]


def test_without_a_test_split_prompts_at_even_distances_are_held_out_each_time_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(100)])
    for options, expected in (({}, range(0, 100, 10)), ({"max_test": 5}, range(0, 100, 20))):
        once, again = load_prompts(path, **options), load_prompts(path, **options)
        assert once["train"].to_list() == again["train"].to_list()
        assert [p[0]["content"] for p in once["test"]["prompt"]] == [f"q{i}" for i in expected]
        assert len(once["train"]) == 90
    with pytest.raises(ValueError, match="max_test=0 holds nothing out: pass at least 1"):
        load_prompts(path, max_test=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": ["reference"]},
            r"no column 'reference', only \['prompt', 'answer'\]: name the one .* as reference_column",
        ),
        ({"columns": ["harmful"]}, r"no column 'harmful', only \['prompt', 'answer'\]: rename the one that holds"),
        ({"layout": "squad"}, "layout='squad' is unknown: use one of 'messages', 'sharegpt', 'gsm8k'"),
        ({"layout": "gsm8k"}, "no column 'question', only"),
    ],
)
def test_a_missing_column_is_named(tmp_path, options, message, streaming):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(3)])
    with pytest.raises(ValueError, match=message):
        load_prompts(path, streaming=streaming, max_test=1, **options)


# Layouts of the hub, on folders laid out as there (the hub itself is not asked)

ANSWER = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.fixture
def gsm8k(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"question": f"{split} question {i}?", "answer": ANSWER} for i in range(count)]
        (tmp_path / "main").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"main/{split}-*"} for split in ("train", "test")]
    listed = json.dumps([{"config_name": "main", "data_files": files}])
    (tmp_path / "README.md").write_text(f"---\nconfigs: {listed}\n---\n")
    return str(tmp_path)


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def hh_rlhf(tmp_path):
    for folder in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            asked = f"\n\nHuman: {folder} {split}\n\nAssistant: Yes?\n\nHuman: more\n\nAssistant:"
            rows = [{"chosen": f"{asked} good", "rejected": f"{asked} bad"}] * 2
            write_gz(tmp_path / folder / f"{split}.jsonl.gz", rows)
    return str(tmp_path)


def test_gsm8k(gsm8k):
    prompts = load_prompts(gsm8k, layout="gsm8k", columns=["reference", "difficulty"])
    assert [len(prompts[split]) for split in ("train", "test")] == [4, 2]
    assert prompts["train"][0] == {
        "prompt": [{"role": "user", "content": "train question 0?"}],
        "reference": "72",
        "difficulty": 2,
    }
    with pytest.raises(ValueError, match="has no '####' before the number"):
        from_gsm8k({"question": "q", "answer": "72"})


def test_hh_rlhf(hh_rlhf):
    prompts = load_prompts(hh_rlhf, layout="hh-rlhf", columns=["reference", "harmful"])
    train = prompts["train"].to_list()
    assert [row["harmful"] for row in train] == [True, False]  # each of the two folders, without repetitions
    assert [message["content"] for message in train[0]["prompt"]] == ["harmless-base train", "Yes?", "more"]
    assert train[0]["reference"] == "good"
    for broken in ("", "\n\nHuman: only a question", "no marks"):
        with pytest.raises(ValueError, match="is no conversation of 'Human:' and 'Assistant:'"):
            from_hh_rlhf({"chosen": broken, "rejected": ""})


def test_a_row_that_does_not_fit_its_layout_is_named(tmp_path):
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": ""}, {"chosen": "what", "rejected": ""}]
    for folder in ("harmless-base", "helpful-base"):
        write_gz(tmp_path / folder / "train.jsonl.gz", rows)
        write_gz(tmp_path / folder / "test.jsonl.gz", rows[:1])
    with pytest.raises(
        ValueError, match=r"Row 1 \(from 0\) of 'harmless-base, train' of .*: chosen='what' is no conversation"
    ):
        load_prompts(str(tmp_path), layout="hh-rlhf")


def test_messages_that_were_written_as_text_are_refused(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}] * 2
    for text in (json.dumps(rows[0]["prompt"]), repr(rows[0]["prompt"])):
        path = write(tmp_path / "a.jsonl", [{"prompt": "fine"}, {"prompt": text}])
        with pytest.raises(Exception, match=r"Line 2 of .* has a list of messages written as text, .*JSONL and"):
            load_prompts(path)
    path = write(tmp_path / "b.jsonl", [{"prompt": ["a", "b"]}] * 2)
    with pytest.raises(Exception, match=r"has the prompt \['a', 'b'\]: write text or a list of messages"):
        load_prompts(path)
    path = write(tmp_path / "c.jsonl", [{"prompt": f"[{i}] is a list"} for i in range(2)])
    assert len(load_prompts(path)["train"]) == 1


# Streaming


def test_a_stream_has_the_rows_of_the_set(tmp_path, hh_rlhf, gsm8k):
    rows = [{"prompt": f"q{i % 7}", "reference": str(i), "split": "test" if i == 3 else "train"} for i in range(12)]
    path = write(tmp_path / "a.jsonl", rows)
    for name, layout in ((path, None), (hh_rlhf, "hh-rlhf"), (gsm8k, "gsm8k")):
        whole = load_prompts(name, layout=layout, columns=["reference"])
        streamed = load_prompts(name, layout=layout, columns=["reference"], streaming=True)
        assert isinstance(streamed["train"], IterableDataset)
        for _ in range(2):  # and so in the second pass
            assert list(streamed["train"]) == whole["train"].to_list()
        assert streamed["test"].to_list() == whole["test"].to_list()


def test_a_stream_without_a_test_split_holds_the_first_prompts_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(6)])
    with pytest.raises(ValueError, match="has no test split, so set max_test"):
        load_prompts(path, streaming=True)
    with pytest.raises(ValueError, match="no row to train on besides the 6 that are held out: lower max_test"):
        load_prompts(path, streaming=True, max_test=6)
    prompts = load_prompts(path, streaming=True, max_test=2)
    assert [row["prompt"][0]["content"] for row in prompts["train"]] == ["q2", "q3", "q4", "q5"]
    assert [p[0]["content"] for p in prompts["test"]["prompt"]] == ["q0", "q1"]


def test_the_trainer_takes_a_stream_unless_it_chooses_rows(tmp_path, make_trainer, trained):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"say {letter}"} for letter in "abcdefgh"])
    data = {"dataset": load_prompts(path, streaming=True, max_test=2)["train"], "reward_funcs": count_vowels}
    trainer = trained(max_steps=5, reward_clip_range=[0, 3], share_prompts=True, **data)
    assert trainer.state.global_step == 5  # 2 prompts a step: into the second pass
    for options in ({"curriculum": "online"}, {"group_size": "variance"}, {"dynamic_sampling_rounds": 1}):
        with pytest.raises(ValueError, match=r"IterableDataset does not allow: pass a datasets.Dataset"):
            make_trainer(**data, **options)
