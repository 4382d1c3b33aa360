"""The live view: a table in place on a terminal, plain lines elsewhere, and a terminal left as it was found."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pyte
import pytest
from fabricated import alarm, write_alarms
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import PYTHONPATH, ROOT, config_kwargs, count_vowels, has_answer
from rich.cells import cell_len
from rich.console import Console
from transformers import PrinterCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.observe import live
from trl_grpo_ext.observe.line import BARS, FIELDS, TROUBLES, fields_of, readable, sparkline, trend
from trl_grpo_ext.observe.live import LiveCallback, LiveView

HERE = Path(__file__).parent
LOGS = {
    "loss": 0.1,
    "reward": 0.5,
    "reward_std": 0.25,
    "rewards/whole/mean": 0.5,
    "rewards/whole/std": 0.25,
    "rewards/helpful/mean": 0.75,
    "rewards/length/mean": 31.0,
    "kl": 0.0123,
    "beta": 0.04,
    "grad_norm": 1.5,
    "learning_rate": 1e-6,
    "entropy": 1.25,
    "completions/mean_length": 31.0,
    "completions/clipped_ratio": 0.25,
    "rollouts/informative": 0.5,
    "rollouts/total": 1280.0,
    "num_tokens": 40000.0,
    "group_size/min": 2.0,
    "group_size/mean": 4.0,
    "group_size/max": 8.0,
    "curriculum/position": 0.5,
}
# Of a run with groups of one, and of a judge that fails.
SINGLE = {
    "group_size/min": 1.0,
    "group_size/mean": 1.0,
    "group_size/max": 1.0,
    "advantage/abs_mean": 0.345,
    "reuse/skipped": 0.25,
    "baseline/residual_std": 0.3456,
    "baseline/explained_variance": 0.41,
    "curriculum/explained_variance": -0.125,
}
JUDGED = {f"rewards/judge/{kind}": value for kind, value in zip(TROUBLES, (4.0, 0.0, 2.0, 5.5, 1.0), strict=True)}


def state(step=3, max_steps=10, main=True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=main)


def shown(view: LiveView, width: int, fancy: bool = True) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(view.render(width, fancy))
    return console.file.getvalue().splitlines()


def screen_of(output: bytes, columns: int = 100, rows: int = 50) -> pyte.Screen:
    screen = pyte.Screen(columns, rows)
    pyte.ByteStream(screen).feed(output)
    return screen


def lines_of(screen: pyte.Screen) -> list[str]:
    return [line.rstrip() for line in screen.display if line.strip()]


# Properties

anything = st.none() | st.floats() | st.integers(-(10**30), 10**30)
metrics = st.sampled_from([*LOGS, *SINGLE, *JUDGED]) | st.text().map(lambda name: f"rewards/{name}/mean")
metrics |= st.builds("rewards/{}/{}".format, st.text(), st.sampled_from(TROUBLES))


@settings(deadline=None)
@given(
    st.dictionaries(metrics, anything),
    st.integers(20, 200),
    st.booleans(),
)
def test_any_log_fits_any_width(logs, width, fancy):
    view = LiveView(max_steps=10)
    for sign in (1, -1, 1):
        view.log({"loss": 0.0} | {name: value if value is None else sign * value for name, value in logs.items()})
        view.step_to(view.step + 1)
    assert all(cell_len(line) <= width for line in shown(view, width, fancy))
    assert "\n" not in readable(logs | {"group_size/max": 1, "group_size/min": 1}, 3, 10)


@example([0.0, 2.2e-313])
@example([-1.7e308, 1.7e308])
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_a_sparkline_keeps_the_order(values):
    bars = [BARS.index(bar) for bar in sparkline(values)]
    assert len(bars) == len(values)
    for one, bar in zip(values, bars, strict=True):
        assert all(bar <= other_bar for other, other_bar in zip(values, bars, strict=True) if one <= other)


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=24))
def test_the_trend_turns_with_the_values(values):
    opposite = {"↑": "↓", "↓": "↑", "→": "→"}
    assert trend([-value for value in values]) == opposite[trend(values)]


# By hand


def test_a_line():
    line = readable({**LOGS, "alarms/kl_spike": 1.0}, 3, 16)
    assert line == (
        "step  3/16 · reward 0.500 · helpful 0.750 · length 31 · kl 0.0123 · β 0.04 · grad 1.50 · informative 50% · "
        "curriculum 50% · groups 2-8 · alarm kl_spike"
    )
    assert readable({"loss": 0.0, "reward": None, "rewards/a/mean": None}, 1, 10) == "step  1/10"
    assert readable({"eval_reward": 0.5}, 1, 10) == "step  1/10 · held-out reward 0.500"
    gained = {f"eval_{name}{end}": value for name in ("reward", "right") for end, value in (("", 0.5), ("/gain", 0.25))}
    assert readable({**gained, "eval_right/gain_low": 0.125, "eval_right/gain_high": 0.375}, 1, 10) == (
        "step  1/10 · held-out reward 0.500 (+0.250) · held-out right 0.500 (+0.250 ± 0.125)"
    )


def test_a_line_of_groups_of_one():
    logs = {"reward": 0.5, "rollouts/informative": 1.0, **SINGLE}
    assert readable(logs, 1, 10) == (
        "step  1/10 · reward 0.500 · informative 100% · |advantage| 0.34 · updates left out 25% · foreseen 41% · "
        "foreseen by text -12% · groups 1"
    )
    view = LiveView(max_steps=10)
    view.log({"loss": 0.0, **logs})
    assert ["beyond", "baseline", "±", "0.35"] in [row.split()[:4] for row in shown(view, 60)]
    # Where groups have several completions, a monitor logs the size of advantages too, and nobody needs it in a line.
    logs = {**LOGS, "advantage/abs_mean": 0.5}
    assert readable(logs, 1, 10) == readable(LOGS, 1, 10)


def test_what_goes_wrong_with_a_reward_is_told():
    logs = {"reward": 0.7, "rewards/judge/mean": 0.7, **JUDGED, "rewards/own/retries": 1.0, "grad_norm": 0.0}
    assert readable(logs, 1, 3) == (
        "step 1/3 · reward 0.700 · judge 0.700 · judge failures 4, garbage 2, retries 5.5, errors 1 · own retries 1 · "
        "grad 0.00"
    )
    assert readable({"eval_reward": 0.5, "eval_rewards/judge/timeouts": 2.0}, 1, 3) == (
        "step 1/3 · held-out reward 0.500 · held-out judge timeouts 2"
    )
    view = LiveView(max_steps=3)
    view.log({"loss": 0.0, **logs})
    rows = [row.split()[:4] for row in shown(view, 60)]
    assert ["failures", "of", "judge", "4"] in rows
    assert ["retries", "of", "own", "1"] in rows
    assert "timeouts" not in "".join(shown(view, 60))
    well = {name: 0.0 if name.rpartition("/")[2] in TROUBLES else value for name, value in logs.items()}
    assert readable(well, 1, 3) == "step 1/3 · reward 0.700 · judge 0.700 · grad 0.00"
    view.log({"loss": 0.0, **well})
    assert "of judge" not in "".join(shown(view, 60))


def test_sixty_columns_have_room_for_every_label_and_value():
    view = LiveView(max_steps=100)
    for step in range(24):
        view.log({**LOGS, **SINGLE, **JUDGED, "reward": float(step)})
        view.step_to(step + 1)
    view.step_to(24)
    text = "\n".join(shown(view, 60))
    for label, value, _ in fields_of(view.logs, len(FIELDS)):
        assert any(line.startswith(label) and value in line for line in text.splitlines()), label
    assert "…" not in text


def test_a_table():
    view = LiveView(max_steps=10)
    for step in range(6):
        view.log({**LOGS, "reward": 0.1 * step})
        view.step_to(step + 1)
    view.log({"eval_reward": 0.7})
    rows = shown(view, 100)
    assert rows[0].startswith("step 6/10  ━━━━━━━━━━━━╌╌╌╌╌╌╌╌ 60%")
    assert rows[1].split() == ["reward", "0.500", "±", "0.250", "↑", "▁▂▄▅▇█"]
    assert [row.split()[0] for row in rows[3:5]] == ["helpful", "length"]
    assert any(row.split()[:2] == ["groups", "2-8"] for row in rows)
    assert any(row.split()[:3] == ["held-out", "reward", "0.700"] for row in rows)
    assert not any("whole" in row for row in rows)
    assert not any("▁" in row for row in shown(view, 30))
    "\n".join(shown(view, 100, fancy=False)).replace("±", "").replace("β", "").encode("ascii")


def test_the_page_shows_what_the_code_prints():
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8").split("## Live view")[1]
    table, line = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    fields = fields_of({**LOGS, **SINGLE, **JUDGED, "reuse/skipped": 0.5}, len(FIELDS))
    labels = {label for label, _, _ in fields} | {"judge"}
    rows = table.split("alarm")[0].splitlines()[1:]
    assert rows
    assert all(re.split(r"\s{2,}", row)[0] in labels for row in rows)
    parts = line.strip().split(" · ")[1:]
    assert all(any(part.startswith(f"{label} ") for label in labels) for part in parts)


@given(st.integers(30, 200))
def test_bars_that_do_not_fit_are_the_oldest(width):
    view = LiveView(max_steps=100)
    for step in range(24):
        view.log({**LOGS, "reward": float(step == 23)})
    (row,) = (row for row in shown(view, width) if row.startswith("reward"))
    if "▁" in row:
        assert row.rstrip().endswith("▁█")
    if width == 60:
        assert "▁█" in row


def test_alarms_come_with_their_remedy_and_go(tmp_path):
    write_alarms_folder = tmp_path / "monitor"
    write_alarms_folder.mkdir()
    write_alarms(tmp_path, alarm(3, remedy="raise beta"))
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    callback = LiveCallback(console)
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state(0), None)
    callback.on_log(args, state(3), None, logs={**LOGS, "alarms/kl_spike": 1.0})
    assert "alarm kl_spike: raise beta" in shown(callback.view, 80)
    callback.on_log(args, state(4), None, logs={"eval_reward": 1.0})
    assert "alarm kl_spike: raise beta" in shown(callback.view, 80)
    callback.on_log(args, state(5), None, logs=LOGS)
    assert not any("alarm" in line for line in shown(callback.view, 80))
    callback.on_train_end(args, state(5), None)


def test_the_file_of_alarms_is_read_when_there_is_a_new_one(tmp_path, monkeypatch):
    (tmp_path / "monitor").mkdir()
    write_alarms(tmp_path, alarm(3, remedy="raise beta"), alarm(4, name="flat", remedy="draw harder prompts"))
    read, reads = live.read_alarms, []
    monkeypatch.setattr(live, "read_alarms", lambda *args: reads.append(args) or read(*args))
    callback = LiveCallback(Console(file=io.StringIO()))
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state(0), None)
    for step in range(3, 9):
        callback.on_log(args, state(step), None, logs={**LOGS, "alarms/kl_spike": 1.0})
    assert len(reads) == 1
    callback.on_log(args, state(9), None, logs={**LOGS, "alarms/flat": 1.0})
    assert "alarm flat: draw harder prompts" in shown(callback.view, 80)


def test_names_cannot_steer_the_terminal(tmp_path):
    name = "\x1b[2J[bold]x[/nothing]\u202e\r"
    logs = {**LOGS, f"rewards/{name}/mean": 1.0, f"alarms/{name}": 1.0}
    view = LiveView(max_steps=10)
    view.log(logs)
    for text in ["\n".join(shown(view, 100)), readable(logs, 1, 10)]:
        assert "\x1b[2J" not in text
        assert "␛[2J[bold]x[/nothing]⟨U+202E⟩␍" in text
        assert "\r" not in text


def test_only_the_main_process_shows_anything(tmp_path, capsys):
    callback = LiveCallback()
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state(0, main=False), None)
    callback.on_log(args, state(1, main=False), None, logs=LOGS)
    callback.on_step_end(args, state(1, main=False), None)
    callback.on_train_end(args, state(1, main=False), None)
    assert capsys.readouterr().out == ""


def test_a_poor_encoding_does_not_end_the_training(tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    callback = LiveCallback(Console(file=file))
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state(0), None)
    callback.on_log(args, state(1), None, logs=LOGS)
    assert file.buffer.getvalue().startswith(b"step  1/10 ? reward 0.500")


# Real runs


def train(model_path, dataset, out, console) -> None:
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=as_two_parts(),
        args=AdaptiveGRPOConfig(**config_kwargs(out, max_steps=5, group_size="variance")),
        train_dataset=dataset,
        callbacks=[LiveCallback(console)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def as_two_parts():
    from trl_grpo_ext.rewards import as_reward

    return as_reward(count_vowels) + as_reward(has_answer)


def test_without_a_terminal_every_log_is_a_line(model_path, dataset, tmp_path):
    console = Console(file=io.StringIO())
    train(model_path, dataset, tmp_path, console)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [f"step {i}/5" for i in range(1, 6)]
    assert all("count_vowels" in line and "\x1b" not in line for line in lines)


def test_on_a_terminal_one_table_is_updated_in_place(model_path, dataset, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50)
    train(model_path, dataset, tmp_path, console)
    output = console.file.getvalue()
    assert output.count("count_vowels") >= 5  # it was drawn again and again
    lines = lines_of(screen_of(output.replace("\n", "\r\n").encode()))
    assert sum("count_vowels" in line for line in lines) == 1
    assert lines[0].startswith("step 5/5")


def in_terminal(model_path, out, how, columns=100, rows=50) -> tuple[int, bytes]:
    """Exit status and output of tests/observe/live_run.py in a terminal of its own."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "live_run.py"), model_path, str(out), how],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    return process.wait(60), output[output.index(b"BEGIN") :]


