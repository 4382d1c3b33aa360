"""The report: whatever state a run is in, it says what is known."""

import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fabricated import HOSTILE, START, TOTAL, alarm, data_of, fabricate, group, write_alarms, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import PYTHONPATH, config_kwargs, count_vowels, has_answer, text_of
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.observe.report import NotARunError, read_run, write_report
from trl_grpo_ext.observe.report.__main__ import main
from trl_grpo_ext.observe.report.completions import _shown, read_groups
from trl_grpo_ext.observe.report.escaping import json_for_html, visible
from trl_grpo_ext.observe.report.figures import MAX_POINTS, axes_of, panels_of
from trl_grpo_ext.observe.report.page import page_data
from trl_grpo_ext.observe.report.pictures import write_pngs
from trl_grpo_ext.observe.report.reader import average, state_of
from trl_grpo_ext.observe.report.summary import compare_configurations, configuration, headline, verdict
from trl_grpo_ext.rewards import Length, as_reward

HERE = Path(__file__).parent


def entries(count: int, **series) -> str:
    """Lines of metrics.jsonl: each series is a function of the step."""
    return "".join(
        json.dumps({"step": step, "time": START + 3 * step, **{name: f(step) for name, f in series.items()}}) + "\n"
        for step in range(1, count + 1)
    )


def run_with(folder: Path, text: str, **info):
    (folder / "monitor").mkdir(parents=True, exist_ok=True)
    (folder / "monitor" / "run.json").write_text(json.dumps({"status": "running", "max_steps": 100, **info}))
    (folder / "monitor" / "metrics.jsonl").write_text(text)
    return read_run(folder)


# Properties


@given(st.lists(st.text() | st.text("\x00\x1b\x7f\x9b\u061c\u200e\u202e\u2028\u2066\u2069\ufeff\ud800")))
def test_visible_text_holds_nothing_that_hides_or_reorders(texts):
    shown = visible("".join(texts))
    shown.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert visible(shown) == shown


@given(st.text(st.characters(categories=["L", "N", "P", "Z"], exclude_characters="\u2028\u2029"), max_size=20))
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HOSTILE),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_json_in_a_page_cannot_leave_its_element(value):
    text = json_for_html(value)
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode("utf-8")
    again = json_for_html(json.loads(text))
    assert again == text


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5000))
def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path_factory, cut):
    text = entries(40, reward=lambda step: step / 40, kl=lambda step: 0.1)
    run = run_with(tmp_path_factory.mktemp("run"), text[:cut])
    whole = text[:cut].count("\n") + text[:cut].endswith("}")
    assert [entry["step"] for entry in run.metrics] == list(range(1, whole + 1))
    assert not any("could not be read" in note for note in run.notes)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 12), st.integers(1, 200))
def test_completions_are_capped_and_groups_stay_whole(tmp_path_factory, tables, groups, size, most):
    folder = tmp_path_factory.mktemp("run")
    run = run_with(folder, entries(100, reward=lambda step: 0.0))
    for step in range(1, tables + 1):
        rows = [row for g in range(groups) for row in group(f"{step} {g}", [float(i) for i in range(size)])]
        write_table(folder, step, rows)
    _, found, note = read_groups(run, most)
    count = sum(len(entry["rows"]) for entry in found)
    assert all(len(entry["rows"]) == size for entry in found)
    assert count <= max(most, size * min(most, tables))  # a group at least of each table that is read
    assert count > min(most, tables * groups * size) / 4 or count >= size * min(40, most, tables)
    steps = [entry["step"] for entry in found]
    assert steps == sorted(steps)
    assert steps[-1] == tables
    assert (count == tables * groups * size) == (", of" not in note and count == tables * groups * size)
    for entry in found:
        advantages = [row[1] for row in entry["rows"]]
        assert advantages == sorted(advantages, reverse=True)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.lists(finite, min_size=1, max_size=30) | st.lists(st.sampled_from([1.7976931348623157e308, 5e-324, 1.0, 0.1]))
)
def test_an_average_lies_between_the_values_whatever_their_size(values):
    if values:
        assert min(values) <= average(values) <= max(values)
        assert average(values) == pytest.approx(
            float(sum(map(Fraction, values)) / len(values)), abs=1e-9 * max(map(abs, values))
        )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.lists(st.none() | finite, max_size=20))
