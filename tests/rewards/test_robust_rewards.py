"""Rewards that are slow, fail, crash or answer nonsense cost their own row, and everything is counted."""

import asyncio
import ctypes
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import ROOT
from reward_helpers import Logs, ask, is_async_callable, settle

from trl_grpo_ext.rewards import Length, RewardError, as_reward, at_end
from trl_grpo_ext.rewards.guards import Guard
from trl_grpo_ext.rewards.scoring import number_or_problem

# --- async rewards ----------------------------------------------------------------------------------------------------

GARBAGE = ["seven", math.nan, -math.inf, 10**400, 1e39, [1.0], object(), 1 + 2j, np.float64("nan")]
attempts = st.one_of(
    st.floats(-1e6, 1e6), st.none(), st.sampled_from(["raise", "hang", "cancel"]), st.sampled_from(GARBAGE)
)


class Script:
    """A judge that does with each row what its script says, one entry for each attempt."""

    __name__ = "script"

    def __init__(self):
        self.attempt = Counter()
        self.active = self.most = 0

    async def __call__(self, completions, script, **kwargs):
        assert len(completions) == len(script) == 1
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            what = script[0][self.attempt[completions[0]]]
            self.attempt[completions[0]] += 1
            if what == "raise":
                raise ConnectionError("the server is gone \udcff")
            if what == "cancel":
                raise asyncio.CancelledError
            if what == "hang":
                await asyncio.Event().wait()
            return [what]
        finally:
            self.active -= 1


def expected(script, retries):
    """The value of a row and what is counted, by hand."""
    tally = Counter()
    for attempt, what in enumerate(script[: retries + 1]):
        if what is None or (isinstance(what, float) and math.isfinite(what) and abs(what) < 1e38):
            return what, tally
        kinds = {"raise": "failures", "cancel": "failures", "hang": "timeouts"}
        tally[kinds.get(what, "garbage") if isinstance(what, str) else "garbage"] += 1
        tally["retries"] += attempt < retries
    tally["errors"] += 1
    return None, tally


