"""The benchmark runs, fills its table, and measures what it says."""

import csv
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import metering
import mixed_pool
import pytest
import shares
import skills
import torch

from trl_grpo_ext.recipe.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_skills_by_hand():
    rng = random.Random(0)
    for _ in range(50):
        greet, translate, hopeless = (skills.make_example(skill, rng) for skill in ("greet", "translate", "hopeless"))
        assert greet.answer == "hi"
        assert len(hopeless.answer) == 6
        # Halfway around the alphabet, twice, is where it began.
        word = translate.prompt[2:-1]
        assert translate.answer == "".join(chr((ord(letter) - ord("a") + 13) % 26 + ord("a")) for letter in word)


def test_noise_is_one_place_off_at_the_rate_of_the_letter():
    slips = {"a": [], "z": []}
    rng = random.Random(0)
    for _ in range(20_000):
        example = skills.make_example("translate", rng, noisy=True)
        for letter, answer in zip(example.prompt[2:-1], example.answer, strict=True):
            if letter in slips:
                slips[letter].append((ord(answer) - ord(letter)) % 26 - 13)
    assert set(slips["a"]) == set(slips["z"]) == {0, 1}
    assert sum(slips["a"]) / len(slips["a"]) == pytest.approx(0.7, abs=0.03)
    assert sum(slips["z"]) / len(slips["z"]) == pytest.approx(0.05, abs=0.02)


def test_examples_are_distinct_and_keep_out_of_the_held_out_ones():
    held_out = frozenset(e.prompt for e in skills.make_examples({"greet": 200}, seed=0))
    pool = skills.make_examples({"greet": 200, "hopeless": 50}, seed=0, exclude=held_out)
    prompts = {e.prompt for e in pool}
    assert len(held_out) == 200
    assert len(prompts) == 250
    assert not prompts & held_out


def test_reward_by_hand():
    assert skills.is_right(["abc", "abcd", "", "acb"], answer=["abc", "abc", "abc", "abc"]) == [1.0, 0.0, 0.0, 0.0]


def test_recorder_counts_rows_of_groups_whose_rewards_differ():
    recorder = metering.Meter(skills.is_right)
    # Three rows of "p", one of them right; two of "q", both right.
    answers = ["a", "a", "a", "c", "c"]
    assert recorder(["p", "p", "p", "q", "q"], ["a", "b", "b", "c", "c"], answer=answers) == [1, 0, 0, 1, 1]
    recorder(["p"] * 5, ["b"] * 5, answer=["a"] * 5)
    assert recorder.rollouts == 10
    assert recorder.prompts == 3
    assert recorder.informative_share(0) == 3 / 10
    assert recorder.informative_share(0, end=5) == 3 / 5
    assert recorder.informative_share(5) == 0


@pytest.mark.training
def test_accuracy_is_what_sampling_would_measure():
    tokenizer = skills.make_tokenizer()
    model = skills.warm_start(tiny_model(tokenizer, seed=0), tokenizer, steps=200)
    examples = skills.make_examples({"translate": 400}, seed=1)
    expected = skills.accuracy(model, tokenizer, examples)
    assert 0.02 < expected < 0.98
    torch.manual_seed(0)
    inputs = tokenizer([e.prompt for e in examples for _ in range(4)], return_tensors="pt")
    ids = model.eval().generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=skills.MAX_COMPLETION
    )
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    right = skills.is_right(completions, [e.answer for e in examples for _ in range(4)])
    error = (expected * (1 - expected) / len(right)) ** 0.5
    assert sum(right) / len(right) == pytest.approx(expected, abs=4 * error)


