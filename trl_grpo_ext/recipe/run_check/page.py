"""The page of a check: in the terminal, and as one HTML file that needs no network and no script."""

import base64
import hashlib
import html
import math
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...host.checkpoints import write_whole
from ...observe.held_out import said_last
from ...observe.report.escaping import one_line, visible
from .findings import Finding, percent
from .maths import histogram
from .measured import Measured
from .probes import KINDS

WORDS = {"stop": "Would not learn", "look": "Look at this", "hint": "Would help"}
STYLES = {"stop": "bold red", "look": "bold yellow", "hint": "bold cyan"}
HOW = {"unbiased": "", "fitted": "extrapolated from the pass rates", "at least": "or more"}
BLOCKS = " ▁▂▃▄▅▆▇█"


def verdict_of(found: list[Finding]) -> str:
    """One line that says all."""
    stops = sum(finding.level == "stop" for finding in found)
    looks = sum(finding.level == "look" for finding in found)
    if stops:
        return f"As it is, this run would not learn what it should: {stops} reason{'s' * (stops > 1)} below."
    if looks:
        return f"This run would learn; {looks} thing{'s' * (looks > 1)} should be looked at before it starts."
    return "Nothing is wrong with this run, as far as a few dozen prompts tell."


def facts_of(measured: Measured) -> list[tuple[str, str]]:
    """Lengths, and the plan."""
    facts: list[tuple[str, str]] = []
    setting, plan = measured.setting, measured.plan
    if measured.answers:
        count = f"{len(measured.answers)} answers to {len(measured.groups)} prompts"
        facts.append(("Sampled", f"{count} in {duration(measured.seconds)}, with the update and all checks"))
        facts.append(("End in time", f"{percent(measured.ended)} within {setting.budget} tokens"))
        budgets = {share: measured.budget_for(share) for share in (0.5, 0.8, 0.95)}
        told = [f"{budget} for {percent(share)}" for share, budget in budgets.items() if budget is not None]
        if measured.trial_budget:
            told.append(f"{percent(measured.ended_within(measured.trial_budget))} within {measured.trial_budget}")
        facts.append(("Tokens that are enough", ", ".join(told) or "not known: no answer ended"))
    if measured.update is not None:
        reached = sum(reach.gradient > 0 for reach in measured.update.parameters)
        pulled = sum(reach.num_pulled for reach in measured.update.parameters)
        moved = sum(reach.num_moved for reach in measured.update.parameters) / max(1, pulled)
        made_up = ", with made-up advantages" if measured.update.is_stand_in else ""
        gradient = f"{reached} of {len(measured.update.parameters)} trained parameters{made_up}"
        facts.append(("Gradient reaches", f"{gradient}; an update moves {percent(moved)} of the weights with one"))
    if plan is not None:
        facts.append(("A step", f"{plan.prompts:g} prompts, {plan.rollouts} rollouts"))
        if plan.steps_per_epoch is not None:
            facts.append(("An epoch", f"{plan.steps_per_epoch:.1f} steps"))
        rewards = f"{duration(plan.reward_seconds)} of it rewards"
        parts = f"sampling {duration(plan.sample_seconds)}, {rewards}; update {duration(plan.update_seconds)}"
        facts.append(("Time of a step", f"about {duration(plan.step_seconds)} ({parts})"))
        whole = duration(plan.steps * plan.step_seconds)
        facts.append(("The whole run", f"{plan.steps:.0f} steps, {plan.steps * plan.rollouts:.0f} rollouts, {whole}"))
        where = "of the GPU" if plan.on_gpu else "of the process"
        facts.append(("Memory so far", f"{plan.memory:.1f} GiB {where}, at its peak"))
    return facts


def duration(seconds: float) -> str:
    """
    Seconds as a reader says them.

    Example:

    ```python
    >>> duration(0.0214), duration(75), duration(7300)
    ('0.021 s', '75 s', '2.0 h')

    ```
    """
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.2g} s"


def rates_of(measured: Measured) -> tuple[list[int], float, float]:
    """Histogram of the mean reward of each prompt between the smallest and largest reward."""
    present = [[total for total in group if total is not None] for group in measured.totals]
    flat = [total for group in present for total in group]
    if not flat:
        return [], 0.0, 0.0
    low, high = min(flat), max(flat)
    return histogram([sum(group) / len(group) for group in present if group], low, high), low, high


