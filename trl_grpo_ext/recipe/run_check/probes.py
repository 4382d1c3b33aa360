"""Answers that nobody wants, and what the reward pays for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...hooks.records import Answer
from ...hooks.segments import total_rewards
from ...host.processes import gather_rewards, gather_values
from ...host.seams import drop_pending_logs, pending_columns, plain_rewards
from ...observe.held_out import said_last
from ...trainer.adaptive import AdaptiveGRPOTrainer

Asked = tuple[dict[str, Any], Answer]

# Columns in which references are looked for, in this order.
REFERENCES = ("reference", "answer", "solution", "ground_truth", "gold", "target", "label")
REFUSAL = "I'm sorry, but I can't help with that."
UNWANTED = {
    "empty": "nothing at all",
    "question": "the question, repeated",
    "one_token": "one token, repeated",
    "longest": "an answer repeated up to the budget",
    "refusal": "a refusal",
    "other_reference": "the reference of another prompt",
}
KINDS = {"reference": "the reference itself"} | UNWANTED


@dataclass(frozen=True)
class Paid:
    """
    What the reward pays for one kind of answer.

    Args:
        kind (`str`):
            One of `KINDS`.
        totals (`list[float | None]`):
            Total reward for each prompt, those of all processes.
        values (`dict[str, float]`):
            Mean of each part of the reward.
        error (`str`, *optional*):
            What the reward raised in place of an answer.
    """

    kind: str
    totals: list[float | None] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def mean(self) -> float:
        return mean_of(self.totals)


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of the values that are there; NaN without any."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else math.nan


def reference_column(rows: Sequence[dict[str, Any]], given: str | None = None) -> str | None:
    """
    The column of the references: the one that is named, or the first of the usual ones.

    Raises:
        `ValueError`: where the named one is not there.
    """
    if given is not None:
        if rows and given not in rows[0]:
            raise ValueError(f"reference_column={given!r} is no column: use one of {', '.join(map(repr, rows[0]))}")
        return given
    return next((name for name in REFERENCES if rows and name in rows[0]), None)


def as_text(value: Any) -> str | None:
    """A reference as the text of an answer; `None` where there is none."""
    if isinstance(value, list | tuple) and value:
        value = value[-1].get("content") if isinstance(value[-1], dict) else value[0]
    return None if value is None or isinstance(value, list | tuple | dict) or not str(value).strip() else str(value)


def probe(trainer: AdaptiveGRPOTrainer, asked: Sequence[Asked], column: str | None, most: int = 12) -> list[Paid]:
    """
    Score each kind of answer to prompts of a trial. Every process calls this; all get the same.

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            The trainer.
        asked (`Sequence`):
            This process's sampled answers, each with its row: what the reward reads besides the answer.
        column (`str`, *optional*):
            Where the references are.
        most (`int`, *optional*, defaults to `12`):
            Prompts for each process.
    """
    distinct = {repr((answer.prompt, answer.turn)): (row, answer) for row, answer in asked if answer.is_scored}
    chosen = list(distinct.values())[:most]
    count = min(gather_values(len(chosen)))
    if count == 0:
        return []
    chosen = chosen[:count]
    rows = [
        {**row, **answer.columns, "prompt": answer.prompt, "turn": answer.turn + 1, "last_turn": answer.is_last}
        for row, answer in chosen
    ]
    references = [as_text(row.get(column)) if column else None for row in rows]
    kinds = (
        KINDS
        if all(has for own in gather_values(all(references)) for has in [own]) and column
        else {kind: text for kind, text in UNWANTED.items() if kind != "other_reference"}
    )
    paid = []
    for kind in kinds:
        texts = [_text(trainer, kind, number, chosen, references) for number in range(count)]
        try:
            paid.append(_pay(trainer, kind, rows, [answer for _, answer in chosen], texts))
        except Exception as error:  # on all processes, or on none
            drop_pending_logs(trainer)
            paid.append(Paid(kind, error=f"{type(error).__name__}: {error}"))
    return paid


def _text(
    trainer: AdaptiveGRPOTrainer, kind: str, number: int, chosen: Sequence[Asked], references: Sequence[str | None]
) -> str:
    _, answer = chosen[number]
    if kind == "reference":
        return references[number] or ""
    if kind == "other_reference":
        others = [text for text in references if text != references[number]]
        return (others[number % len(others)] if others else references[number]) or ""
    if kind == "question":
        return said_last(answer.prompt)
    if kind == "one_token":
        return _repeated(trainer, " the")
    if kind == "longest":
        return _repeated(trainer, f"{answer.text or said_last(answer.prompt)} ")
    return REFUSAL if kind == "refusal" else ""


def _ids(trainer: AdaptiveGRPOTrainer, text: str) -> list[int]:
    ids: list[int] = trainer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _repeated(trainer: AdaptiveGRPOTrainer, text: str) -> str:
    """`text` again and again, as long as an answer may be."""
    size = max(1, len(_ids(trainer, text)))
    ids = _ids(trainer, text * -(-trainer.max_completion_length // size))[: trainer.max_completion_length]
    return str(trainer.tokenizer.decode(ids, skip_special_tokens=True))


def _pay(
    trainer: AdaptiveGRPOTrainer, kind: str, rows: list[dict[str, Any]], answers: list[Answer], texts: list[str]
) -> Paid:
    end = trainer.eos_token_ids[:1]
    ids = [(_ids(trainer, text) + end)[: trainer.max_completion_length] for text in texts]
    is_text = isinstance(answers[0].prompt, str)
    completions = [text if is_text else [{"role": "assistant", "content": text}] for text in texts]
    prompts = [answer.prompt for answer in answers]

    def calculate() -> Any:
        return plain_rewards(trainer, [dict(row) for row in rows], prompts, completions, ids)

    nothing = trainer.reward_weights.new_zeros(len(rows), len(trainer.reward_funcs)).to(trainer.accelerator.device)
    rewards = gather_rewards(trainer.accelerator, calculate, nothing).cpu()
    columns = gather_values({name: list(values) for name, values in pending_columns(trainer).items()})
    drop_pending_logs(trainer)
    totals = total_rewards(rewards, trainer.reward_weights.cpu()).tolist()
    values = {name: rewards[:, k].nanmean().item() for k, name in enumerate(trainer.reward_func_names)}
    for name in columns[0]:
        logged = [value for own in columns for value in own.get(name, [])]
        if all(value is None or isinstance(value, int | float) for value in logged):
            values[name] = mean_of(logged)
    return Paid(kind, [None if total != total else total for total in totals], values)
