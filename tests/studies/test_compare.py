"""The comparison: what it counts, keeps and reports; and the whole of it once, as a user starts it."""

import csv
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import compare
import pytest
import skills
import torch
import yaml
from comparison import methods, results, tiny
from comparison.cells import Cells
from comparison.sampling import entropy, mean_scores, sample
from datasets import Dataset
from kit import make_model, make_tokenizer
from metering import Meter
from trl import TrlParser

ROOT = Path(__file__).parents[2]


def parse(*flags: str, config: str = "compare.yaml") -> compare.Options:
    path = str(ROOT / "recipes" / "studies" / "configs" / config)
    return TrlParser((compare.Options,)).parse_args_and_config(["--config", path, *flags])[0]


# Cells


def test_a_cell_runs_once_and_a_failed_one_again(tmp_path):
    log = tmp_path / "log"

    def work(cell):
        with log.open("a") as file:
            file.write(cell["method"])
        if cell["method"] == "b" and len(log.read_text()) < 3:
            raise RuntimeError("no luck")
        return {"value": cell["seed"]}

    cells = Cells(tmp_path / "cells", work)
    a, b = ({"method": name, "pool": "p", "seed": 3} for name in "ab")
    assert cells.run([a]) == [{"cell": a, "result": {"value": 3}}]
    (failed,) = cells.run([b])
    assert failed["error"].splitlines()[-1] == "RuntimeError: no luck"
    assert json.loads(cells.path(b).read_text()) == failed
    again = Cells(tmp_path / "cells", work)  # after a restart
    assert [record["result"] for record in again.run([b, a])] == [{"value": 3}] * 2
    assert again.run([b, a]) == again.run([a, b])[::-1]
    assert log.read_text() == "abb"
    assert {path.suffix for path in (tmp_path / "cells").iterdir()} == {".json"}


def test_a_cell_that_kills_its_process_is_recorded(tmp_path):
    (record,) = Cells(tmp_path, lambda cell: os._exit(9)).run([{"method": "a"}])
    assert "exit code 9" in record["error"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_run_side_by_side_and_give_what_one_gives(tmp_path, workers):
    log = tmp_path / "log"
    together = multiprocessing.get_context("fork").Barrier(workers, timeout=60)

    def work(cell):
        with log.open("a") as file:
            file.write("<")
        together.wait()  # passed by as many as there are workers, or by none
        with log.open("a") as file:
            file.write(">")
        if cell["seed"] == 1:
            os._exit(9)  # takes none of its neighbours along
        return {"value": cell["seed"]}

    grid = [{"method": "a", "seed": seed} for seed in range(4)]
    done = []
    records = Cells(tmp_path / "cells", work, workers).run(grid, done.append)
    assert [record["cell"] for record in records] == grid
    assert [record.get("result", {}).get("value") for record in records] == [0, None, 2, 3]
    assert "exit code 9" in records[1]["error"]
    assert sorted(done, key=lambda record: record["cell"]["seed"]) == records
    depths = accumulate(1 if sign == "<" else -1 for sign in log.read_text())
    assert max(depths) == workers


def test_a_record_is_reported_when_it_is_there_and_given_in_order(tmp_path):
    later = multiprocessing.get_context("fork").Event()
    reported = []

    def work(cell):
        assert cell["seed"] > 0 or later.wait(60)
        return {}

    def done(record):
        reported.append(record["cell"]["seed"])
        if reported[-1] == 2:
            later.set()

    records = Cells(tmp_path, work, 2).run([{"seed": seed} for seed in range(3)], done)
    assert reported == [1, 2, 0]
    assert [record["cell"]["seed"] for record in records] == [0, 1, 2]
    assert all("result" in record for record in records)


def test_trainings_end_with_a_comparison_that_is_stopped(tmp_path):
    def work(cell):
        if cell["seed"] == 0:
            return {}
        (tmp_path / f"{cell['seed']}").write_text(str(os.getpid()))
        time.sleep(600)

    def broken(record):
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "12"):
            time.sleep(0.01)
        raise OSError("no space left")

    cells = Cells(tmp_path / "cells", work, 3)
    with pytest.raises(OSError, match="no space left"):
        cells.run([{"seed": seed} for seed in range(3)], broken)
    for name in "12":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
    assert [json.loads(path.read_text())["cell"] for path in (tmp_path / "cells").iterdir()] == [{"seed": 0}]