@given(st.lists(st.lists(attempts, min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 2))
@settings(max_examples=60)
def test_every_row_gets_its_value_and_everything_is_counted(scripts, retries):
    judge, logs = Script(), Logs()
    reward = as_reward(judge).timeout(0.02).retry(retries, wait=0.0)
    rows = [str(row) for row in range(len(scripts))]
    values = ask(reward, *rows, script=scripts, **logs.kwargs())
    by_hand = [expected(script, retries) for script in scripts]
    assert values == [value for value, _ in by_hand]
    tally = sum((counts for _, counts in by_hand), Counter())
    assert {name.rpartition("/")[2]: value for name, value in dict(logs.metrics).items()} == {
        name: float(tally[name]) for name in ("errors", "failures", "timeouts", "garbage", "retries")
    }
    assert tally["failures"] + tally["timeouts"] + tally["garbage"] == tally["retries"] + tally["errors"]
    assert judge.active == 0


@given(st.integers(1, 40), st.integers(1, 20))
@settings(max_examples=20)
def test_no_more_rows_at_once_than_the_limit(num_rows, limit):
    judge = Script()
    rows = [str(row) for row in range(num_rows)]
    reward = as_reward(judge).timeout(0.01).concurrency(limit)
    assert ask(reward, *rows, script=[["hang"]] * num_rows) == [None] * num_rows
    assert judge.most == min(limit, num_rows)


@given(st.integers(1, 10_000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_pauses_grow_up_to_the_longest_and_leave_the_random_numbers_of_the_training_alone(attempt, one, other):
    wait, max_wait = sorted([one, other])
    before = random.getstate()
    pause = Guard(wait=wait, max_wait=max_wait).pause(attempt)
    assert 0 <= pause <= min(max_wait, wait * 2.0 ** min(attempt - 1, 1000))
    assert random.getstate() == before


async def stubborn(completions, **kwargs):
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(60)  # it does not let itself be cancelled


def test_a_judge_that_cannot_be_cancelled_holds_nobody_up():
    async def score():
        start = time.perf_counter()
        values = await as_reward(stubborn).timeout(0.05)(prompts=["p"] * 3, completions=["a"] * 3)
        seconds = time.perf_counter() - start
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return values, seconds

    values, seconds = asyncio.run(score())
    assert values == [None] * 3
    assert seconds < 30


async def wordy(completions, log_metric, log_extra, **kwargs):
    await asyncio.sleep(0.03 if completions[0] == "slow" else 0)
    if completions[0] == "bad":
        raise ValueError("bad")
    log_extra("verdict", [f"{completions[0]} indeed"])
    return [1.0]


def test_columns_of_the_completions_table_keep_their_rows():
    logs = Logs()
    assert ask(as_reward(wordy).concurrency(3), "slow", "fast", "bad", **logs.kwargs()) == [1.0, 1.0, None]
    assert logs.columns == [("verdict", ["slow indeed", "fast indeed", None])]


def test_a_failure_raises_when_asked_to():
    judge = Script()
    reward = as_reward(judge).retry(1, wait=0.0).on_error("raise")
    with pytest.raises(RewardError, match=r"'script', row 1: raised ConnectionError: the server is gone"):
        ask(reward, "a", "b", script=[[1.0], ["raise"] * 2])
    assert judge.attempt == {"a": 1, "b": 2}


def test_a_missing_package_is_never_skipped():
    async def needs(completions, **kwargs):
        raise ImportError("no such package")

    with pytest.raises(ImportError, match="no such package"):
        ask(as_reward(needs).retry(3), "a", "b")


def test_a_sync_reward_is_retried_row_by_row():
    asked = []

    def flaky(completions, **kwargs):
        asked.append(completions[0])
        if len(asked) % 2:
            raise OSError("again")
        return [float(len(asked))]

    logs = Logs()
    assert ask(as_reward(flaky).retry(1, wait=0.0), "a", "b", **logs.kwargs()) == [2.0, 4.0]
    assert asked == ["a", "a", "b", "b"]
    counts = dict(logs.metrics)
    assert (counts["rewards/flaky/retries"], counts["rewards/flaky/errors"]) == (2.0, 0.0)


def test_with_a_cache_only_what_is_not_known_is_asked_and_errors_are_not_remembered():
    judge = Script()
    reward = as_reward(judge).cached().retry(0)
    assert ask(reward, "a", "b", "a", script=[[1.0, 3.0], ["raise", 2.0], [1.0, 3.0]]) == [1.0, None, 1.0]
    assert ask(reward, "a", "b", script=[[1.0, 3.0], ["raise", 2.0]]) == [1.0, 2.0]
    assert judge.attempt == {"a": 1, "b": 2}


def test_it_composes():
    logs = Logs()
    reward = 2 * as_reward(Script()).retry(0) + Length("characters")
    assert is_async_callable(reward)
    assert ask(reward, "a", "bb", script=[[1.0], ["raise"]], **logs.kwargs()) == [3.0, 2.0]
    assert ("rewards/script/failures", 1.0) in logs.metrics


async def num_messages(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def test_it_works_on_whole_conversations():
    say = lambda role: {"role": role, "content": "Hi"}  # noqa: E731
    history = [say("user"), say("assistant"), say("user")]
    rows = {"prompts": [history[:1], history], "completions": [[say("assistant")]] * 2}
    reward = at_end(as_reward(num_messages)).timeout(60)
    assert settle(reward(**rows, turn=[1, 2], last_turn=[False, True])) == [None, 3.0]


def test_how_it_reads_and_what_it_keeps():
    reward = as_reward(wordy).timeout(5).retry(3, wait=0.5).concurrency(4).on_error("raise")
    assert repr(reward) == "as_reward(wordy).timeout(5.0).retry(3, wait=0.5).concurrency(4).on_error('raise')"
    assert repr(as_reward(wordy).concurrency(16)) == "as_reward(wordy).concurrency(16)"
    assert repr(as_reward(len_of).in_processes(2)) == "as_reward(len_of).in_processes(2, timeout=60.0)"
    assert pickle.loads(pickle.dumps(reward)) == reward != as_reward(wordy)
    assert is_async_callable(reward)
    assert as_reward(wordy).timeout(5).named("other").guard == Guard(timeout=5.0)


def len_of(completions, **kwargs):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: as_reward(wordy).timeout(0), ValueError, r"timeout=0.0 is no time limit"),
        (lambda: as_reward(wordy).timeout(math.nan), ValueError, r"timeout=nan is no time limit"),
        (lambda: as_reward(wordy).retry(-1), ValueError, "times=-1 is negative"),
        (lambda: as_reward(wordy).retry(1, wait=9, max_wait=3), ValueError, r"wait=9.0 must lie in \[0, max_wait=3.0"),
        (lambda: as_reward(wordy).retry(1, max_wait=math.inf), ValueError, "max_wait be finite"),
        (lambda: as_reward(wordy).concurrency(0), ValueError, "limit=0 asks about no row"),
        (lambda: as_reward(len_of).in_processes(0), ValueError, "count=0 scores nothing"),
        (lambda: as_reward(len_of).timeout(1), TypeError, r"'len_of' is not async.*in_processes\(count, timeout=1.0"),
        (lambda: as_reward(len_of).concurrency(1), TypeError, "'len_of' is not async"),
        (lambda: as_reward(wordy).in_processes(1), TypeError, "'wordy' is async"),
        (lambda: as_reward(lambda completions, **kwargs: [0.0]).in_processes(1), TypeError, "at the top of a module"),
        (lambda: (as_reward(wordy) + Length()).timeout(1), TypeError, "'length' is not async"),
    ],
)
def test_mistakes_are_found_at_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


# --- values -----------------------------------------------------------------------------------------------------------


class Odd:
    def __repr__(self):
        raise RuntimeError("no repr")


@given(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.fractions(), st.decimals(), st.complex_numbers(),
        st.text(), st.binary(), st.lists(st.floats(), max_size=2), st.floats(width=32).map(torch.tensor),
        st.floats().map(np.float64), st.sampled_from([10**5000, Odd(), torch.zeros(2), np.array("x"), type, {}]),
    )
)  # fmt: skip
def test_a_value_is_a_finite_float32_or_none_or_an_error_of_its_row(value):
    number, problem = number_or_problem(value)
    if number is not None:
        assert problem is None
        assert torch.tensor(number, dtype=torch.float32).isfinite()
    values = ask(as_reward(lambda completions, **kwargs: [value, 1.0], name="any").on_error("skip"), "a", "b")
    assert values == [number, 1.0]


