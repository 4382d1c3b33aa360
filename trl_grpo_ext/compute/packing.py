"""
Pure layout of shared prompts: rows with the same prompt become sequences that hold the prompt once.

Axis suffixes: `N` rows, `G` distinct prompts, `C` chunks (a prompt and some of its completions), `B` packed sequences
of length `L`, `T` completion columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT, PADDING = -1, -2


@dataclass(frozen=True)
class Costs:
    """
    What a forward pass costs, up to a factor.

    Args:
        token (`float`):
            Multiplications per token: weights of the model that every token passes.
        pair (`float`):
            Multiplications per pair of query and key: twice the width of attention, over all layers.
        max_area (`float`, *optional*, defaults to `4.0`):
            Largest attention area (packed sequences times length squared), as a multiple of that of the rows on
            their own.
    """

    token: float
    pair: float
    max_area: float = 4.0

    def of(self, num_sequences: int, length: int) -> float:
        return num_sequences * length * (self.token + self.pair * length)


@dataclass(frozen=True)
class Packing:
    """
    Where each token of a batch goes.

    Args:
        sequence (`torch.Tensor` of shape `(N,)`):
            Packed sequence of each row.
        start (`torch.Tensor` of shape `(N,)`):
            Position in it of the row's first token, which is the last token of its prompt.
        prompt_row (`torch.Tensor` of shape `(C,)`):
            A row of each chunk, from which its prompt is copied.
        prompt_sequence (`torch.Tensor` of shape `(C,)`):
            Packed sequence of each chunk.
        prompt_start (`torch.Tensor` of shape `(C,)`):
            Position in it of the prompt's first token.
        chunk (`torch.Tensor` of shape `(N,)`):
            Chunk of each row.
        num_sequences (`int`):
            `B`.
        length (`int`):
            `L`.
    """

    sequence: Tensor
    start: Tensor
    prompt_row: Tensor
    prompt_sequence: Tensor
    prompt_start: Tensor
    chunk: Tensor
    num_sequences: int
    length: int


def equal_rows(ids: Tensor, mask: Tensor) -> Tensor:
    """
    Number the distinct prompts of a batch.

    Args:
        ids (`torch.Tensor` of shape `(N, P)`):
            Token ids.
        mask (`torch.Tensor` of shape `(N, P)`):
            1 for tokens, 0 for padding, whose ids do not count.

    Returns:
        `torch.Tensor` of shape `(N,)`: number of the distinct prompt of each row.

    Example:

    ```python
    >>> import torch
    >>> ids = torch.tensor([[0, 5], [4, 5], [9, 5]])
    >>> equal_rows(ids, torch.tensor([[0, 1], [1, 1], [0, 1]]))
    tensor([0, 1, 0])

    ```
    """
    numbers: Tensor = torch.unique(ids.masked_fill(mask == 0, -1), dim=0, return_inverse=True)[1]
    return numbers


def exclusive_cumsum(values: Tensor, segments: Tensor) -> Tensor:
    """
    Sum of the values before each one in its segment.

    Example:

    ```python
    >>> import torch
    >>> exclusive_cumsum(torch.tensor([3, 1, 2, 5]), torch.tensor([0, 1, 0, 0]))
    tensor([0, 0, 3, 5])

    ```
    """
    order = torch.argsort(segments, stable=True)
    before = values[order].cumsum(0) - values[order]
    first = torch.ones_like(segments, dtype=torch.bool)
    first[1:] = segments[order][1:] != segments[order][:-1]
    base = before[first][first.long().cumsum(0) - 1]
    return torch.empty_like(values).index_copy_(0, order, before - base)


def pack(prompts: Tensor, prompt_lengths: Tensor, completion_lengths: Tensor, costs: Costs) -> Packing | None:
    """
    Lay out rows so that a forward pass over them costs least.

    Few completions per copy of the prompt waste prompt tokens; many make attention quadratic in their sum, since a
    masked score is computed all the same. So each prompt is repeated for every `k` completions, chunks are put
    together into sequences of similar length, and `k` and the number of sequences are those with the smallest cost.

    Args:
        prompts (`torch.Tensor` of shape `(N,)`):
            Number of the distinct prompt of each row, from [`equal_rows`].
        prompt_lengths (`torch.Tensor` of shape `(N,)`):
            Tokens of each row's prompt, at least 1.
        completion_lengths (`torch.Tensor` of shape `(N,)`):
            Tokens of each completion; 0 for a row that is not to be scored.
        costs ([`Costs`]):
            What tokens and pairs cost.

    Returns:
        [`Packing`], *optional*: tensors on the CPU. `None` where the rows on their own cost no more.

    Example: two prompts of 64 tokens, eight completions of 48 each.

    ```python
    >>> import torch
    >>> prompts = torch.arange(16) // 8
    >>> packing = pack(prompts, torch.full((16,), 64), torch.full((16,), 48), Costs(token=1e6, pair=1e3))
    >>> packing.num_sequences, packing.length  # 63 + 4 x 48
    (4, 255)

    ```
    """
    prompts, prompt_lengths, completion_lengths = prompts.cpu(), prompt_lengths.cpu(), completion_lengths.cpu()
    num_rows = prompts.numel()
    longest = int(prompt_lengths.max() + completion_lengths.max())
    area = num_rows * longest**2
    best, cost = None, costs.of(num_rows, longest)
    group_sizes = torch.bincount(prompts)
    member = exclusive_cumsum(torch.ones_like(prompts), prompts)
    for per_copy in {min(2**i, int(group_sizes.max())) for i in range(1, num_rows.bit_length() + 1)}:
        copies = (group_sizes + per_copy - 1) // per_copy
        copy = member * copies[prompts] // group_sizes[prompts]
        chunk = (copies.cumsum(0) - copies)[prompts] + copy
        lengths = torch.zeros(int(copies.sum()), dtype=torch.long).index_add_(0, chunk, completion_lengths)
        lengths += prompt_lengths.new_zeros(lengths.numel()).index_copy_(0, chunk, prompt_lengths) - 1
        longest_first = torch.argsort(lengths, descending=True)
        rank = torch.empty_like(lengths).index_copy_(0, longest_first, torch.arange(len(lengths)))
        # As many chunks per sequence as each power of the root of two.
        for num_sequences in {
            -(-len(lengths) * 10 // int(10 * 2 ** (i / 2))) for i in range(2 * num_rows.bit_length())
        }:
            # Longest first, forth and back over the sequences, which keeps their sums close to each other.
            lap, place = rank // num_sequences, rank % num_sequences
            sequence = torch.where(lap % 2 == 0, place, num_sequences - 1 - place)
            length = int(torch.zeros(num_sequences, dtype=torch.long).index_add_(0, sequence, lengths).max())
            trial = costs.of(num_sequences, length)
            if trial < cost and num_sequences * length**2 <= costs.max_area * area:
                best, cost = (chunk, sequence, lengths, num_sequences, length), trial
    if best is None:
        return None
    chunk, sequence, lengths, num_sequences, length = best
    prompt_start = exclusive_cumsum(lengths, sequence)
    start = prompt_start[chunk] + prompt_lengths - 1 + exclusive_cumsum(completion_lengths, chunk)
    prompt_row = torch.empty_like(lengths).index_copy_(0, chunk, torch.arange(num_rows))
    return Packing(sequence[chunk], start, prompt_row, sequence, prompt_start, chunk, num_sequences, length)


@dataclass(frozen=True)
class PackedBatch:
    """
    Packed sequences, ready for a model.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Tokens.
        position_ids (`torch.Tensor` of shape `(B, L)`):
            Positions: the column of each token in the padded batch, so that a model sees those it would see there.
        labels (`torch.Tensor` of shape `(B, L)`):
            The next token, already shifted; -100 where none is scored.
        chunks (`torch.Tensor` of shape `(B, L)`):
            Chunk of each token, -2 for padding.
        rows (`torch.Tensor` of shape `(B, L)`):
            Row of each token, -1 for a prompt, -2 for padding.
        index (`torch.Tensor` of shape `(N, T)`):
            Where in the flattened `(B, L)` each completion token is scored.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    chunks: Tensor
    rows: Tensor
    index: Tensor