def test_long_series_are_averaged_inside_their_band(tmp_path_factory, count, seed, odd):
    chance = random.Random(seed)
    values = [None if chance.random() < 0.1 else chance.gauss(0, 1) for _ in range(count)]
    values[: len(odd)] = odd[:count]
    if all(value is None for value in values):
        values[0] = 1.0
    run = run_with(tmp_path_factory.mktemp("run"), entries(count, reward=lambda step: values[step - 1]))
    for panel in panels_of([run]):
        for line in panel.lines:
            assert len(line.y) == len(axes_of([run])[0].x["step"]) <= MAX_POINTS
            if count <= MAX_POINTS:
                assert line.y == values
                assert line.low is None
            else:
                for mean, low, high in zip(line.y, line.low, line.high, strict=True):
                    assert (mean is None) == (low is None)
                    assert mean is None or low <= mean <= high
                assert max(v for v in line.high if v is not None) == max(v for v in values if v is not None)


# The headline


@pytest.mark.parametrize(
    ("reward", "tone", "text"),
    [
        (lambda step: step / 100 - 0.005, "good", "has risen from 0.0500 to 0.950; still rising"),
        (lambda step: 1 - 0.5**step, "good", "has risen"),
        (lambda step: min(step, 160 - step) / 100, "bad", "has risen from 0.0550 to 0.645; falling"),
        (lambda step: 0.5 + 0.1 * (-1) ** step, "neutral", "is where it began (from 0.500 to 0.500"),
        (lambda step: 1.005 - step / 100, "bad", "has fallen from 0.950 to 0.0500; falling"),
        (lambda step: None, "neutral", "logs no reward"),
    ],
)
def test_the_verdict(tmp_path, reward, tone, text):
    given_tone, sentence = verdict(run_with(tmp_path, entries(100, reward=reward)))
    assert (given_tone, text in sentence) == (tone, True), sentence


def held_out_run(folder: Path, before: float, after: float, **logs):
    """A run whose reward falls in training, with an evaluation at its start and at its end."""
    text = entries(100, reward=lambda step: 1 - step / 100)
    for step, value in ((0, before), (100, after)):
        text += json.dumps({"step": step, "eval_reward": value, **logs}) + "\n"
    return run_with(folder, text, reward_names=[TOTAL])


@pytest.mark.parametrize(
    ("after", "tone", "text"),
    [
        (1.2, "good", "has risen from 1.00 to 1.20 (± 0.113 on 50 prompts, by the spread of their rewards)"),
        (0.8, "bad", "has fallen from 1.00 to 0.800"),
        (1.1, "neutral", "stayed within its noise (from 1.00 to 1.10 on 50 prompts"),
        (1.0, "neutral", "stayed within its noise"),
    ],
)
def test_held_out_prompts_decide(after, tone, text, tmp_path):
    # The standard error of the difference is sqrt(2 * 0.2828 ** 2 / 50) = 0.0566, and twice that counts.
    logs = {"eval_reward_std": 0.2828, "eval_runtime": 2.0, "eval_samples_per_second": 25.0}
    given_tone, sentence = verdict(held_out_run(tmp_path, 1.0, after, **logs))
    assert (given_tone, text in sentence) == (tone, True), sentence
    assert "In training: The reward has fallen" in sentence


@pytest.mark.parametrize(
    ("logs", "text"),
    [
        ({"eval_runtime": 1.0, "eval_samples_per_second": 2.0}, "went from 0.405 to 0.418, and 2 prompts are too few"),
        ({}, "the number of prompts is unknown: too little to say"),
    ],
)
def test_a_few_held_out_prompts_decide_nothing(logs, text, tmp_path):
    tone, sentence = verdict(held_out_run(tmp_path, 0.405, 0.418, eval_reward_std=0.001, **logs))
    assert (tone, text in sentence) == ("neutral", True), sentence


