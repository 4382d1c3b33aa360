"""A script on the processes that the launcher's flags name, as `trl grpo --num_processes 8` starts its own."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .flags import FlagParser

EPILOG = "Flags of `accelerate launch`, such as --num_processes, and TRL's --accelerate_config go to the launcher."


def is_launched() -> bool:
    """Whether this process was started by `accelerate launch` or `torchrun`."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


def use_all_cores() -> None:
    """
    Give a single process on a CPU a thread for each core that it may run on.

    Where nothing else is said, `accelerate launch` leaves one thread to each process. Without the launcher, or with
    several processes or a GPU, the threads stay as they are; so `OMP_NUM_THREADS=1 python recipes/helpful.py` keeps to
    one core.
    """
    is_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if is_alone and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def launcher_flags() -> list[str]:
    """What goes to the launcher, where the script has no flag of that name."""
    return [*launch_command_parser()._option_string_actions, "--accelerate_config"]


def launch(
    target: Sequence[str],
    parser: FlagParser,
    flags: Sequence[str],
    check: Callable[[list[Any]], None] = lambda parsed: None,
) -> int:
    """
    Start a script with those flags that its parser knows. The others go to `accelerate launch`.

    Args:
        target (`Sequence[str]`):
            The script: its path, or `-m` and the name of its module.
        parser ([`~trl_grpo_ext.recipe.flags.FlagParser`]):
            The script's own. What is wrong ends here in one line, before a process is started.
        flags (`Sequence[str]`):
            Flags of both.
        check (`Callable`, *optional*):
            Raises `ValueError` for parsed arguments that cannot be.

    Returns:
        `int`: the exit status of the script.
    """
    with warnings.catch_warnings():  # the script gives them, when it parses the same flags
        warnings.simplefilter("ignore")
        parsed, of_file, of_line = parser.parse_with_others(flags, launcher_flags())
    launcher = launch_command_parser()
    launcher.prog, launcher.error = parser.prog, parser.error
    with parser.in_one_line():
        check(parsed)
        given = resolve_accelerate_config_argument(_of_file(launcher, of_file) + _words(of_line))
    try:
        launch_command(launcher.parse_args([*given, *target, *_without(flags, of_line)]))
    except CalledProcessError as failed:  # whose process said why
        return failed.returncode
    except ChildFailedError as failed:
        print(failed)
        return int(failed.get_first_failure()[1].exitcode) or 1
    return 0


def _of_file(launcher: Any, flags: Sequence[str]) -> list[str]:
    """Flags from pairs of a YAML file: one that takes no value is there or not."""
    words: list[str] = []
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        action = launcher._option_string_actions.get(flag)
        if action is not None and action.nargs == 0:
            words += [flag] if value == "True" else []
        else:
            words += [flag, value]
    return words


def _words(flags: Sequence[str]) -> list[str]:
    """`--flag=value` as two words, which is how TRL looks for `--accelerate_config`."""
    return [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]


def _without(flags: Sequence[str], others: Sequence[str]) -> list[str]:
    """`flags` without `others`, which are some of them in their order."""
    waiting = deque(others)
    return [flag for flag in flags if not (waiting and waiting[0] == flag and waiting.popleft() == flag)]