@pytest.mark.parametrize("how", ["finish", "catch", "SIGINT", "SIGTERM"])
def test_the_terminal_is_left_as_it_was_found(model_path, tmp_path, how):
    status, output = in_terminal(model_path, tmp_path, how)
    screen = screen_of(output, rows=80)
    lines = lines_of(screen)
    # An interrupted Python kills itself by SIGINT, unless a library runs code from a string at exit: then it returns 1.
    expected = {"finish": {0}, "catch": {0}, "SIGINT": {-signal.SIGINT, 1}, "SIGTERM": {-signal.SIGTERM}}
    assert status in expected[how]
    assert not screen.cursor.hidden
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == ["step 6/6" if how == "finish" else "step 2/6"]
    assert sum(line.split()[0] == "count_vowels" for line in lines) == 1
    # What others print stands above the table, once and whole.
    table = lines.index(steps[0])
    for text in ("a line on standard output", "a line of a handler that was made before"):
        assert [i < table for i, line in enumerate(lines) if line == text] == [True]
    assert sum("UserWarning: a warning" in line for line in lines[:table]) == 1
    if how == "catch":
        assert lines[-2:] == ["standard output is the one before: True", "END"]
    if how == "SIGINT":
        assert "KeyboardInterrupt" in lines
    if how == "finish":
        assert lines[-1] == "END"