@pytest.mark.parametrize(
    ("gain", "tone", "text"),
    [(0.1, "good", "has risen"), (-0.1, "bad", "has fallen"), (0.004, "neutral", "stayed within its noise")],
)
def test_held_out_prompts_are_compared_with_themselves(gain, tone, text, tmp_path):
    # Rewards differ much from prompt to prompt, and gains by 0.02 around their mean: its standard error is 0.0032.
    before = [i / 10 for i in range(40)]
    after = [value + gain + 0.02 * (-1) ** i for i, value in enumerate(before)]
    logs = {"eval_reward_std": 1.2, "eval_runtime": 1.0, "eval_samples_per_second": 40.0}
    run = held_out_run(tmp_path, sum(before) / 40, sum(after) / 40, **logs)
    for step, values in ((0, before), (100, after)):
        write_table(tmp_path, step, [row for i, value in enumerate(values) for row in group(f"prompt {i}", [value])])
    given_tone, sentence = verdict(run)
    assert (given_tone, text in sentence) == (tone, True), sentence
    assert "on 40 prompts, each compared with itself" in sentence
    # Other prompts in one of the tables: then there is nothing to pair.
    write_table(tmp_path, 0, group("training", [0.0, 1.0]))
    assert "by the spread of their rewards" in verdict(run)[1]


def test_it_is_too_early_for_a_verdict(tmp_path):
    assert "Too early to say: 3 logs" in verdict(run_with(tmp_path, entries(3, reward=float)))[1]


def test_a_lost_loss_is_said_first(tmp_path):
    text = entries(20, reward=lambda step: step / 20, loss=lambda step: 0.1)
    text += json.dumps({"step": 21, "loss": None, "reward": None, "grad_norm": None}) + "\n"
    top = headline(run_with(tmp_path, text))
    assert top["tone"] == "bad"
    assert "no finite loss and no finite reward" in top["text"]


def test_the_numbers_by_hand(tmp_path):
    folder = fabricate(tmp_path / "run", steps=40, logged=30)
    write_alarms(folder, alarm(3), alarm(5, state="cleared"), alarm(9, name="flat"), alarm(9, name="flat"))
    top = headline(read_run(folder), now=START + 3 * 30 + 60)
    numbers = {label: (value, detail) for label, value, detail in top["numbers"]}
    assert numbers["Step"] == ("30 of 40", "running, last log 1 min 0 s ago")
    assert numbers["Rollouts"] == ("1 920", "270 000 tokens")
    assert numbers["Informative"] == ("79%", "rollouts that teach; at first 52%")
    assert numbers["Time"][0] == "1 min 27 s"
    assert numbers["Time left"][0] == "30 s"
    assert [(entry["name"], entry["step"], entry["remedy"]) for entry in top["alarms"]] == [
        ("flat", 9, "lower the learning rate")
    ]


def test_the_time_between_interruption_and_resume_is_no_work(tmp_path):
    text = entries(20, reward=float) + "".join(
        json.dumps({"step": step, "time": START + 86400 + 3 * step, "reward": 1.0}) + "\n" for step in range(21, 41)
    )
    numbers = {label: value for label, value, _ in headline(run_with(tmp_path, text))["numbers"]}
    assert numbers["Time"] == "2 min 54 s"  # 38 gaps of 3 s, and one that counts as 20 of them


@pytest.mark.parametrize(
    ("later", "state", "text"),
    [
        (10, "running", "running, last log 10 s ago"),
        (599, "running", "running, last log 9 min 59 s ago"),
        (7200, "silent", "probably interrupted: last log 2 h 0 min ago, where one came every 3 s"),
    ],
)
def test_a_run_that_no_longer_logs_was_probably_interrupted(tmp_path, later, state, text):
    run = read_run(fabricate(tmp_path / "run", steps=40, logged=20))
    assert state_of(run, now=START + 60 + later) == (state, text)


