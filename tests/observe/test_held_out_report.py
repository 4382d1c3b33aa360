"""What a report makes of `held_out.jsonl`: the table, the curves, the headline and the answers side by side."""

import json
import random

import pytest
from fabricated import HOSTILE, data_of, fabricate

from trl_grpo_ext.observe.report import read_run, write_report
from trl_grpo_ext.observe.report.figures import axes_of, held_out_panels, panels_of
from trl_grpo_ext.observe.report.held_out import answers_of, read_held_out, table_of
from trl_grpo_ext.observe.report.summary import headline, verdict

STEPS = (0, 10, 20, 30, 40)


def with_held_out(folder, gain=0.3, count=30, kept=None, seed=0, texts=("", "")):
    """Evaluations of `count` prompts at five steps of a run, whose total rises by `gain`."""
    chance = random.Random(seed)
    levels = [chance.random() for _ in range(count)]
    lines = []
    with (folder / "monitor" / "metrics.jsonl").open("a") as metrics:
        for step in STEPS:
            totals = [level + gain * step / 40 + chance.gauss(0, 0.02 * (step > 0)) for level in levels]
            mean = sum(totals) / count
            logged = {
                "eval_reward": mean,
                "eval_reward/gain": mean - sum(levels) / count,
                "eval_rewards/total/mean": mean,
            }
            metrics.write(json.dumps({"step": step, **logged, "eval_runtime": 1.0}) + "\n")
            for row, total in enumerate(totals):
                scores = {"helpful": total, "length": 30.0 - step / 4, "total": total}
                answer = f"answer {row} at {step} {texts[1]}"
                line = {"step": step, "row": row, "sample": 0, "turn": 1, "question": f"question {row} {texts[0]}"}
                lines.append({**line, "answer": answer, "scores": scores})
    if kept is not None:
        lines.append({"step": 40, "kept": kept})
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_table_compares_each_prompt_with_itself(tmp_path):
    found = read_held_out(with_held_out(fabricate(tmp_path / "run")))
    assert found.steps == list(STEPS)
    assert found.measures == ["total", "helpful", "length"]
    rows = {row[0]: row[1:] for row in table_of(found)}
    before, after, change, noise, count, told = rows["total"]
    assert change == pytest.approx(after - before)
    assert change == pytest.approx(0.3, abs=0.02)
    assert 0.004 < noise < 0.012  # twice 0.02 by the root of 30
    assert (count, told) == (30, "risen")
    assert rows["length"][2:] == [-10.0, 0.0, 30, "fallen"]


@pytest.mark.parametrize(("count", "told"), [(19, "too few prompts"), (20, "risen")])
def test_a_few_prompts_decide_nothing(count, told, tmp_path):
    found = read_held_out(with_held_out(fabricate(tmp_path / "run"), count=count))
    assert table_of(found)[0][-1] == told
    assert (table_of(found)[0][4] is None) == (count < 20)


@pytest.mark.parametrize(
    ("gain", "count", "tone", "text"),
    [
        (0.3, 30, "good", "has risen from"),
        (-0.3, 30, "bad", "has fallen from"),
        (0.001, 30, "neutral", "stayed within its noise"),
        (0.3, 2, "neutral", "2 prompts are too few"),
    ],
)
def test_the_headline_decides_by_the_prompts(gain, count, tone, text, tmp_path):
    run = read_run(with_held_out(fabricate(tmp_path / "run"), gain=gain, count=count))
    given_tone, sentence = verdict(run)
    assert (given_tone, text in sentence) == (tone, True), sentence
    if count == 30 and abs(gain) > 0.1:
        assert "on 30 prompts, each compared with itself" in sentence


def test_the_evaluation_of_the_kept_weights_counts(tmp_path):
    folder = with_held_out(fabricate(tmp_path / "run"), kept=20)
    found = read_held_out(folder)
    assert found.last == 20
    assert table_of(found)[0][3] == pytest.approx(0.15, abs=0.02)
    assert answers_of(found)[3][3] == "answer 3 at 20 "
    run = read_run(folder)
    assert "These are the weights of step 20, which were restored." in verdict(run)[1]
    (shown,) = [value for label, value, _ in headline(run)["numbers"] if label == "Held-out reward"]
    assert shown == f"{found.mean(20, 'total'):.3f}"
    data = data_of(write_report(folder))
    assert "The weights of step 20, the best, were restored" in data["runs"][0]["held_out"]["note"]


def test_curves_have_the_noise_of_the_gain_as_their_band(tmp_path):
    run = read_run(with_held_out(fabricate(tmp_path / "run")))
    panels = held_out_panels([run])
    assert [panel.title for panel in panels] == ["Held-out total", "Held-out helpful", "Held-out length"]
    (line,) = panels[0].lines
    steps = axes_of([run])[0].x["step"]
    points = {step: each for step, *each in zip(steps, line.y, line.low, line.high, strict=True) if each[0] is not None}
    assert list(points) == list(STEPS)
    assert points[0][0] == points[0][1] == points[0][2]
    mean, low, high = points[40]
    assert high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(table_of(run.held_out)[0][4])
    titles = [panel.title for panel in panels_of([run])]
    assert "Held-out total" in titles
    assert not any("gain" in title for title in titles)


def test_two_runs_share_the_axes(tmp_path):
    runs = [read_run(with_held_out(fabricate(tmp_path / name), gain=gain)) for name, gain in (("a", 0.1), ("b", 0.3))]
    runs.append(read_run(fabricate(tmp_path / "c")))  # which has none
    panel = held_out_panels(runs)[0]
    assert [(line.run, line.label) for line in panel.lines] == [(0, "a"), (1, "b")]
    data = data_of(write_report(tmp_path / "a", tmp_path / "both.html", compare=tmp_path / "c"))
    assert [run["held_out"] is None for run in data["runs"]] == [False, True]


def test_hostile_and_broken_lines_are_left_out(tmp_path):
    folder = with_held_out(fabricate(tmp_path / "run"), texts=(HOSTILE[1], HOSTILE[2]))
    good = (folder / "held_out.jsonl").read_text()
    bad = ['{"step": "x"}', "nonsense", '{"step": 5, "row": -1, "scores": {}}', '{"step": 5, "row": 1, "scores": 3}']
    bad += [json.dumps({"step": 0, "row": 0, "scores": {"a": "b", "c": 1e999}}), json.dumps({"step": 1, "kept": "x"})]
    (folder / "held_out.jsonl").write_text("\n".join(bad) + "\n" + good)
    found = read_held_out(folder)
    assert found.steps == list(STEPS)
    assert found.broken == 4
    assert found.kept is None
    text = write_report(folder).read_text()
    assert HOSTILE[1] not in text
    (folder / "held_out.jsonl").unlink()
    (folder / "held_out.jsonl").symlink_to("/etc/passwd")
    assert read_held_out(folder).values == {}


def test_several_datasets_are_told_apart(tmp_path):
    folder = fabricate(tmp_path / "run")
    lines = [
        {
            "step": step,
            "dataset": name,
            "row": row,
            "question": "q",
            "answer": "a",
            "scores": {"total": float(step + k)},
        }
        for step in (0, 10)
        for k, name in enumerate(("math", "chat"))
        for row in range(25)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table_of(read_held_out(folder))
    assert [row[:4] for row in rows] == [["math: total", 0.0, 10.0, 10.0], ["chat: total", 1.0, 11.0, 10.0]]
