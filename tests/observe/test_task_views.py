"""What alarms, report and live view say of the tasks of a run."""

import json

from fabricated import fabricate, with_tasks

from trl_grpo_ext.observe.alarms import AlarmDetector, make_alarms
from trl_grpo_ext.observe.line import FIELDS, fields_of, readable
from trl_grpo_ext.observe.report import read_run, write_report
from trl_grpo_ext.observe.report.figures import panels_of
from trl_grpo_ext.observe.report.tasks import HEADS, task_names, task_table


def raised_by(logs: list[dict]) -> list[str]:
    detector = AlarmDetector(make_alarms())
    return [
        event.line for entry in logs for event in detector.update({"loss": 0.1, **entry}) if event.state == "raised"
    ]


def test_a_flat_task_is_named_where_the_mean_hides_it():
    logs = {"rollouts/informative": 0.6, "tasks/math/informative": 1.0, "tasks/code/informative": 0.0}
    (line,) = raised_by([logs] * 30)
    assert line.startswith(
        "flat_task: task 'code': tasks/code/informative is 0 over 16 logs, where rollouts/informative is 0.6"
    )
    # Where all is flat, other alarms say so; and a task that is drawn too rarely is not judged.
    assert raised_by([{**logs, "rollouts/informative": 0.02, "tasks/math/informative": 0.05}] * 30) == []
    assert raised_by([logs] * 10) == []


def test_a_falling_task_is_named_where_the_mean_hides_it():
    def entry(step, fall, rise=0.01):
        values = {"reward": 0.5 + rise * step, "tasks/code/reward": -fall * step + 0.01 * (step % 2)}
        return {**values, "tasks/code/reward_std": 1.0, "tasks/math/reward": rise * step, "tasks/math/reward_std": 1.0}

    (line,) = raised_by([entry(step, fall=0.03) for step in range(60)])
    assert line.startswith("falling_task: task 'code': tasks/code/reward went from")
    assert raised_by([entry(step, fall=0.001) for step in range(60)]) == []
    assert raised_by([entry(step, fall=0.03, rise=-0.01) for step in range(60)]) == []  # nothing is hidden


def test_a_truncated_task_is_named_where_the_mean_hides_it():
    logs = {"completions/clipped_ratio": 0.2, "tasks/math/truncated": 0.0, "tasks/code/truncated": 0.9}
    (line,) = raised_by([logs] * 12)
    assert line.startswith("truncated_task: task 'code': tasks/code/truncated is 0.9 over 6 logs")
    assert raised_by([{**logs, "tasks/code/truncated": 0.4}] * 12) == []


def test_tasks_have_a_table_and_plots(tmp_path):
    run = read_run(with_tasks(fabricate(tmp_path / "run"), math=0.4, chat=-12.0, **{"code/hard": 0.5}))
    assert task_names(run) == ["math", "chat", "code/hard"]
    rows = task_table(run)
    assert [row[0] for row in rows] == ["math", "chat", "code/hard"]
    assert [row[HEADS.index("Course")] for row in rows] == ["risen", "level", "risen"]
    assert [row[HEADS.index("Informative")] for row in rows] == ["80%", "50%", "20%"]
    panels = {panel.title: [line.label for line in panel.lines] for panel in panels_of([run])}
    # The rewards of chat are of another size, and would press the others flat.
    assert panels["Reward by task: math, code/hard"] == ["math", "code/hard"]
    assert panels["Reward by task: chat"] == ["chat"]
    assert panels["Completion length by task"] == ["math", "chat", "code/hard"]
    assert not [title for title in panels if title.startswith("tasks/")]
    assert task_table(read_run(fabricate(tmp_path / "other"))) == []


def test_a_step_without_a_task_counts_in_its_share(tmp_path):
    run = with_tasks(fabricate(tmp_path / "run", steps=40), math=0.4, chat=0.5)
    path = run / "monitor" / "metrics.jsonl"
    lines = []
    for number, line in enumerate(path.read_text().splitlines()):
        entry = json.loads(line)
        entry |= {"tasks/math/share": 0.25, "tasks/chat/share": 0.75}
        if number % 2:  # all completions are of one task, and nothing is logged of the other
            entry = {name: value for name, value in entry.items() if not name.startswith("tasks/math/")}
            entry["tasks/chat/share"] = 1.0
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))
    shares = {row[0]: row[HEADS.index("Share")] for row in task_table(read_run(run))}
    assert shares == {"math": "12%", "chat": "88%"}


def test_a_task_with_a_hostile_name_or_few_logs_is_only_text(tmp_path):
    name = "<script>alert(1)</script>\x1b[2J"
    run = with_tasks(fabricate(tmp_path / "run", steps=3), **{name: 1.0, "b": 0.0})
    rows = task_table(read_run(run))
    assert "\x1b" not in rows[0][0]
    assert rows[0][4] == "too early to say"
    assert "<script>alert" not in write_report(run).read_text("utf-8")


def test_tasks_are_in_the_line_and_in_the_table():
    logs = {"loss": 0.0, "reward": 0.5, "tasks/math/reward": 0.25, "tasks/chat/reward": -12.5}
    logs |= {"tasks/math/informative": 0.5, "tasks/chat/length": 20.0}
    assert readable(logs, 3, 16) == "step  3/16 · reward 0.500 · math 0.250 · chat -12"
    found = {label: value for label, value, _ in fields_of(logs, len(FIELDS))}
    assert found["math"] == "0.250 (50% teach)"
    assert found["chat"] == "-12"