# Reading


def test_logs_of_one_step_are_joined(tmp_path):
    text = entries(2, reward=float) + json.dumps({"step": 2, "eval_reward": 7.0, "reward": None}) + "\n"
    run = run_with(tmp_path, text + '{"step": 3, "reward": NaN, "text": "x", "flag": true}\n')
    assert run.column("reward") == [1.0, 2.0, None]
    assert run.column("eval_reward") == [None, 7.0, None]


def test_a_long_run_takes_little_memory(tmp_path):
    line = json.dumps({"step": 0, **{f"metric/{i}": i / 7 for i in range(60)}, "lost": None})
    text = "".join(line.replace(": 0,", f": {step},", 1) + "\n" for step in range(1, 3001))
    tracemalloc.start()
    run = run_with(tmp_path, text)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 3000 * 60 * 16  # a dictionary of floats would take 6 times that
    assert run.column("metric/59")[::1000] == [59 / 7] * 3
    assert run.last_step == 3000
    assert "lost" in run.metrics[0]
    assert run.metrics[0]["lost"] is None
    assert len(run.metric_names) == 60


def test_broken_lines_are_counted_and_left_out(tmp_path):
    run = run_with(tmp_path, '{"step": 1, "reward": 1}\nnonsense\n[1]\n{"no": "step"}\n{"step": 2, "reward": 2}\n{"st')
    assert run.column("reward") == [1, 2]
    assert any("2 lines of monitor/metrics.jsonl" in note for note in run.notes)


def test_a_run_that_has_just_started(tmp_path):
    page = write_report(run_with(tmp_path, "", config={"beta": 0.5}).folder)
    data = data_of(page)
    assert data["panels"] == []
    assert any("Nothing is logged yet" in note for note in data["runs"][0]["notes"])
    assert "No completions were logged" in data["runs"][0]["groups_note"]
    assert ["beta", "0.5", "0"] in data["runs"][0]["changed"]


def test_a_run_without_monitor_is_read_from_the_newest_state(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [
            {"step": i, "reward": i / 10, "rewards/f/mean": i / 10, "rewards/f/std": 0.1} for i in range(1, step)
        ]
        state = {"global_step": step, "max_steps": 20, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "trainer_state.json").write_text('{"log_hist')
    run = read_run(tmp_path)
    assert run.last_step == 9
    assert run.function_names == ["f"]
    assert any("checkpoint-10/trainer_state.json, as of step 10" in note for note in run.notes)
    assert any("trainer_state.json is broken" in note for note in run.notes)
    assert state_of(run)[0] == "unknown"


@pytest.mark.parametrize("kind", ["nothing", "file", "missing"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, kind, capsys):
    path = tmp_path / "x"
    if kind == "nothing":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert "pass the output_dir of a training run" in said
    with pytest.raises(NotARunError):
        read_run(path)


def test_repeated_foreign_and_broken_tables(tmp_path):
    run = run_with(tmp_path, entries(6, reward=float), reward_names=[TOTAL], reward_weights=[2.0])
    rows = group("one", [1.0, 3.0]) + group("two", [1.0, 1.0])
    for step in (3, 4, 5):  # one batch, logged three times
        write_table(tmp_path, step, rows)
    write_table(tmp_path, 7, group("of an earlier run", [0.0, 1.0]))
    (tmp_path / "completions" / "completions_00006.parquet").write_bytes(b"PAR1")
    columns, found, note = read_groups(run, 1000)
    assert [(entry["step"], entry["prompt"], entry["flat"]) for entry in found] == [(3, "one", False), (3, "two", True)]
    assert (found[0]["spread"], found[0]["mean"]) == (4.0, 4.0)  # with weight 2
    assert [row[:3] for row in found[0]["rows"]] == [["answer 1 to one", 1.0, 6.0], ["answer 0 to one", -1.0, 2.0]]
    assert columns == [TOTAL, "helpful", "harmless", "length"]
    assert "1 tables of steps after the last log" in note
    assert "1 tables could not be read" in note


def test_rewards_that_were_clipped_to_one_value_are_flat(tmp_path):
    run = run_with(tmp_path, entries(1, reward=float), reward_names=[TOTAL])
    write_table(tmp_path, 1, [{**row, "advantage": 0.0} for row in group("one", [7.0, 9.0])])
    assert read_groups(run, 10)[1][0]["flat"]


def test_a_completion_without_others_is_flat_unless_it_has_an_advantage(tmp_path):
    run = run_with(tmp_path, entries(1, reward=float), reward_names=[TOTAL])
    alone = [group(name, [7.0], advantage=value)[0] for name, value in (("one", 0.5), ("two", 0.0))]
    write_table(tmp_path, 1, alone)
    assert [(entry["prompt"], entry["flat"]) for entry in read_groups(run, 10)[1]] == [("one", False), ("two", True)]


def test_the_configuration_is_read_without_a_process_group_and_beside_a_training(tmp_path):
    run_with(tmp_path, "", config={"beta": 0.04})
    code = (
        "import sys; from accelerate import Accelerator; from accelerate.state import AcceleratorState;"
        "from trl_grpo_ext.observe.report import read_run;"
        "from trl_grpo_ext.observe.report.summary import configuration;"
        "accelerator = Accelerator(cpu=True) if sys.argv[2] else None;"
        "print(configuration(read_run(sys.argv[1]))[0]);"
        "print(accelerator and (accelerator.num_processes, accelerator.device.type))"
    )
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for beside, variables, told in (("", launched, "None"), ("training", {}, "(1, 'cpu')")):
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), beside],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.stdout.splitlines() == ["[['beta', '0.04', '0']]", told], result.stderr[-2000:]


