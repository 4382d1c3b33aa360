"""`trl-grpo-ext COMMAND ...`, or `python -m trl_grpo_ext COMMAND ...`. A command is imported when it is asked for."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from .host.nearest import nearest

PROG = "trl-grpo-ext"
# Name -> ("module:function", what it does). The function takes the flags after the name and returns the exit status.
COMMANDS = {
    "grpo": ("trl_grpo_ext.recipe.grpo:main", "train as `trl grpo` does: its flags and YAML, and all of this package"),
    "recipe": ("trl_grpo_ext.recipe.shipped:main", "list the recipes, run one, or copy one to change it"),
    "check": ("trl_grpo_ext.recipe.run_check.command:main", "would this run learn, and what would it cost?"),
    "machine": ("trl_grpo_ext.recipe.check:main", "does the package work on this machine, with this launcher?"),
    "report": ("trl_grpo_ext.observe.report.__main__:command", "write the report of a run, compare two, or list them"),
}
BESIDES = ("trl", "transformers", "accelerate", "torch")  # what `--version` names, too: an error report needs them


def usage() -> str:
    """What is printed without a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = f"usage: {PROG} COMMAND [flags]\n       {PROG} --version"
    return "\n".join([head, "", *lines, "", f"{PROG} COMMAND --help lists the flags of a command."])


def versions() -> str:
    """One line: the version of this package, and of what it stands on."""
    package = importlib.import_module(__package__ or "trl_grpo_ext")
    return f"{PROG} {package.__version__} ({', '.join(f'{name} {_version(name)}' for name in BESIDES)})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def main(flags: Sequence[str] | None = None) -> int:
    """Run the command that the flags begin with; by default, those of the command line. 2 where there is no such."""
    name, *rest = [*(sys.argv[1:] if flags is None else flags)] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(versions())
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS, cutoff=0.5)
        remedy = f"did you mean {near}?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"{PROG}: error: {name!r} is no command: {remedy}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")
    status: int = getattr(importlib.import_module(module), function)(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
