"""What a rollout generated: answers, and the rows of the loss that they lie in."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Answer:
    """
    One answer of the model: what is scored, and what gets one advantage.

    Args:
        prompt (`list[dict]`):
            Messages before the answer.
        ids (`list[int]`):
            Tokens as they were generated.
        text (`str`):
            The same as text.
        logprobs (`list[float]`, *optional*):
            Log-probability of each token when it was sampled, as vLLM gives it.
        glue_ids (`list[int]`, *optional*):
            Tokens between the answer before it in the row and this one: the end of that turn if it was cut off, what
            the user says, and the beginning of the assistant's turn. They are never trained on.
        turn (`int`, *optional*, defaults to `0`):
            Turn of the conversation, or level of the tree, from 0.
        is_last (`bool`, *optional*, defaults to `False`):
            Whether the conversation ends here.
        is_scored (`bool`, *optional*, defaults to `True`):
            Whether reward functions see it. Without a reward of its own, it may get credit for what follows.
        columns (`dict[str, Any]`, *optional*):
            What the reward functions get in place of the dataset's columns of that name, or besides them.
    """

    prompt: list[dict[str, Any]]
    ids: list[int]
    text: str
    logprobs: list[float] | None = None
    glue_ids: list[int] = field(default_factory=list)
    turn: int = 0
    is_last: bool = False
    is_scored: bool = True
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": self.text}]


@dataclass
class RolloutRow:
    """
    One row of the loss: a prompt, and the answers that follow it with what the user says in between.

    Args:
        prompt_ids (`list[int]`):
            Tokens before the first answer.
        answers (`list[Answer]`):
            At least one.
        parent (`int`, *optional*):
            Row of this process whose last answer this row carries on from.
    """

    prompt_ids: list[int]
    answers: list[Answer]
    parent: int | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        return self.answers[0].prompt

    @property
    def completion(self) -> list[dict[str, Any]]:
        last = self.answers[-1]
        return (last.prompt + last.completion)[len(self.prompt) :]


def pack(rows: list[RolloutRow]) -> dict[str, Any]:
    """
    The rows in the form of TRL's `rollout_func`: ids, log-probabilities, and which tokens the model wrote.

    Example:

    ```python
    >>> first, second = Answer([], ids=[7, 8], text=""), Answer([], ids=[9], text="", glue_ids=[1, 2])
    >>> pack([RolloutRow(prompt_ids=[5], answers=[first, second])])["env_mask"]
    [[1, 1, 0, 0, 1]]

    ```
    """
    packed: dict[str, Any] = {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [[token for a in row.answers for token in a.glue_ids + a.ids] for row in rows],
        "logprobs": None,
    }
    if any(answer.glue_ids for row in rows for answer in row.answers):
        packed["env_mask"] = [
            [bit for a in row.answers for bit in [0] * len(a.glue_ids) + [1] * len(a.ids)] for row in rows
        ]
    if rows[0].answers[0].logprobs is not None:
        packed["logprobs"] = [
            [value for a in row.answers for value in [0.0] * len(a.glue_ids) + (a.logprobs or [])] for row in rows
        ]
    return packed


@dataclass
class AnswerIndex:
    """
    Where the answers of all processes are: `A` answers, in rank order, a row's answers from first to last.

    Args:
        rows (`torch.Tensor` of shape `(A,)`):
            Row of the generation batch.
        turns (`torch.Tensor` of shape `(A,)`):
            Turn or level, from 0.
        parents (`torch.Tensor` of shape `(A,)`):
            Answer that each carries on from, -1 for a first one.
        lengths (`torch.Tensor` of shape `(A,)`):
            Tokens.
        is_scored (`torch.Tensor` of shape `(A,)`):
            Whether reward functions see it.
        counts (`list[int]`):
            Answers of each process.
    """

    rows: Tensor
    turns: Tensor
    parents: Tensor
    lengths: Tensor
    is_scored: Tensor
    counts: list[int]

    @classmethod
    def build(cls, per_process: list[list[tuple[int, int, int, int, bool]]], num_rows: int) -> "AnswerIndex":
        """From what [`describe`] says on each process, with `num_rows` rows each."""
        table: list[tuple[int, int, int, int, bool]] = []
        for rank, described in enumerate(per_process):
            first = len(table)
            for row, turn, parent, length, is_scored in described:
                before = parent + first if parent >= 0 else -1
                table.append((row + rank * num_rows, turn, before, length, is_scored))
        rows, turns, parents, lengths, is_scored = torch.tensor(table, dtype=torch.long).view(-1, 5).T
        return cls(rows, turns, parents, lengths, is_scored.bool(), [len(described) for described in per_process])

    @property
    def is_one_per_row(self) -> bool:
        return bool((self.rows == torch.arange(self.rows.numel())).all())

    def own(self, process_index: int) -> slice:
        """The answers of one process."""
        first = sum(self.counts[:process_index])
        return slice(first, first + self.counts[process_index])

    def mean_per_row(self, values: Tensor) -> Tensor:
        """Mean of the values `(A,)` of each row that has any, shape `(N,)`."""
        zeros = torch.zeros(int(self.rows.max()) + 1, dtype=values.dtype)
        return zeros.index_add(0, self.rows, values) / self.rows.bincount()

    def per_row(self, values: Tensor, num_rows: int) -> Tensor:
        """Sum of the values `(A, K)` of each row, shape `(num_rows, K)`; NaN where all are."""
        zeros = torch.zeros(num_rows, *values.shape[1:], dtype=values.dtype, device=values.device)
        rows = self.rows.to(values.device)
        total = zeros.index_add(0, rows, values.nan_to_num(0.0))
        return total.masked_fill(zeros.index_add(0, rows, (~values.isnan()).to(values.dtype)) == 0, torch.nan)


def describe(rows: list[RolloutRow]) -> list[tuple[int, int, int, int, bool]]:
    """
    Row, turn, parent, length and whether it is scored of each answer of this process.

    Example:

    ```python
    >>> plan, answer = Answer([], ids=[7, 8], text="", is_scored=False), Answer([], ids=[9], text="", turn=1)
    >>> describe([RolloutRow([5], [plan]), RolloutRow([5, 7, 8], [answer], parent=0)])
    [(0, 0, -1, 2, False), (1, 1, 0, 1, True)]

    ```
    """
    described: list[tuple[int, int, int, int, bool]] = []
    last: list[int] = []
    for number, row in enumerate(rows):
        before = -1 if row.parent is None else last[row.parent]
        for answer in row.answers:
            described.append((number, answer.turn, before, len(answer.ids), answer.is_scored))
            before = len(described) - 1
        last.append(before)
    return described


def answer_of_token(rows: list[RolloutRow], width: int) -> Tensor:
    """
    Answer of this process that each token of the padded completions belongs to, -1 for glue and padding.

    Example:

    ```python
    >>> first, second = Answer([], ids=[7, 8], text=""), Answer([], ids=[9], text="", glue_ids=[1])
    >>> answer_of_token([RolloutRow([5], [first, second])], width=5).tolist()
    [[0, 0, -1, 1, -1]]

    ```
    """
    tokens = torch.full((len(rows), width), -1)
    number = 0
    for index, row in enumerate(rows):
        position = 0
        for answer in row.answers:
            position += len(answer.glue_ids)
            tokens[index, position : position + len(answer.ids)] = number
            position += len(answer.ids)
            number += 1
    return tokens