def test_configuration_shows_what_was_set_and_hides_secrets(tmp_path):
    defaults = AdaptiveGRPOConfig(output_dir="x", bf16=False, use_cpu=True).to_dict()
    config = json.loads(json.dumps({**defaults, "beta": 0.04, "hub_token": "hf_x", "mine": [1]}, default=str))
    config["vllm_server_base_url"] = "http://me:secret@host"
    run = run_with(tmp_path / "a", "", config=config)
    changed, others = configuration(run)
    assert [row for row in changed if row[0] not in ("output_dir", "bf16", "use_cpu")] == [
        ["vllm_server_base_url", "http://host", "None"],
        ["beta", "0.04", "0"],
        ["mine", "[1]", "not set"],
    ]
    assert len(others) > 100
    # What follows from another option is no choice, though it differs from what it is without.
    batches = AdaptiveGRPOConfig(output_dir="x", bf16=False, use_cpu=True, gradient_accumulation_steps=4).to_dict()
    batches = json.loads(json.dumps(batches, default=str))
    assert [row[0] for row in configuration(run_with(tmp_path / "d", "", config=batches))[0]] == [
        name for name in batches if name in ("output_dir", "gradient_accumulation_steps", "bf16", "use_cpu")
    ]
    other = run_with(tmp_path / "b", "", config={**config, "beta": 0.1, "seed": 1})
    assert compare_configurations(run, other) == [["seed", "42", "1"], ["beta", "0.04", "0.1"]]
    beyond = run_with(tmp_path / "c", "", config={**config, "beta": 10**400})
    assert ["beta", "None", "0"] in configuration(beyond)[0]
    assert "hf_x" not in json.dumps(page_data([run], axes_of([run]), [], 10))


# Pictures


def test_plots_are_written_for_any_name(tmp_path):
    names = ["$\\frac{$", "_hidden", "长度", "a" * 300, "<b>"]
    series = {f"rewards/{name}/mean": lambda step: step * 1.0 for name in names}
    spikes = {"grad_norm": lambda step: 1000.0 if step == 5 else 1.0, "kl": lambda step: 0.0}
    run = run_with(tmp_path, entries(20, reward=float, **series, **spikes))
    panels = panels_of([run])
    assert [panel.log for panel in panels if panel.title == "Gradient norm"] == [True]
    files = write_pngs(panels, axes_of([run]), tmp_path / "figures")
    assert {"reward.png", "gradient_norm.png"} == {file.name for file in files}
    assert [panel.constant for panel in panels if panel.constant] == ["KL to the reference: 0"]
    assert all(file.stat().st_size > 5000 for file in files)


