"""`trl-grpo-ext recipe`: the recipes that come with the package, from a wheel or a checkout.

trl-grpo-ext recipe                                    # which there are
trl-grpo-ext recipe helpful --max_steps 50             # the same as `accelerate launch recipes/helpful.py ...`
trl-grpo-ext recipe helpful --copy_to mine             # to change it: `accelerate launch mine/helpful.py`
"""

import ast
import importlib.util
import os
import runpy
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..host.sources import recipes_of
from .flags import config_of, meant
from .launch import EPILOG, is_launched, launch
from .script import check_parsed, recipe_parser

PROG = "trl-grpo-ext recipe"


def folder() -> Path:
    """Where the recipes are."""
    return recipes_of(Path(__file__).parents[1])


def recipes() -> dict[str, Path]:
    """The recipes by name: the scripts with a configuration."""
    found = sorted(folder().glob("*.py"))
    return {path.stem: path for path in found if os.path.exists(config_of(path))}


def main(flags: Sequence[str] | None = None) -> int:
    """List the recipes, or run or copy the one that the flags begin with."""
    flags = list(sys.argv[1:] if flags is None else flags)
    known = recipes()
    if not flags or flags[0] in ("-h", "--help"):
        print(_listing(known))
        return 0
    name, *rest = flags
    if name not in known:
        print(f"{PROG}: error: {name!r} is no recipe{meant(name, known)}", file=sys.stderr)
        return 2
    if rest and rest[0].partition("=")[0] in ("--copy_to", "--copy-to"):
        return _copy(known[name], [word for word in [*rest[0].split("=", 1)[1:], *rest[1:]] if word])
    if is_launched():
        sys.argv[:] = [str(known[name]), *rest]
        runpy.run_path(str(known[name]), run_name="__main__")
        return 0
    try:
        arguments = arguments_of(known[name])
    except ModuleNotFoundError as error:
        needs = "reasoning" if name == "reasoning" else "recipes"
        print(f'{PROG} {name}: error: {error}: pip install "trl-grpo-ext[{needs}]"', file=sys.stderr)
        return 2
    parser = recipe_parser(arguments, str(known[name]), prog=f"{PROG} {name}", epilog=EPILOG)
    return launch([str(known[name])], parser, rest, check_parsed)


def _listing(known: dict[str, Path]) -> str:
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {_first_line(path)}" for name, path in known.items()]
    usage = f"usage: {PROG} NAME [flags]\n       {PROG} NAME --copy_to FOLDER"
    presets = ", ".join(sorted(path.name for path in (folder() / "configs" / "presets").glob("*.yaml")))
    tail = f"They are in {folder()}. Settings for --config presets/...:\n  {presets}"
    return "\n".join([usage, "", *lines, "", tail])


def _first_line(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def arguments_of(script: Path) -> type:
    """The dataclass of a recipe's own arguments: what its `main` takes first."""
    spec: Any = importlib.util.spec_from_file_location(f"trl_grpo_ext_recipe_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for the names in its annotations
    spec.loader.exec_module(module)
    arguments: type = next(iter(typing.get_type_hints(module.main).values()))
    return arguments


def _copy(script: Path, folders: list[str]) -> int:
    if len(folders) != 1:
        print(f"{PROG} {script.stem}: error: --copy_to takes one folder and nothing else", file=sys.stderr)
        return 2
    target = Path(folders[0])
    for source in (script, Path(config_of(script))):
        copy = target / source.relative_to(script.parent)
        if copy.exists():
            print(f"{PROG} {script.stem}: error: {copy} exists: name another folder", file=sys.stderr)
            return 2
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        print(copy)
    print(f"Change them, then: accelerate launch {target / script.name}")
    return 0