# --- processes --------------------------------------------------------------------------------------------------------


def misbehave(completions, **kwargs):
    """What the completion says."""
    (what,) = completions
    assert "RANK" not in os.environ
    if what == "loop":
        while True:
            pass
    if what == "segfault":
        ctypes.string_at(0)
    if what == "quit":
        os._exit(3)
    if what == "exit":
        sys.exit("enough")
    if what == "raise":
        raise KeyError("raised")
    if what == "children":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(kwargs["folder"][0], "pid").write_text(str(child.pid))
        time.sleep(600)
    if what == "pid":
        return [os.getpid()]
    return ["nonsense"] if what == "garbage" else [float(len(what))]


def run_it(completions, **kwargs):
    """As a reward for code does."""
    for completion in completions:
        exec(completion, {})
    return [1.0] * len(completions)


async def run_it_later(completions, **kwargs):
    return run_it(completions)


ANSWERS = ["import not_there", "from math import nothing", "import json", "1 / 0"]


@pytest.mark.parametrize(
    "reward",
    [
        as_reward(run_it).in_processes(1),
        as_reward(run_it).in_processes(2).retry(1, wait=0.0).on_error("skip"),
        as_reward(run_it).retry(0),
        as_reward(run_it_later).timeout(60),
    ],
)
def test_what_an_answer_imports_is_its_own_affair(reward):
    assert ask(reward, *ANSWERS) == [None, None, 1.0, None]


def test_an_answer_that_imports_what_is_not_there_is_no_missing_package():
    assert ask(as_reward(run_it).on_error("skip"), ANSWERS[0]) == [None]
    assert ask(as_reward(run_it_later).on_error("skip"), ANSWERS[0]) == [None]
    with pytest.raises(RewardError, match="raised ModuleNotFoundError: No module named 'not_there'"):
        ask(as_reward(run_it), ANSWERS[0])


def lacks_a_package(completions, **kwargs):
    import not_there_either  # noqa: F401


@dataclasses.dataclass
class Judge:
    """Its `__init__` is made of a string, by dataclasses."""

    def __post_init__(self):
        import not_there_either  # noqa: F401