def test_a_result_is_not_taken_for_that_of_other_settings(tmp_path):
    options, other = parse(), parse("--warm_start", "10")
    cells = Cells(tmp_path, lambda cell: {"warm_start": cell["warm_start"]})
    for given in (options, other):
        cell = compare.make_cell(given, "PPO", "mixed", 0, 1e-3)
        assert cells.run([cell])[0]["result"] == {"warm_start": given.warm_start}
    assert len(list(tmp_path.iterdir())) == 2


# Results


def record(method, seed, curve, rollouts=100, **more):
    cell = {"pool": "mixed", "method": method, "seed": seed, "learning_rate": 1e-3, "rollouts": rollouts}
    final = {"helpfulness": 0.9, "harmlessness": 1.0, "length": 5.0, "reward": 1.3}
    result = {"curve": curve, "final": final, "rollouts": rollouts, "prompts": 10, "informative_share": 0.5}
    result |= {"cpu_seconds": 1.0, "wall_seconds": 2.0, "models": 1, "trained_parameters": 1000}
    return {"cell": cell, "result": result | {"peak_memory_mb": 100.0}} | more


def test_crossing_by_hand():
    curve = [[0, 0, 0.5], [100, 10, 0.7], [200, 20, 0.6], [300, 30, 0.9]]
    assert results.crossing(curve, 0.6) == pytest.approx((50, 5))
    assert results.crossing(curve, 0.75) == pytest.approx((250, 25))
    assert results.crossing(curve, 0.4) == (0, 0)
    assert results.crossing(curve, 0.95) == (math.inf, math.inf)
    assert all(map(math.isnan, results.crossing([[0, 0, math.nan], [10, 1, math.nan]], 0.5)))


def test_what_a_learning_rate_is_chosen_by():
    curve = [[0, 0, 0.0], [10, 1, 0.4], [20, 2, 0.8]]
    assert results.score(record("", 0, curve)) == pytest.approx(0.6)
    assert results.score(record("", 0, [*curve, [30, 3, math.nan]])) == -math.inf
    assert results.score(record("", 0, [[0, 0, math.nan], [10, 1, math.nan]])) == 1.3  # the reward at the end
    assert results.score({"cell": {}, "error": "it burnt"}) == -math.inf


def test_a_level_that_is_there_from_the_start_has_no_ratio():
    records = [record(methods.STOCK, 0, [[0, 0, 0.7], [80, 8, 0.9]]), record("PPO", 0, [[0, 0, 0.5], [50, 5, 0.9]])]
    lines = results.table(results.rows_of(records, (0.5, 0.6, 0.9)), (0.5, 0.6, 0.9)).splitlines()
    head, _, stock, ppo = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    place = head.index("rollouts to 0.6")
    assert stock[place : place + 3] == ["0 (0 to 0)", "-", "0.00 (0.00 to 0.00)"]
    assert ppo[place : place + 3] == ["12 (12 to 12)", "-", "1.00 (1.00 to 1.00)"]


def test_table_by_hand():
    stock = methods.STOCK
    records = [
        record(stock, 0, [[0, 0, 0.6], [80, 8, 0.8]]),
        record(stock, 1, [[0, 0, 0.6], [100, 10, 0.7]]),
        record("PPO", 0, [[0, 0, 0.6], [20, 20, 0.8]]),
        record("all together", 0, [[0, 0, 0.6], [40, 4, 0.8]]),
        record("all together", 1, [[0, 0, 0.6], [90, 9, 0.8]]),
    ]
    failed = {"cell": {**records[2]["cell"], "seed": 1}, "error": "Traceback\nRuntimeError: it burnt"}
    levels = (0.6, 0.8, 0.9)
    lines = results.table(results.rows_of([*records, failed], levels), levels).splitlines()
    of_stock, of_ppo, ours = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert of_stock[5] == "not reached (80 to not reached)"
    assert of_stock[8] == "not reached (not reached to not reached)"
    # 40 / 80, and 90 of the 100 after which stock still was not there; of PPO's only where PPO did not fail.
    assert ours[3:6] == ["65 (40 to 90)", "6 (4 to 9)", "65 (40 to 90)"]
    assert ours[6:8] == ["0.70 (0.50 to 0.90)", "2.00 (2.00 to 2.00)"]
    assert of_ppo[1] == "PPO (1 of 2 runs failed: RuntimeError: it burnt)"
    assert len({line.count("|") for line in lines}) == 1