def number(value: float) -> str:
    """A number for a table; a hyphen where there is none."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def tables_of(measured: Measured) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Title, note, head and rows of each table."""
    tables = []
    if measured.shares:
        rows = [
            [
                f"{share.size}{' (this run)' * (share.size == measured.setting.group_size)}",
                percent(share.share),
                f"{percent(share.low)} to {percent(share.high)}",
                HOW[share.how],
            ]
            for share in measured.shares
        ]
        note = "Expected share of groups whose rewards differ; the others have no gradient."
        tables.append(("Informative groups", note, ["group size", "share", "95 % interval", ""], rows))
    if measured.components:
        head = ["part", "applies", "range", "mean", "spread", "alike"]
        rows = [
            [
                one_line(part.name, 60),
                percent(part.applies),
                f"{number(part.low)} to {number(part.high)}",
                number(part.mean),
                number(part.spread),
                percent(part.constant),
            ]
            for part in measured.components
        ]
        note = "Spread: standard deviation within a prompt. Alike: prompts all of whose answers are paid the same."
        tables.append(("Reward, part by part", note, head, rows))
    if measured.paid:
        names = [part.name for part in measured.components[1:]][:6]
        mine = {part.name: part.mean for part in measured.components}
        rows = [["what the policy wrote", number(mine.get("total", math.nan)), *(number(mine[name]) for name in names)]]
        for paid in measured.paid:
            if paid.error is not None:
                rows.append([KINDS[paid.kind], f"fails: {one_line(paid.error, 60)}", *["" for _ in names]])
            else:
                values = [number(paid.values.get(name, math.nan)) for name in names]
                rows.append([KINDS[paid.kind], number(paid.mean), *values])
        head = ["answer", "total", *(one_line(name, 40) for name in names)]
        tables.append(("What the reward pays for", "Means over a few prompts.", head, rows))
    return tables


def print_page(measured: Measured, found: list[Finding], console: Console | None = None) -> None:
    """Print the page."""
    console = console or Console(width=None if Console().is_terminal else 110)
    console.print(Text(verdict_of(found), style="bold"))
    for finding in found:
        line = Text(f"{WORDS[finding.level]}: {finding.name}", style=STYLES[finding.level])
        line.append(
            Text(
                f": {one_line(finding.what, 600)}. {_sentence(one_line(finding.remedy, 400))}.",
                style="not bold default",
            )
        )
        console.print(line)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts_of(measured):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    bars, low, high = rates_of(measured)
    if bars:
        drawn = "".join(BLOCKS[-(-8 * count // max(bars))] for count in bars)
        console.print(Text(f"Mean reward of a prompt, {number(low)} |{drawn}| {number(high)}"))
    for title, note, head, rows in tables_of(measured):
        table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
        for place, name in enumerate(head):
            table.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def write_page(measured: Measured, found: list[Finding], path: str | Path) -> Path:
    """Write the page as HTML; a folder gets `check.html`."""
    page = Path(path)
    page = page if page.suffix.lower() in (".html", ".htm") else page / "check.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = render(measured, found).encode("utf-8")
    write_whole(page, lambda file: file.write(text))
    return page


def render(measured: Measured, found: list[Finding]) -> str:
    """The page. Every text in it is escaped, and no script may run."""
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    kind = next((finding.level for finding in found if finding.level != "hint"), "good")
    parts = [f'<h1>Check before training</h1><p class="verdict {kind}">{_e(verdict_of(found))}</p>']
    for finding in found:
        parts.append(
            f'<section class="card {finding.level}"><h2>{_e(WORDS[finding.level])}: {_e(finding.name)}</h2>'
            f"<p>{_e(_sentence(finding.what))}.</p><p><b>What to do:</b> {_e(finding.remedy)}.</p></section>"
        )
    facts = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in facts_of(measured))
    parts.append(f'<h2>Numbers</h2><dl class="facts">{facts}</dl>')
    parts.append(_bars(*rates_of(measured)))
    for title, note, head, rows in tables_of(measured):
        first = "".join(f'<th scope="col">{_e(name)}</th>' for name in head)
        body = "".join(f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(
            f'<h2>{_e(title)}</h2><p class="quiet">{_e(note)}</p><div class="scroll"><table><thead><tr>{first}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>"
        )
    parts.append(_samples(measured))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Check before training</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _e(text: str) -> str:
    return html.escape(visible(text))


def _bars(counts: list[int], low: float, high: float) -> str:
    if not counts:
        return ""
    most, width = max(counts), 32
    drawn = "".join(
        f'<rect x="{place * width + 1}" y="{100 - 90 * count / most:.1f}" width="{width - 2}" '
        f'height="{90 * count / most:.1f}"><title>{count} prompts</title></rect>'
        for place, count in enumerate(counts)
    )
    size = len(counts) * width
    label = f"Histogram of the mean reward of {sum(counts)} prompts: {', '.join(map(str, counts))}"
    return (
        f'<h2>Mean reward of a prompt</h2><p class="quiet">{sum(counts)} prompts. Where rewards are 0 or 1, one at '
        "either end teaches nothing.</p>"
        f'<svg class="bars" viewBox="0 0 {size} 118" role="img" aria-label="{_e(label)}">{drawn}'
        f'<line x1="0" y1="100" x2="{size}" y2="100"/><text x="0" y="114">{_e(number(low))}</text>'
        f'<text x="{size}" y="114" text-anchor="end">{_e(number(high))}</text></svg>'
    )


def _samples(measured: Measured, most: int = 6) -> str:
    """An answer to each of some prompts."""
    shown = []
    for group in measured.groups[:most]:
        answer = group[0]
        head = f"{number(math.nan if answer.total is None else answer.total)} · {answer.length} tokens"
        head += "" if answer.ended else ", cut"
        shown.append(
            f"<details><summary>{_e(one_line(said_last(answer.prompt), 120))}</summary>"
            f'<p class="quiet">{_e(head)}</p><pre>{_e(answer.text[:4000])}</pre></details>'
        )
    return f"<h2>Some answers</h2>{''.join(shown)}" if shown else ""