def makes_a_judge(completions, **kwargs):
    Judge()


def in_a_notebook():
    """A reward of a cell, whose code has no file either, but a module."""
    cell = types.ModuleType("cell")
    sys.modules["cell"] = cell
    code = "def of_a_cell(completions, **kwargs):\n    import not_there_either\n"
    exec(compile(code, "<ipython-input-3-abc>", "exec"), cell.__dict__)
    return cell.of_a_cell


@pytest.mark.parametrize("function", [makes_a_judge, in_a_notebook()])
def test_code_without_a_file_is_not_always_that_of_an_answer(function):
    for reward in (as_reward(function).on_error("skip"), as_reward(function).retry(0)):
        with pytest.raises(ImportError, match="not_there_either"):
            ask(reward, "a")


@pytest.mark.parametrize("how", ["exec(code)", "exec(code, {})", "exec(code, {'__name__': '__main__'})"])
def test_an_answer_is_told_however_it_is_run(how):
    def run(completions, **kwargs):
        for code in completions:  # noqa: B007
            eval(how)
        return [1.0]

    assert ask(as_reward(run).on_error("skip"), "import not_there") == [None]
    assert ask(as_reward(run).on_error("skip"), "def f():\n    import not_there\nf()") == [None]
    assert ask(as_reward(run).on_error("skip"), "__name__ = []\nimport not_there") == [None]


SOLVE = "def solve():\n    import not_there"


@pytest.mark.parametrize(
    "run",
    [
        lambda scope: (exec(SOLVE, globals(), scope), scope["solve"]()),
        lambda scope: (exec(SOLVE, scope), scope["solve"]()),
        lambda scope: eval("lambda: __import__('not_there')")(),
    ],
)
def test_an_answer_is_told_when_its_function_is_called_later(run):
    def solved(completions, **kwargs):
        run({})

    assert ask(as_reward(solved).on_error("skip"), "a") == [None]


@pytest.mark.parametrize("change", [lambda r: r.on_error("skip"), lambda r: r.retry(2), lambda r: r.in_processes(1)])
def test_a_reward_that_lacks_a_package_stops_the_run(change):
    with pytest.raises(ImportError, match="not_there_either"):
        ask(change(as_reward(lacks_a_package)), "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_has_processes_of_its_own():
    reward = as_reward(misbehave).in_processes(1)
    (before,) = ask(reward, "pid")
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()
    child = context.Process(target=lambda: theirs.send([ask(reward, "pid") for _ in range(3)]))
    child.start()
    assert ask(reward, "pid", "pid") == [before] * 2
    assert ours.poll(120)
    ((first,), (second,), (third,)) = ours.recv()
    assert first == second == third != before
    child.kill()
    child.join()
    assert ask(reward, "pid") == [before]


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    assert condition()


def test_what_a_heavy_reward_does_costs_its_row(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    logs = Logs()
    reward = as_reward(misbehave).in_processes(2, timeout=1.0).retry(1, wait=0.0)
    whats = ["good", "loop", "segfault", "quit", "exit", "raise", "garbage", "children", "fine", "\udcff", "last one"]
    numbers = random.getstate()
    values = ask(reward, *whats, folder=[str(tmp_path)] * len(whats), **logs.kwargs(), trainer_state=threading.Lock())
    assert random.getstate() == numbers
    assert values == [4.0, None, None, None, None, None, None, None, 4.0, 1.0, 8.0]
    assert dict(logs.metrics) == {
        "rewards/misbehave/errors": 7.0,
        "rewards/misbehave/failures": 8.0,
        "rewards/misbehave/timeouts": 4.0,
        "rewards/misbehave/garbage": 2.0,
        "rewards/misbehave/retries": 7.0,
    }
    assert "row 1: no answer within 1 s" in caplog.text
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))
    # Processes are kept, and killed with the reward.
    first, second = ask(reward, "pid"), ask(reward, "pid")
    assert first == second != [os.getpid()]
    del reward
    gc.collect()
    wait_until(lambda: not is_running(int(first[0])))