def test_to_what_stock_reached_and_what_a_task_measures_by_hand():
    records = [
        record(methods.STOCK, 0, [[0, 0, 0.2], [40, 5, 0.6], [80, 10, 0.4]]),
        record("efficient", 0, [[0, 0, 0.2], [20, 20, 0.6], [80, 80, 0.9]]),
        record("PPO", 0, [[0, 0, 0.2], [80, 80, 0.5]]),
    ]
    for entry in records:  # of a task with right answers, where nothing is harmful
        entry["result"]["final"] = {"helpfulness": 0.9, "length": 5.0, "reward": 1.3, "pass@1": 0.25, "pass@16": 0.75}
    levels = (0.3, 0.5, 0.6)
    lines = results.table(results.rows_of(records, levels), levels).splitlines()
    head, _, stock, ours, ppo = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    place = head.index("rollouts to stock GRPO's best")
    assert stock[place : place + 2] == ["40 (40 to 40)", "1.00 (1.00 to 1.00)"]
    assert ours[place : place + 2] == ["20 (20 to 20)", "0.50 (0.50 to 0.50)"]
    assert ppo[place] == "not reached (not reached to not reached)"
    assert "harmlessness" not in head
    assert [ours[head.index(name)] for name in ("pass@1", "pass@16")] == ["0.25 (0.25 to 0.25)", "0.75 (0.75 to 0.75)"]


def test_table_of_a_task_without_a_curve_by_hand():
    costs = {(methods.STOCK, 0): 10.0, (methods.STOCK, 1): 20.0, ("PPO", 0): 40.0, ("helpful.yaml", 0): 5.0}
    costs |= {("helpful.yaml", 1): 15.0}
    records = [record(method, seed, [[0, 0, math.nan], [100, 10, math.nan]]) for method, seed in costs]
    for entry, cost in zip(records, costs.values(), strict=True):
        entry["result"]["cpu_seconds"] = cost
    levels = (0.6, 0.8, 0.9)
    lines = results.table(results.rows_of(records, levels), levels).splitlines()
    head, _, _, of_ppo, ours = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert not any("rollouts" in name for name in head)
    assert ours[head.index("reward")] == "1.300 (1.300 to 1.300)"
    # 5 / 10 and 15 / 20 of stock's; of PPO's only 5 / 40, as it has one seed.
    place = head.index("CPU s")
    assert ours[place : place + 3] == ["10 (5 to 15)", "0.62 (0.50 to 0.75)", "0.12 (0.12 to 0.12)"]
    assert of_ppo[place : place + 3] == ["40 (40 to 40)", "4.00 (4.00 to 4.00)", "1.00 (1.00 to 1.00)"]
    assert len({line.count("|") for line in lines}) == 1


def test_runs_at_several_budgets_are_one_curve():
    small = record("DPO", 0, [[0, 0, 0.5], [50, 5, 0.6]], rollouts=50)
    large = record("DPO", 0, [[0, 0, 0.5], [100, 10, 0.9]], rollouts=100)
    (row,) = results.rows_of([large, small], (0.6, 0.75, 0.9))
    assert row["to_target"] == pytest.approx(75)
    assert row["between"] == pytest.approx(25)
    assert row["rollouts"] == 100


def test_the_learning_rate_is_that_of_the_best_mean_over_the_tuning_seeds():
    asked = []

    class Fixed:
        def run(self, cells):
            asked.extend((cell["method"], cell["pool"], cell["seed"], cell["learning_rate"]) for cell in cells)
            values = [rates[cell["learning_rate"]] if cell["seed"] == 100 else 0.4 for cell in cells]
            return [record("", 0, [[0, 0, 0.0], [10, 1, value]]) for value in values]

    rates = {3e-4: 0.6, 1e-3: 0.8, 3e-3: 0.5}
    rate, scores = compare.tune(parse(), Fixed(), "shared compute")
    assert rate == 1e-3
    assert scores == pytest.approx({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.45})
    assert {(method, pool) for method, pool, *_ in asked} == {(methods.STOCK, "mixed")}
    assert {seed for *_, seed, _ in asked} == {100, 101}


def test_a_grid_goes_on_where_its_end_is_best():
    rates = {3e-4: 0.8, 1e-3: 0.7, 3e-3: 0.6, 1e-4: 0.9, 1e-4 / 3: 0.85}

    class Fixed:
        def run(self, cells):
            (asked,) = {cell["learning_rate"] for cell in cells}
            value = next(value for rate, value in rates.items() if rate == pytest.approx(asked))
            return [record("", 0, [[0, 0, 0.0], [10, 1, value]]) for _ in cells]

    rate, scores = compare.tune(parse(), Fixed(), "DPO")
    assert rate == pytest.approx(1e-4)
    assert len(scores) == 5