def test_looking_draws_no_random_numbers():
    tokenizer = skills.make_tokenizer()
    model = tiny_model(tokenizer, seed=0)
    before = torch.get_rng_state()
    skills.accuracy(model, tokenizer, skills.make_examples({"greet": 4}, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_table_by_hand():
    def row(method, seed, reached, seconds):
        result = {"pool": "mixed", "method": method, "seed": str(seed), "rollouts_to_target": str(reached)}
        return result | {
            "informative_share": "0.5",
            "final_accuracy": "0.9",
            "rollouts": "100",
            "seconds": str(seconds),
        }

    results = [row("stock TRL", 0, 80, 10), row("stock TRL", 1, "inf", 10)]
    results += [row("ours", 0, 40, 20), row("ours", 1, 90, 10)]
    stock, ours = (line.split(" | ") for line in mixed_pool.make_table(results).splitlines()[2:])
    assert stock[3] == "not reached (80 to not reached)"
    # 40 / 80, and 90 of the 100 after which stock still was not there.
    assert ours[3:5] == ["65 (40 to 90)", "0.70 (0.50 to 0.90)"]
    assert ours[6].startswith("1.50 (1.00 to 2.00)")


@pytest.mark.training
def test_smoke(tmp_path):
    mixed_pool.main(mixed_pool.Options(smoke=True, output_dir=str(tmp_path)))
    results = mixed_pool.read(tmp_path / "results.csv")
    assert len(results) == len(mixed_pool.METHODS) * len(mixed_pool.POOLS)
    assert {int(r["rollouts"]) >= 4 * 64 for r in results} == {True}
    # Every method starts from the same weights.
    assert len({r["start_accuracy"] for r in results}) == 1
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(results)
    assert all(cell.strip() for line in lines for cell in line.strip("|").split("|"))
    assert (tmp_path / "mixed_pool.png").stat().st_size > 10_000


@pytest.mark.training
def test_compute_smoke(tmp_path):
    command = [
        sys.executable,
        "recipes/studies/compute.py",
        "--smoke",
        "--repeats",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = tmp_path / "smoke"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3  # methods, kinds of measurement
    assert all(float(row["ratio"]) == 1.0 for row in rows if row["method"] == "stock")
    errors = [float(line.rsplit(" ", 1)[1]) for line in result.stdout.splitlines() if "of the gradients" in line]
    assert len(errors) == 1
    assert errors[0] < 1e-5
    assert (folder / "compute.png").stat().st_size > 10_000
    assert "| prompt 64 | on |" in (folder / "table.md").read_text()


@pytest.mark.training
def test_shares_smoke():
    command = [sys.executable, "recipes/studies/shares.py", "--smoke", "--steps", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    stock, ours = (line for line in result.stdout.splitlines() if "s a step" in line)
    assert "trl_grpo_ext" not in stock
    for line in (stock, ours):
        told = dict(re.findall(r"(\w+) ([\d.]+)%", line))
        assert sum(map(float, told.values())) == pytest.approx(100, abs=0.5)
        assert {"torch", "transformers", "trl"} <= set(told)
    assert "trl_grpo_ext" in ours


def test_time_belongs_to_the_package_that_calls(monkeypatch):
    assert shares.owner("/x/site-packages/trl/trainer/a.py") == "trl"
    assert shares.owner("/x/trl_grpo_ext/compute/a.py") == "trl_grpo_ext"
    assert shares.owner("/x/lib/python3/json/a.py") == "other"
    ours, theirs, builtin = ("/x/trl_grpo_ext/a.py", 1, "f"), ("/x/trl/b.py", 1, "g"), ("~", 0, "<mul>")
    called = {ours: (1, 1, 3.0, 3.0), theirs: (1, 1, 1.0, 1.0)}
    entries = {ours: (1, 1, 2.0, 5.0, {}), theirs: (1, 1, 2.0, 3.0, {}), builtin: (2, 2, 4.0, 4.0, called)}
    monkeypatch.setattr(shares.pstats, "Stats", lambda profile: SimpleNamespace(stats=entries))
    assert shares.shares(None) == pytest.approx({"trl_grpo_ext": 5 / 8, "trl": 3 / 8})