def test_a_process_that_is_killed_while_it_is_idle_costs_no_row():
    reward = as_reward(misbehave).in_processes(1)
    (first,) = ask(reward, "pid")
    os.kill(int(first), signal.SIGKILL)  # its end of the connection may still be open for a moment
    logs = Logs()
    (second,) = ask(reward, "pid", **logs.kwargs())
    assert second not in (None, first)
    assert ("rewards/misbehave/failures", 0.0) in logs.metrics


def test_the_exit_of_a_process_is_told(caplog):
    reward = as_reward(misbehave).in_processes(1)
    assert ask(reward, "segfault") == [None]
    assert "its process died (SIGSEGV)" in caplog.text
    with pytest.raises(RewardError, match=r"its process died \(exit code 3\)"):
        ask(reward.on_error("raise"), "quit")


def test_a_process_that_cannot_start_stops_the_run_with_one_error(monkeypatch):
    ghost = types.ModuleType("ghost")
    exec("def reward(completions, **kwargs): return [1.0]", ghost.__dict__)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(RuntimeError, match=r"no process for reward 'reward': raised ModuleNotFoundError.*__main__"):
        ask(as_reward(ghost.reward).in_processes(1), "a")


TRAINING = """
import os, sys, time
from trl_grpo_ext.rewards import as_reward

def hang(completions, path, **kwargs):
    with open(path[0] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path[0] + ".new", path[0])
    time.sleep(600)

if __name__ == "__main__":
    as_reward(hang).in_processes(1)(prompts=["p"], completions=["c"], path=[sys.argv[1]])
"""


def test_processes_end_when_the_training_is_killed(tmp_path):
    # The package's own __init__ imports TRL for the trainer, so a stand-in takes its place here.
    (tmp_path / "trl_grpo_ext").mkdir()
    (tmp_path / "trl_grpo_ext" / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'trl_grpo_ext')!r}]")
    (tmp_path / "train.py").write_text(TRAINING)
    path = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    training = subprocess.Popen([sys.executable, str(tmp_path / "train.py"), str(path)], env=environment)
    try:
        wait_until(path.exists, seconds=300)
        worker = int(path.read_text())
        assert is_running(worker)
        os.kill(training.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(worker))
    finally:
        training.kill()
        training.wait()


# --- the soak, short --------------------------------------------------------------------------------------------------


def test_nothing_is_lost_and_everything_counted(tmp_path):
    import judge

    options = judge.Options(smoke=True, timeout=1.0, output_dir=str(tmp_path))
    found = judge.main(options)
    assert found["rows"] == options.rollouts
    assert found["rows with a wrong score"] == 0
    assert found["rows without a score"] == found["logged errors"]
    bad = found["logged failures"] + found["logged timeouts"] + found["logged garbage"]
    assert bad == found["logged retries"] + found["logged errors"]
    # What the judge says it did. A machine that is busy may be too slow for an answer, which is then a timeout.
    server = {name: found.get(f"requests that the judge {name}", 0) for name in ("failed", "hung", "garbage", "scored")}
    assert sum(server.values()) == found["rows"] + found["logged retries"]
    assert 0 < found["logged failures"] <= server["failed"]
    assert 0 < found["logged garbage"] <= server["garbage"]
    assert 0 < server["hung"] <= found["logged timeouts"]
    assert json.loads((tmp_path / "counts.json").read_text()) == found


def test_rows_that_all_stop_the_run_are_told_once(caplog):
    async def needs(completions, turns, **kwargs):
        for _ in range(turns[0]):  # one row after another, while the first error makes its way
            await asyncio.sleep(0)
        raise ImportError("no such package")

    with caplog.at_level("ERROR", logger="asyncio"), pytest.raises(ImportError, match="no such package"):
        ask(as_reward(needs).retry(3), *"abcdefgh", turns=list(range(8)))
    gc.collect()  # where asyncio complains of errors that nobody has seen
    assert "never retrieved" not in caplog.text


def test_a_row_that_is_skipped_is_not_advised_to_be_skipped(caplog):
    def breaks(completions, **kwargs):
        raise ValueError("it broke")

    with pytest.raises(RewardError, match=r"it broke: mend the cause, or leave such rows out"):
        ask(as_reward(breaks).named("breaks"), "a")
    with caplog.at_level("WARNING"):
        assert ask(as_reward(breaks).on_error("skip"), "a") == [None]
    assert "it broke: mend the cause (skipped 1 of 1 rows)" in caplog.text