def test_two_runs_share_their_axes(tmp_path):
    runs = [read_run(fabricate(tmp_path / name / "run", seed=i)) for i, name in enumerate("ab")]
    assert [axis.name for axis in axes_of(runs)] == ["a/run", "b/run"]
    panels = panels_of(runs)
    titles = [panel.title for panel in panels]
    assert {"Reward: total", "Reward: helpful", "Large reward components: length", "Group size"} <= set(titles)
    assert all([line.run for line in panel.lines] == [0, 1] for panel in panels)
    assert len({panel.file for panel in panels if not panel.is_extra}) == len([p for p in panels if not p.is_extra])


def test_every_value_has_its_place_on_the_axis_of_rollouts(tmp_path):
    rows = [{"rollouts/total": 8}, {"kl": 0.1}, {"rollouts/total": 16}, {"kl": 0.2}, {"eval_reward": 1.0}]
    text = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, 1))
    (axis,) = axes_of([run_with(tmp_path, text)])
    assert axis.x["rollouts"] == [8, 8, 16, 16, 16]
    # Before the first step there is none, and what is evaluated there has its place all the same.
    (axis,) = axes_of([run_with(tmp_path, json.dumps({"step": 0, "eval_reward": 0.5}) + "\n" + text)])
    assert axis.x["rollouts"] == [0, 8, 8, 16, 16, 16]
    (axis,) = axes_of([run_with(tmp_path, entries(3, reward=float))])
    assert "rollouts" not in axis.x


def test_what_never_moves_is_a_line_of_text(tmp_path):
    moves = {"reward": float, "advantage/mean": lambda step: 0.0, "advantage/abs_mean": lambda step: step / 10}
    still = {
        "beta": lambda step: 0.04,
        "frac_reward_zero_std": lambda step: 0.5,
        "rollouts/flat_high": lambda step: 0.2,
    }
    run = run_with(tmp_path, entries(5, mine=lambda step: 3.0, **moves, **still))
    panels = panels_of([run])
    data = page_data([run], axes_of([run]), panels, 10)
    assert data["constants"] == [
        "Flat groups: groups with equal rewards 0.500, rollouts in those with high rewards 0.200",
        "KL coefficient β: 0.0400",
        "mine: 3.00",
    ]
    assert [panel["title"] for panel in data["panels"]] == ["Reward", "Advantages"]
    assert panels_of([run_with(tmp_path / "one", entries(1, beta=float))])[0].constant is None


def test_the_length_of_those_that_end_has_gaps_where_none_ended(tmp_path):
    lengths = {"completions/mean_terminated_length": lambda step: [0.0, 7.0, 8.0][step % 3]}
    (panel,) = panels_of([run_with(tmp_path, entries(3, **lengths))])
    assert panel.lines[0].y == [7.0, 8.0, None]


def test_rounding_of_the_mean_advantage_is_not_blown_up(tmp_path):
    run = run_with(tmp_path, entries(20, **{"advantage/mean": lambda step: (-1) ** step * 1e-8}))
    (panel,) = panels_of([run])
    assert (panel.limits, panel.log) == ((-0.05, 0.05), False)


def test_the_report_goes_where_it_is_told(tmp_path, capsys):
    folder = fabricate(tmp_path / "run")
    other = fabricate(tmp_path / "other", seed=1)
    assert main([str(folder), "--compare", str(other), "--output", str(tmp_path / "out" / "both.html")]) == 0
    assert (tmp_path / "out" / "both_figures" / "gradient_norm.png").exists()
    assert str(tmp_path / "out" / "both.html") in capsys.readouterr().out
    assert not (folder / "report.html").exists()
    assert main([str(folder), str(other), "--output", str(tmp_path / "pair.html")]) == 0
    assert [run["name"] for run in data_of(tmp_path / "pair.html")["runs"]] == ["run", "other"]
    assert main([str(folder), str(other), "--compare", str(other)]) == 2
    assert main([str(folder), "--max-completions", "0"]) == 2


