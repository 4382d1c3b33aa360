"""The recipe that checks a machine: it passes here on two processes, and says so when something is off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "check.py"


def run(launcher: list[str], *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)


@pytest.mark.training
def test_all_is_well_on_two_processes():
    done = run(["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:2] for line in lines[:-1]] == ["ok"] * 6
    assert "of 2" in lines[1]
    assert lines[-1] == "all ok"


@pytest.mark.training
def test_a_difference_above_the_tolerance_fails():
    done = run([], "--checks", "stock", "--tolerance", "-1")
    assert done.returncode == 1
    assert "FAILED weights against stock TRL" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 failed"


def test_unknown_checks_are_refused():
    done = run([], "--checks", "everything")
    assert done.returncode != 0
    assert "checks=['everything'] are unknown: use some of stock, ranks, sharing, resume" in done.stderr
