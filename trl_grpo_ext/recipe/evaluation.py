"""Held-out results in the terminal: each score before and after, with its noise, and answers side by side."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..observe.held_out import HeldOut
from ..observe.paired import FEW_PROMPTS, NOISE, paired


def print_comparison(
    before: HeldOut, after: HeldOut, num_samples: int = 3, title: str = "Held-out prompts", first: str = "before"
) -> None:
    """
    Print the mean of each score before (a column called `first`) and after, and some answers side by side.

    Each prompt is compared with itself. The column `noise` is twice the standard error of the change, and `beyond`
    says whether the change is larger. Answers of several turns get a table for each turn.
    """
    turns = sorted({turn for _, turn in before.keys})
    if len(turns) <= 1:
        _print_turn(before, after, num_samples, title, first)
        return
    for turn in turns:
        _print_turn(before.of_turn(turn), after.of_turn(turn), num_samples, f"{title}, turn {turn}", first)


def _print_turn(before: HeldOut, after: HeldOut, num_samples: int, title: str, first: str) -> None:
    console = Console(width=None if Console().is_terminal else 110)
    how = "answers" if before.num_prompts < len(before.answers) else "greedy answers"
    table = Table(title=f"{title} ({len(before.answers)}, {how})", title_justify="left")
    table.add_column("")
    for heading in (first, "after", "change", "noise", "beyond"):
        table.add_column(heading, justify="right")
    for name in before.scores:
        old, new = before.mean(name), after.mean(name)
        if math.isnan(old) or math.isnan(new):  # it applies to none of these answers
            continue
        gain = paired(before.per_prompt(name), after.per_prompt(name))
        digits = 1 if abs(old) >= 10 else 3
        noise = f"± {NOISE * gain.error:.{digits}f}" if gain.is_known else ""
        beyond = {"up": "yes", "down": "yes", "flat": "no", "few": f"fewer than {FEW_PROMPTS} prompts"}[gain.direction]
        table.add_row(name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}", noise, beyond)
    console.print(table)
    samples = Table(title="Sample answers", title_justify="left", show_lines=True)
    for heading in ("prompt", first, "after"):
        samples.add_column(heading, ratio=1, overflow="fold")
    # A conversation may have come to this turn once and not the other time.
    later = dict(zip(after.keys, after.answers, strict=True))
    pairs = [
        (question, answer, later[key])
        for key, question, answer in zip(before.keys, before.questions, before.answers, strict=True)
        if key in later
    ]
    for pair in pairs[:: max(1, len(pairs) // num_samples)][:num_samples]:
        samples.add_row(*(Text(text.strip()) for text in pair))  # model output is text, not markup
    console.print(samples)