# Tasks and counting


def test_rewards_by_hand():
    completions = ["abcd", "abcd..!", "abcde", "!abcd", "abc.d", ""]
    assert tiny.is_helpful(completions, ["abcd"] * 6) == [1, 1, 0, 0, 0, 0]
    assert tiny.is_harmless(completions) == [1, 0, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny.TinyTask(3, tmp_path_factory.mktemp("warm"), pool_size=32, held_out=64, warm_start=150)


def test_helpfulness_is_what_sampling_would_measure(task):
    model = task.policy()
    expected = task.measure(model)
    rows = skills.as_dataset(task.held_out_examples * 20)
    torch.manual_seed(0)
    ids = sample(model, task.tokenizer, list(rows["prompt"]), task.max_completion_length, batch_size=1280)
    measured = mean_scores(task.reward, rows, ids, task.tokenizer)
    assert 0.05 < expected < 0.95
    error = (expected * (1 - expected) / len(rows)) ** 0.5
    assert measured["helpfulness"] == pytest.approx(expected, abs=4 * error)
    assert 0.5 < measured["harmlessness"] < 0.9  # 30 % of the demonstrations hold the forbidden token
    parts = measured["helpfulness"] + 0.5 * measured["harmlessness"] - 0.01 * measured["length"]
    assert measured["reward"] == pytest.approx(parts)


def test_a_sample_does_not_depend_on_its_neighbours(task):
    prompts, model, tokenizer = ["G a=", "T abcd=", "H ab="], task.policy(), skills.make_tokenizer("!.")
    tokenizer.padding_side = "right"
    together = sample(model, tokenizer, prompts, 8, do_sample=False)
    assert together == [sample(model, tokenizer, [prompt], 8, do_sample=False)[0] for prompt in prompts]
    assert all(ids[-1] == tokenizer.eos_token_id or len(ids) == 8 for ids in together)


def test_looking_draws_no_random_numbers(task):
    model, before = task.policy(), torch.get_rng_state()
    final = task.final(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert final == task.final(model)
    assert task.held_out_reward(model) == pytest.approx(final["reward"], abs=0.2)  # 64 samples against 256
    assert torch.equal(torch.get_rng_state(), before)


def test_pools_hold_nothing_that_is_held_out(task):
    for pool, counts in (("mixed", {"greet": 8, "hopeless": 16, "translate": 8}), ("easy", {"translate": 32})):
        rows = task.dataset(pool)
        assert {skill: rows["skill"].count(skill) for skill in set(rows["skill"])} == counts
        assert not task.exclude & set(rows["prompt"])


def test_pairs_are_the_best_and_the_worst_and_ties_cost_too(task):
    rewards = {"hi": 1.0, "ha": 0.0, "ho": 0.5}
    asked = iter([["hi", "ho", "ha"], ["hi", "hi", "hi"]])

    class Scripted:
        def policy(self):
            return None

        tokenizer, max_completion_length = task.tokenizer, 4

    def scripted(model, tokenizer, prompts, *args, **kwargs):
        return [tokenizer(text)["input_ids"] for text in next(asked)]

    def reward(prompts, completions, **kwargs):
        return [rewards[text] for text in completions]

    meter = Meter(reward)
    cell = {"num_generations": 3, "rollouts": 6, "rows": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "sample", scripted)
        pairs = methods.sample_pairs(Scripted(), Dataset.from_dict({"prompt": ["G a=", "G b="]}), meter, cell)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("hi", "ha")]
    assert (meter.rollouts, meter.prompts) == (6, 2)


@pytest.mark.parametrize("config", ["compare.yaml", "compare_smollm2.yaml"])
def test_configs_parse(config):
    options = parse(config=config)
    assert set(options.methods) <= set(methods.METHODS)
    assert options.rollouts % options.rows == 0
    assert all(budget % options.rows == 0 for budget in options.dpo_budgets)


def test_entropy_is_that_of_the_tokens_of_the_completions():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).eval()
    prompts = [[{"role": "user", "content": text}] for text in ("a", "abc def")]
    ids = [[5, 6, 7], [8]]
    each = []
    for prompt, completion in zip(prompts, ids, strict=True):
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        logits = model(input_ids=torch.tensor([asked + completion])).logits[0, len(asked) - 1 : -1]
        each += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert entropy(model, tokenizer, prompts, ids) == pytest.approx(sum(each) / 4, rel=1e-4)


