"""The rooms of the package: imports point one way, modules form no circle, and features stand on public ground."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_grpo_ext"  # the source: a wheel also holds the recipes, which are no room
# Each room may import from those before it.
ROOMS = ["config", "host", "hooks", "rewards", "plan", "shape", "credit", "rollouts", "compute", "observe"]
ROOMS += ["trainer", "recipe"]


def modules() -> dict[str, Path]:
    """The path of every module, by its name inside the package; a room has that of its `__init__`."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in paths.items()}


def imports_of(source: str, name: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of ours that a module imports anywhere: at its top, in a function, or for types alone."""
    here = name.split(".") if name else []
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            up = node.level - is_package
            base = [PACKAGE.name, *here[: len(here) - up], *(node.module or "").split(".")]
            targets = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, inside = target.partition(".")
            if top == PACKAGE.name:
                found.add(inside if inside in known else inside.rpartition(".")[0])
    return found


@cache
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", set(known))
        for name, path in known.items()
        if name
        not in ("", "__main__")  # the top imports names of every room when they are asked for, and so do commands
    }


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports from a later room, or from the top of the package, which knows every room."""
    order = {room: position for position, room in enumerate(ROOMS)}
    return sorted(
        f"{name} imports {target or 'the top'}"
        for name, targets in imports.items()
        for target in targets
        if order.get(target.partition(".")[0], len(ROOMS)) > order[name.partition(".")[0]]
    )


def circles(imports: dict[str, set[str]]) -> list[str]:
    """A walk along the imports that comes back, for each module that closes one."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(imports.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(imports):
        visit(name, [])
    return found


def test_each_room_is_known_and_the_top_is_short():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert entries == {"config.py", "__main__.py", *ROOMS[1:]}
    assert len(entries) <= 13


def test_the_command_line_imports_what_is_light_before_a_command_is_given():
    source = (PACKAGE / "__main__.py").read_text(encoding="utf-8")
    assert imports_of(source, "__main__", False, set(modules())) == {"host.nearest"}


def test_no_module_of_the_rewards_is_long():
    paths = [path for name, path in modules().items() if name.startswith("rewards")]
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 400 for path in paths)


def test_imports_point_to_earlier_rooms():
    assert upward(arrows()) == []


def test_no_module_imports_itself_on_a_detour():
    assert circles(arrows()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..trainer.adaptive import AdaptiveGRPOTrainer", {"trainer.adaptive"}),
        ("def f():\n    from .. import recipe", {"recipe"}),
        ("if TYPE_CHECKING:\n    import trl_grpo_ext.observe.kl", {"observe.kl"}),
        ("from trl_grpo_ext import observe, GRPOCallback", {"observe", ""}),
        ("from . import sampler\nfrom .sizes import fit_group_sizes", {"plan.sampler", "plan.sizes"}),
        ("import torch\nfrom trl.trainer import grpo_trainer", set()),
    ],
)
def test_every_kind_of_import_is_read(source, expected):
    assert imports_of(source, "plan.planner", False, set(modules())) == expected
    is_upward = any(not target or target.partition(".")[0] in ("trainer", "recipe", "observe") for target in expected)
    assert bool(upward({"plan.planner": expected})) == is_upward


def test_circles_are_found():
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


@pytest.mark.parametrize(
    "private", [r"\btrainer\._(?!_)\w+", r"getattr\(\s*(?:self\.)?trainer, \"_", r"\bself\._pending\w*"]
)
def test_features_ask_the_trainer_for_public_names_only(private):
    found = [
        f"{name}: {match}"
        for name, path in modules().items()
        if name.partition(".")[0] not in ("", "trainer", "host")
        for match in re.findall(private, path.read_text(encoding="utf-8"))
    ]
    assert found == []
