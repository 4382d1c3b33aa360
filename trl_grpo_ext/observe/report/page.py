"""Assembles the page: a fixed template, and one block of data that its script renders as text."""

import base64
import dataclasses
import hashlib
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...host.checkpoints import write_whole
from .completions import read_groups
from .escaping import json_for_html
from .figures import Axis, Panel, axes_of, panels_of, run_names
from .held_out import MAX_ANSWERS, answers_of, table_of
from .pictures import write_pngs
from .reader import Run, read_run
from .summary import compare_configurations, configuration, headline, shown
from .tasks import HEADS, task_table

MAX_COMPLETIONS = 2000
MAX_ALARMS = 200  # in the table


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    compare: str | Path | None = None,
    max_completions: int = MAX_COMPLETIONS,
) -> Path:
    """
    Write the report of a run: one page that needs no network, and its plots as PNG files next to it.

    Args:
        run_dir (`str` or `Path`):
            `output_dir` of the run, which may be in progress or interrupted.
        output (`str` or `Path`, *optional*):
            File (`.html`) or folder to write; defaults to `report.html` in `run_dir`. The PNG files go into a folder
            of the same name with `_figures` at the end, if matplotlib is installed.
        compare (`str` or `Path`, *optional*):
            `output_dir` of another run to show beside it.
        max_completions (`int`, *optional*, defaults to `2000`):
            How many completions the page holds at most.

    Returns:
        `Path`:
            The page.

    Raises:
        [`NotARunError`]: when a folder holds nothing that a run writes.
    """
    if max_completions < 1:
        raise ValueError(f"max_completions={max_completions} leaves no room for a completion: pass at least 1")
    runs = [read_run(folder) for folder in (run_dir, compare) if folder is not None]
    page = Path(run_dir) / "report.html" if output is None else Path(output)
    page = page if page.suffix.lower() in (".html", ".htm") else page / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    axes, panels = axes_of(runs), panels_of(runs)
    html = render(page_data(runs, axes, panels, max_completions)).encode()
    write_whole(page, lambda file: file.write(html))  # in place of a link, and not through it
    try:
        write_pngs(panels, axes, page.with_name(f"{page.stem}_figures"))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
    return page


def render(data: dict[str, Any]) -> str:
    """The page for what [`page_data`] returns."""
    folder = files(__package__)
    parts = {name: (folder / f"report.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # Only this script and these styles may run, whatever else may find its way into the page.
    page = parts["html"]
    for name in ("css", "js"):
        digest = base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode()
        page = page.replace(f"@{name}-hash@", f"sha256-{digest}").replace(f"@{name}@", parts[name])
    return page.replace("@data@", json_for_html(data))


def page_data(runs: list[Run], axes: list[Axis], panels: list[Panel], max_completions: int) -> dict[str, Any]:
    """Everything on the page, as plain data."""
    names = run_names(runs)
    shown_runs = []
    for run, name in zip(runs, names, strict=True):
        columns, groups, note = read_groups(run, max_completions // len(runs))
        changed, others = configuration(run)
        versions = run.info.get("versions")
        facts = {"model": run.info.get("model"), "processes": run.info.get("num_processes")}
        facts["reward weights"] = run.reward_weights and dict(zip(run.function_names, run.reward_weights, strict=True))
        shown_runs.append(
            {
                "name": name,
                "folder": str(run.folder),
                "headline": headline(run),
                "notes": run.notes,
                "tasks": task_table(run),
                "alarms": run.alarms[-MAX_ALARMS:][::-1],
                "alarms_left_out": max(0, len(run.alarms) - MAX_ALARMS),
                "held_out": held_out_of(run),
                "columns": columns,
                "groups": groups,
                "groups_note": note,
                "changed": changed,
                "unchanged": others,
                "facts": [[key, shown(value)] for key, value in facts.items() if value],
                "versions": [[key, shown(value)] for key, value in versions.items()]
                if isinstance(versions, dict)
                else [],
            }
        )
    return {
        "task_heads": HEADS,
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs": shown_runs,
        "axes": [dataclasses.asdict(axis) for axis in axes],
        "panels": [dataclasses.asdict(panel) for panel in panels if not panel.constant],
        "constants": [panel.constant for panel in panels if panel.constant],
        "differences": compare_configurations(*runs) if len(runs) > 1 else [],
    }


def held_out_of(run: Run) -> dict[str, Any] | None:
    """The section on held-out prompts; nothing where there are not two evaluations."""
    found = run.held_out
    if len(found.steps) < 2:
        return None
    answers = answers_of(found)
    notes = [f"Evaluated at the steps {_listed(found.steps)}."]
    if found.kept is not None and found.kept in found.values:
        notes.append(f"The weights of step {found.kept}, the best, were restored at the end.")
    if len(answers) == MAX_ANSWERS:
        notes.append(f"Of the answers, the first {MAX_ANSWERS} are shown.")
    if found.broken:
        notes.append(f"{found.broken} lines could not be read and are left out.")
    return {
        "first": found.steps[0],
        "last": found.last,
        "table": table_of(found),
        "answers": answers,
        "note": " ".join(notes),
    }


def _listed(steps: list[int]) -> str:
    texts = [str(step) for step in (steps if len(steps) <= 12 else [*steps[:6], *steps[-5:]])]
    return ", ".join(texts[:6] + (["…"] if len(steps) > 12 else []) + texts[6:])