def fill(
    packing: Packing,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion_columns: int,
    first_position: int = 0,
) -> PackedBatch:
    """
    Copy the tokens of a padded batch to where `packing` says.

    Args:
        packing ([`Packing`]):
            Layout of the batch.
        input_ids (`torch.Tensor` of shape `(N, P + T)`):
            Prompts, padded left, and completions, padded right.
        attention_mask (`torch.Tensor` of shape `(N, P + T)`):
            1 for tokens, 0 for padding.
        num_completion_columns (`int`):
            `T`.
        first_position (`int`, *optional*, defaults to `0`):
            Position of the first column.

    Returns:
        [`PackedBatch`]
    """
    device, width = input_ids.device, input_ids.size(1) - num_completion_columns
    length, shape = packing.length, (packing.num_sequences, packing.length)

    def flat(value: int) -> Tensor:
        return torch.full((shape[0] * shape[1],), value, dtype=torch.long, device=device)

    tokens, positions, labels = flat(0), flat(0), flat(-100)
    chunks, rows = flat(PADDING), flat(PADDING)

    # Prompts, each without its last token.
    source = packing.prompt_row.to(device)
    inside = attention_mask[source, :width].bool()
    inside[:, -1] = False
    column = inside.long().cumsum(1) - 1
    base = (packing.prompt_sequence * length + packing.prompt_start).to(device)
    where = (base[:, None] + column)[inside]
    tokens[where] = input_ids[source, :width][inside]
    positions[where] = (first_position + torch.arange(width, device=device)).expand_as(inside)[inside]
    chunks[where] = torch.arange(len(source), device=device)[:, None].expand_as(inside)[inside]
    rows[where] = PROMPT

    # Completions: the last token of the prompt, and all but the last of the completion, each scoring the next.
    scored = attention_mask[:, width:].bool()
    base = (packing.sequence * length + packing.start).to(device)
    index = (base[:, None] + torch.arange(num_completion_columns, device=device)).masked_fill(~scored, 0)
    where = index[scored]
    tokens[where] = input_ids[:, width - 1 : -1][scored]
    labels[where] = input_ids[:, width:][scored]
    column = first_position + width - 1 + torch.arange(num_completion_columns, device=device)
    positions[where] = column.expand_as(scored)[scored]
    chunks[where] = packing.chunk.to(device)[:, None].expand_as(scored)[scored]
    rows[where] = torch.arange(len(scored), device=device)[:, None].expand_as(scored)[scored]
    tokens, positions, labels, chunks, rows = (x.view(shape) for x in (tokens, positions, labels, chunks, rows))
    return PackedBatch(tokens, positions, labels, chunks, rows, index)


def may_attend(chunks: Tensor, rows: Tensor) -> Tensor:
    """
    Who sees whom: a token sees its prompt and its own completion, up to itself; padding sees itself alone.

    Args:
        chunks (`torch.Tensor` of shape `(B, L)`):
            Chunk of each token.
        rows (`torch.Tensor` of shape `(B, L)`):
            Row of each token, -1 for a prompt.

    Returns:
        `torch.Tensor` of shape `(B, 1, L, L)`: boolean, query by key.

    Example: a prompt token, two completions of one token each, padding.

    ```python
    >>> import torch
    >>> chunks, rows = torch.tensor([[0, 0, 0, -2]]), torch.tensor([[-1, 0, 1, -2]])
    >>> may_attend(chunks, rows)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)

    ```
    """
    length = chunks.size(1)
    same_chunk = (chunks[:, :, None] == chunks[:, None, :]) & (chunks >= 0)[:, None, :]
    visible = (rows[:, None, :] == PROMPT) | (rows[:, :, None] == rows[:, None, :])
    causal = torch.ones(length, length, dtype=torch.bool, device=chunks.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=chunks.device)
    return ((same_chunk & visible & causal) | itself)[:, None]