def test_a_folder_of_runs_lists_them(tmp_path, capsys):
    write_alarms(fabricate(tmp_path / "runs" / "second" / "seed 1", gain=0.3), alarm(3))
    fabricate(tmp_path / "runs" / "first", steps=40, logged=20, seed=1)
    (tmp_path / "runs" / "empty").mkdir()
    assert main([str(tmp_path / "runs")]) == 0
    first, second, hint = capsys.readouterr().out.splitlines()
    assert first.startswith("first          step 20 of 40, probably interrupted: ")
    assert second.startswith("second/seed 1  step 40 of 40, finished at step 40, reward 0.5")
    assert second.endswith(", alarm kl_spike")
    assert hint.startswith(f"{tmp_path / 'runs'} holds 2 runs: pass one of them")
    assert not list((tmp_path / "runs").rglob("report.html"))


# Real runs


def test_a_real_run_shows_its_completions_with_components(model_path, dataset, tmp_path):
    reward = 2.0 * as_reward(count_vowels) + as_reward(has_answer) - 0.1 * Length()
    options = {"log_completions": True, "num_completions_to_print": 0, "monitor": True, "beta": 0.1, "max_steps": 4}
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, **options)),
        train_dataset=dataset,
    )
    trainer.train()
    run = data_of(write_report(tmp_path))["runs"][0]
    assert run["headline"]["state"] == "finished"
    assert run["columns"] == ["count_vowels", "has_answer", "length"]
    assert {group["step"] for group in run["groups"]} == {1, 2, 3, 4}
    assert sum(len(group["rows"]) for group in run["groups"]) == 4 * 8
    for group_ in run["groups"]:
        letter = group_["prompt"][-1]
        for completion, _, total, (vowels, answer, length) in group_["rows"]:
            if visible(completion) == completion and "⟨" not in completion:
                assert [vowels] == count_vowels([completion])
                assert [answer] == has_answer([completion], [letter])
            assert total == pytest.approx(2 * vowels + answer - 0.1 * length, abs=1e-5)
    assert ["beta", "0.1", "0"] in run["changed"]


def test_stock_trl_without_a_monitor(model_path, dataset, tmp_path):
    trainer = GRPOTrainer(
        model=model_path,
        reward_funcs=[count_vowels, has_answer],
        args=GRPOConfig(**config_kwargs(tmp_path, log_completions=True, num_completions_to_print=0)),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_state()
    run = data_of(write_report(tmp_path))["runs"][0]
    assert run["headline"]["state"] == "finished"
    assert run["columns"] == ["count_vowels", "has_answer"]
    assert "weights of the reward functions are unknown" in run["groups_note"]
    assert run["changed"] == run["unchanged"] == []


def test_components_of_two_processes_stay_with_their_rows(model_path, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(HERE / "report_run.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = PYTHONPATH
    result = subprocess.run(
        [*command, model_path, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    assert len(files) == 3
    for file in files:
        table = pq.read_table(file).to_pydict()
        assert len(table["step"]) == 16
        texts = [text_of(completion) for completion in table["completion"]]
        assert table["count_vowels"] == count_vowels(texts)
        assert table["has_answer"] == has_answer(texts, [prompt[-1] for prompt in table["prompt"]])
    assert len(set(zip(table["count_vowels"], texts, strict=True))) > 4
    # One process prints: each log is one line.
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(" · ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]


def test_values_of_rollouts_are_lists_and_shown_as_numbers_where_there_is_one():
    assert [_shown(value) for value in ([0.5], [], [1.0, None], ["yes"], 2)] == [0.5, None, "[1.0, None]", "yes", 2.0]
