"""
Tables of the docs that are written from the code, so that a person reads each fact in one place.

    python docs/tables.py

writes the options of `AdaptiveGRPOConfig` into `docs/options.md`, and what callbacks declare in `conflicts` into
`docs/compatibility.md`. `tests/test_docs.py` fails where a page says anything else.
"""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from trl import GRPOConfig

import trl_grpo_ext
from trl_grpo_ext import AdaptiveGRPOConfig, GRPOCallback
from trl_grpo_ext.hooks.conflicts import FACTS

DOCS = Path(__file__).parent

# First option of each section -> what stands above it. A new option joins the section before it.
SECTIONS = {
    "group_size": "[Adaptive group size](group_size.md)",
    "baseline": "[Fewest rollouts](efficient.md)",
    "dynamic_sampling_rounds": "[Dynamic sampling](dynamic_sampling.md)",
    "reward_clip_range": "[Reward clipping](reward_clipping.md)",
    "curriculum": "[Curricula](curriculum.md)",
    "task_column": "[Several tasks](tasks.md)",
    "share_prompts": "[Less compute](compute.md)",
    "rollout": "[Conversations](multi_turn.md), [plans](hierarchical.md)",
    "kl_target": "[Adaptive KL](adaptive_kl.md)",
    "monitor": "[Monitoring](monitoring.md)",
    "eval_metrics": "[Held-out evaluation](evaluation.md)",
}

# Class -> arguments to construct it with. A class that is not here is constructed with its defaults.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "AdaptiveKLCallback": [{"kl_target": 0.05}],
    "MultiTurnCallback": [{"history": "shared"}, {"history": "independent"}],
    "ReuseGuardCallback": [{"limit": 0.05}],
    "RewardClipCallback": [{"clip_range": [-1.0, 1.0], "on": "total"}],
    "StagedCurriculumCallback": [{"column": "difficulty"}],
    "TargetCurriculumCallback": [{"column": "difficulty"}],
    "TaskAdvantagesCallback": [{"column": "task"}],
    "TaskCallback": [{"column": "task"}],
    "TaskMixingCallback": [{"column": "task"}],
}


def options() -> list[dataclasses.Field[Any]]:
    """The fields that [`AdaptiveGRPOConfig`] adds to TRL's configuration."""
    fields = dataclasses.fields(AdaptiveGRPOConfig)
    return [option for option in fields if option.name not in GRPOConfig.__dataclass_fields__]


def options_table() -> str:
    """Every option with its default and its `help`, word for word."""
    lines = ["| option | default | what it does |", "| --- | --- | --- |"]
    for option in options():
        if option.name in SECTIONS:
            lines.append(f"| **{SECTIONS[option.name]}** | | |")
        help_text = option.metadata["help"].replace("<", "&lt;").replace("|", "\\|")
        lines.append(f"| `{option.name}` | {default_of(option)} | {help_text} |")
    return "\n".join(lines)


def default_of(option: dataclasses.Field[Any]) -> str:
    """A default as YAML writes it; `unset` where there is none."""
    value = option.default if option.default is not dataclasses.MISSING else option.default_factory()  # type: ignore[misc]
    return "unset" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def callback_classes() -> list[type[GRPOCallback]]:
    """Every class of callback that the package defines, by name."""
    for module in pkgutil.walk_packages(trl_grpo_ext.__path__, "trl_grpo_ext."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, new = set(), [GRPOCallback]
    while new:
        new = [child for cls in new for child in cls.__subclasses__() if child.__module__.startswith("trl_grpo_ext.")]
        found |= set(new)
    return sorted(found, key=lambda cls: cls.__name__)


def conflicts() -> dict[str, list[str]]:
    """Each callback, and what it declares that it cannot be combined with."""
    found: dict[str, list[str]] = {}
    for cls in callback_classes():
        for arguments in ARGUMENTS.get(cls.__name__, [{}]):
            others = [conflict.other for conflict in cls(**arguments).conflicts]
            shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if isinstance(value, str))
            if others:
                found[f"{cls.__name__}({shown})" if shown else cls.__name__] = others
    return found


def conflicts_table() -> str:
    """A line for each callback that cannot be combined with everything."""
    lines = ["| callback | not with |", "| --- | --- |"]
    for name, others in conflicts().items():
        lines.append(f"| `{name}` | {', '.join(map(as_code, others))} |")
    return "\n".join(lines)


def as_code(other: str) -> str:
    """Hooks, classes and arguments as code; other facts of a run in words."""
    return f"`{other}`" if "_" in other or other not in FACTS else other


TABLES = {
    "options.md": ("options", options_table),
    "compatibility.md": ("conflicts", conflicts_table),
}


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table between its marks."""
    begin, end = f"<!-- {name}: written by docs/tables.py -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"The page has no marks for {name}: write {begin!r} and {end!r} into it")
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for file, (name, make) in TABLES.items():
        path = DOCS / file
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
