"""Reads `held_out.jsonl`: what each evaluation measured of each held-out prompt, and the answers before and after."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..paired import Difference, paired
from ..record import HELD_OUT, MAX_STEP, is_number, read_lines

MAX_MEASURES, MAX_NAME = 32, 200
MAX_ANSWERS = 300  # on the page
MAX_CHARACTERS = 4000  # of one question or answer on the page
TOTAL = "total"
VERDICTS = {"up": "risen", "down": "fallen", "flat": "within the noise", "few": "too few prompts"}

Prompt: TypeAlias = tuple[str, int]  # dataset and position in it
Key: TypeAlias = tuple[str, int, int, int]  # with sample and turn


@dataclass
class HeldOutRun:
    """
    The held-out evaluations of a run.

    Args:
        values (`dict[int, dict[str, dict[Prompt, float]]]`):
            For each step, and each measure, the mean score of each prompt.
        answers (`dict[int, dict[Key, tuple]]`):
            For the first step, and the last or the one that was kept: question, answer and total of each answer.
        kept (`int`, *optional*):
            Step whose weights were restored at the end.
        broken (`int`, *optional*, defaults to `0`):
            Lines that could not be read.
    """

    values: dict[int, dict[str, dict[Prompt, float]]] = field(default_factory=dict)
    answers: dict[int, dict[Key, tuple[str, str, float | None]]] = field(default_factory=dict)
    kept: int | None = None
    broken: int = 0

    @property
    def steps(self) -> list[int]:
        """Steps of the evaluations, in their order."""
        return sorted(self.values)

    @property
    def last(self) -> int:
        """Step of the evaluation of the weights that are left."""
        return self.kept if self.kept is not None and self.kept in self.values else self.steps[-1]

    @property
    def measures(self) -> list[str]:
        """What the first evaluation measured, the total first."""
        names = list(self.values[self.steps[0]]) if self.values else []
        return sorted(names, key=lambda name: name != TOTAL)

    def mean(self, step: int, name: str) -> float | None:
        """Mean of a measure over the prompts that have it."""
        found = self.values[step].get(name, {})
        return sum(found.values()) / len(found) if found else None

    def gain(self, name: str, step: int | None = None) -> Difference:
        """By how much a measure differs from the start, in some step or in the last."""
        before, after = (self.values[at].get(name, {}) for at in (self.steps[0], self.last if step is None else step))
        numbers = {prompt: place for place, prompt in enumerate(before)}
        matched = {numbers[prompt]: value for prompt, value in after.items() if prompt in numbers}
        return paired({numbers[prompt]: value for prompt, value in before.items()}, matched)


def read_held_out(folder: Path) -> HeldOutRun:
    """What `held_out.jsonl` in the folder of a run holds; nothing where there is none."""
    found = HeldOutRun()
    sums: dict[int, dict[str, dict[Prompt, list[float]]]] = {}
    for line in read_lines(folder / HELD_OUT, folder):
        step = None if line is None else _count(line.get("step"))
        if line is None or step is None:
            found.broken += 1
        elif "kept" in line:
            found.kept = _count(line["kept"])
        elif (key := _key_of(line)) is None or not isinstance(line.get("scores"), dict):
            found.broken += 1
        else:
            of_step = sums.setdefault(step, {})
            for name, value in line["scores"].items():
                name = name[:MAX_NAME] if not key[0] else f"{key[0]}: {name[:MAX_NAME]}"
                if is_number(value) and (name in of_step or len(of_step) < MAX_MEASURES):
                    of_step.setdefault(name, {}).setdefault(key[:2], []).append(float(value))
    found.values = {
        step: {name: {prompt: sum(v) / len(v) for prompt, v in own.items()} for name, own in measures.items()}
        for step, measures in sums.items()
    }
    if found.values:
        _read_answers(found, folder)
    return found


def _read_answers(found: HeldOutRun, folder: Path) -> None:
    """The texts of two of the evaluations, which are too many to keep of all."""
    wanted = {found.steps[0], found.last}
    for line in read_lines(folder / HELD_OUT, folder):
        if line is None or line.get("step") not in wanted or (key := _key_of(line)) is None:
            continue
        scores = line.get("scores")
        total = scores.get(TOTAL) if isinstance(scores, dict) else None
        texts = (_cut(str(line.get("question", ""))), _cut(str(line.get("answer", ""))))
        found.answers.setdefault(int(line["step"]), {})[key] = (*texts, float(total) if is_number(total) else None)


def table_of(found: HeldOutRun) -> list[list[Any]]:
    """A row for each measure: its name, mean at the start and at the end, change, noise, prompts, and a verdict."""
    rows: list[list[Any]] = []
    first = found.steps[0]
    for name in found.measures:
        before, after = found.mean(first, name), found.mean(found.last, name)
        if before is None or after is None:
            continue
        gain = found.gain(name)
        noise = None if gain.high is None else gain.high - gain.mean
        rows.append([name, before, after, gain.mean, noise, gain.count, VERDICTS[gain.direction]])
    return rows


def answers_of(found: HeldOutRun) -> list[list[Any]]:
    """Question, answer and total before, answer and total after, as far as both evaluations have the answer."""
    before, after = found.answers.get(found.steps[0], {}), found.answers.get(found.last, {})
    return [
        [question, answer, total, after[key][1], after[key][2]]
        for key, (question, answer, total) in before.items()
        if key in after
    ][:MAX_ANSWERS]


def _key_of(line: dict[str, Any]) -> Key | None:
    row, sample, turn = (
        _count(line.get(name, default)) for name, default in (("row", None), ("sample", 0), ("turn", 1))
    )
    if row is None or sample is None or turn is None:
        return None
    return str(line.get("dataset", ""))[:60], row, sample, turn


def _count(value: Any) -> int | None:
    return int(value) if is_number(value) and 0 <= value < MAX_STEP else None


def _cut(text: str) -> str:
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]}… [{left} more characters]"