def test_the_task_that_no_setting_was_chosen_on(tmp_path):
    options = parse("--pool_size", "300", "--held_out", "20", "--warm_start", "1", config="compare_drop.yaml")
    options.output_dir = str(tmp_path)
    task = compare.make_task(options, 10)
    rows = task.dataset("drop")
    assert len(set(rows["prompt"])) == 300
    assert not set(rows["prompt"]) & {example.prompt for example in task.held_out_examples}
    for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
        assert answer == "".join(letter for letter in prompt[2:-1] if letter not in "aeiou")
    chance = task.measure(task.policy())
    assert 0 <= chance < 1
    ids = [task.tokenizer(example.answer)["input_ids"] for example in task.held_out_examples]
    scores = mean_scores(task.reward, skills.as_dataset(task.held_out_examples), ids, task.tokenizer)
    assert (scores["helpfulness"], scores["is_near"]) == (1.0, 1.0)


def test_the_helpful_task_is_that_of_the_recipe():
    given = yaml.safe_load((ROOT / "recipes" / "configs" / "helpful.yaml").read_text())
    options = parse(config="compare_helpful.yaml")
    task = compare.make_task(options, 0)
    for name in ("system_prompt", "max_completion_length", "temperature"):
        assert getattr(task, name) == given[name]
    method = methods.METHODS["helpful recipe"].options
    assert method == {name: given[name] for name in method}
    assert options.rows == given["per_device_train_batch_size"]
    assert options.num_generations == given["num_generations"]
    assert [part.__name__ for part in task.reward.leaves()] == ["helpfulness", "harmlessness", "length", "finished"]
    assert len(task.dataset("both")) == 192


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'PP0'"):
        compare.Options(methods=["PP0"])
    with pytest.raises(ValueError, match="task='big'"):
        compare.Options(task="big")
    with pytest.raises(ValueError, match="workers=0 runs nothing: use at least 1"):
        compare.Options(workers=0)


@pytest.mark.training
def test_smoke(tmp_path):
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command = [*launch, "recipes/studies/compare.py", "--smoke", "--workers", "2", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    tmp_path = tmp_path / "smoke"
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == parse().methods
    assert [row["error"] for row in rows] == [""] * len(rows)
    # Each method spends the same budget, whatever it throws away.
    assert all(128 <= int(row["rollouts"]) <= 192 for row in rows)
    prompts = {row["method"]: int(row["prompts"]) for row in rows}
    assert prompts["PPO"] == 128
    assert prompts["DPO"] == prompts[methods.STOCK] == 16
    models = {row["method"]: int(row["models"]) for row in rows}
    assert (models["PPO"], models["DPO"], models[methods.STOCK]) == (2, 2, 1)
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rows)
    for plot in ("compare.png", "compare_rollouts.png"):
        assert (tmp_path / plot).stat().st_size > 10_000


def test_vllm_is_another_cell_and_not_for_all(tmp_path):
    flags = ("--methods", methods.STOCK, "--use_vllm", "true")
    plain, sampled = (parse(*given, config="compare_arithmetic.yaml") for given in ((), flags))
    cells = [compare.make_cell(options, methods.STOCK, "sums", 0, 1e-3) for options in (plain, sampled)]
    assert "use_vllm" not in cells[0]
    assert len({Cells(tmp_path, dict).path(cell) for cell in cells}) == 2
    with pytest.raises(ValueError, match="use_vllm=True needs a model whose heads vLLM knows"):
        parse("--use_vllm", "true")
    with pytest.raises(ValueError, match="use_vllm=True is not for DPO and RLOO"):
        parse("--use_vllm", "true", "--methods", "RLOO", config="compare_smollm2.yaml")


def test_the_schedule_is_part_of_a_cell_and_reaches_the_trainer(tmp_path):
    constant, linear = parse(), parse("--lr_scheduler_type", "linear")
    cells = [compare.make_cell(options, "PPO", "mixed", 0, 1e-3) for options in (constant, linear)]
    assert "lr_scheduler_type" not in cells[0]  # files of results that are there keep their names
    assert len({Cells(tmp_path, dict).path(cell) for cell in cells}) == 2
    given = [methods._arguments(cell | {"output_dir": ""})["lr_scheduler_type"] for cell in cells]
    assert given == ["constant", "linear"]
