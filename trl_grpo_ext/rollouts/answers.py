"""Where answers lie: in the sequences of one process, and among those of all processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks.records import RolloutSequence


def as_rollout_output(sequences: list[RolloutSequence]) -> dict[str, Any]:
    """
    The sequences in the form of TRL's `rollout_func`: ids, log-probabilities, and which tokens the model wrote.

    Example:

    ```python
    >>> from trl_grpo_ext.hooks import Answer, RolloutSequence
    >>> first, second = Answer([], ids=[7, 8], text=""), Answer([], ids=[9], text="", glue_ids=[1, 2])
    >>> as_rollout_output([RolloutSequence(prompt_ids=[5], answers=[first, second])])["env_mask"]
    [[1, 1, 0, 0, 1]]

    ```
    """
    packed: dict[str, Any] = {
        "prompt_ids": [s.prompt_ids for s in sequences],
        "completion_ids": [[token for a in s.answers for token in a.glue_ids + a.ids] for s in sequences],
        "logprobs": None,
    }
    if any(answer.glue_ids for s in sequences for answer in s.answers):
        packed["env_mask"] = [
            [bit for a in s.answers for bit in [0] * len(a.glue_ids) + [1] * len(a.ids)] for s in sequences
        ]
    if sequences[0].answers[0].logprobs is not None:
        packed["logprobs"] = [
            [value for a in s.answers for value in [0.0] * len(a.glue_ids) + (a.logprobs or [])] for s in sequences
        ]
    return packed


@dataclass
class AnswerIndex:
    """
    Where the answers of all processes are: `A` answers, in rank order, those of a sequence from first to last.

    Args:
        sequences (`torch.Tensor` of shape `(A,)`):
            Sequence of the generation batch.
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

    sequences: Tensor
    turns: Tensor
    parents: Tensor
    lengths: Tensor
    is_scored: Tensor
    counts: list[int]

    @classmethod
    def build(cls, per_process: list[list[tuple[int, int, int, int, bool]]], num_sequences: int) -> "AnswerIndex":
        """From what [`layout_of`] says on each process, with `num_sequences` each."""
        table: list[tuple[int, int, int, int, bool]] = []
        for rank, described in enumerate(per_process):
            first = len(table)
            for sequence, turn, parent, length, is_scored in described:
                before = parent + first if parent >= 0 else -1
                table.append((sequence + rank * num_sequences, turn, before, length, is_scored))
        sequences, turns, parents, lengths, is_scored = torch.tensor(table, dtype=torch.long).view(-1, 5).T
        return cls(sequences, turns, parents, lengths, is_scored.bool(), [len(described) for described in per_process])

    @property
    def is_one_per_sequence(self) -> bool:
        return bool((self.sequences == torch.arange(self.sequences.numel())).all())

    def own(self, process_index: int) -> slice:
        """The answers of one process."""
        first = sum(self.counts[:process_index])
        return slice(first, first + self.counts[process_index])

    def mean_per_sequence(self, values: Tensor) -> Tensor:
        """Mean of the values `(A,)` of each sequence that has any, shape `(B,)`."""
        zeros = torch.zeros(int(self.sequences.max()) + 1, dtype=values.dtype)
        return zeros.index_add(0, self.sequences, values) / self.sequences.bincount()

    def per_sequence(self, values: Tensor, num_sequences: int) -> Tensor:
        """Sum of the values `(A, K)` of each sequence, shape `(num_sequences, K)`; NaN where all are."""
        zeros = torch.zeros(num_sequences, *values.shape[1:], dtype=values.dtype, device=values.device)
        sequences = self.sequences.to(values.device)
        total = zeros.index_add(0, sequences, values.nan_to_num(0.0))
        return total.masked_fill(zeros.index_add(0, sequences, (~values.isnan()).to(values.dtype)) == 0, torch.nan)


def layout_of(sequences: list[RolloutSequence]) -> list[tuple[int, int, int, int, bool]]:
    """
    Sequence, turn, parent, length and whether it is scored, of each answer of this process.

    Example:

    ```python
    >>> from trl_grpo_ext.hooks import Answer, RolloutSequence
    >>> plan, answer = Answer([], ids=[7, 8], text="", is_scored=False), Answer([], ids=[9], text="", turn=1)
    >>> layout_of([RolloutSequence([5], [plan]), RolloutSequence([5, 7, 8], [answer], parent=0)])
    [(0, 0, -1, 2, False), (1, 1, 0, 1, True)]

    ```
    """
    described: list[tuple[int, int, int, int, bool]] = []
    last: list[int] = []
    for number, sequence in enumerate(sequences):
        before = -1 if sequence.parent is None else last[sequence.parent]
        for answer in sequence.answers:
            described.append((number, answer.turn, before, len(answer.ids), answer.is_scored))
            before = len(described) - 1
        last.append(before)
    return described


def answer_of_token(sequences: list[RolloutSequence], width: int) -> Tensor:
    """
    Answer of this process that each token of the padded completions belongs to, -1 for glue and padding.

    Example:

    ```python
    >>> from trl_grpo_ext.hooks import Answer, RolloutSequence
    >>> first, second = Answer([], ids=[7, 8], text=""), Answer([], ids=[9], text="", glue_ids=[1])
    >>> answer_of_token([RolloutSequence([5], [first, second])], width=5).tolist()
    [[0, 0, -1, 1, -1]]

    ```
    """
    tokens = torch.full((len(sequences), width), -1)
    number = 0
    for index, sequence in enumerate(sequences):
        position = 0
        for answer in sequence.answers:
            position += len(answer.glue_ids)
            tokens[index, position : position + len(answer.ids)] = number
            position += len(answer.ids)
            number += 1
    return tokens
