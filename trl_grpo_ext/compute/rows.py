"""Pure choices about rows: which teach, which columns are padding, which micro-batch a row goes to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .packing import equal_rows

# What TRL's forward pass takes for images and sound, besides arguments whose name says so.
OF_MEDIA = {"num_images", "num_tiles", "spatial_shapes", "token_type_ids", "mm_token_type_ids"}


def media_keys(names: Iterable[str]) -> list[str]:
    """
    Which of the entries of a batch belong to images or sound. They have no row for each row, so that TRL takes them.

    Example:

    ```python
    >>> media_keys(["prompt_ids", "pixel_values", "difficulty", "image_grid_thw", "num_images"])
    ['pixel_values', 'image_grid_thw', 'num_images']

    ```
    """
    return [name for name in names if name in OF_MEDIA or name.startswith(("pixel_", "image_", "video_", "audio_"))]


@dataclass(frozen=True)
class Teachers:
    """
    Which rows of a micro-batch can move a weight, and what stands for the others.

    Args:
        live (`torch.Tensor` of shape `(N,)`):
            From [`live_rows`].
        mask (`torch.Tensor` of shape `(N, T)`):
            1 where a token counts in the loss.
        old_logps (`torch.Tensor` of shape `(N, T)`, *optional*):
            Log-probabilities when the batch was sampled.
    """

    live: Tensor
    mask: Tensor
    old_logps: Tensor | None

    def fill_in(self, logps: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Give the other rows a ratio of 1, which times an advantage of 0 is 0, and the mean entropy."""
        live = self.live[:, None]
        if self.old_logps is not None:
            logps = torch.where(live, logps, self.old_logps)
        if entropies is not None:
            seen = self.mask * live
            mean = (entropies.detach() * seen).sum() / seen.sum().clamp(min=1)
            entropies = torch.where(live, entropies, mean)
        return logps, entropies


@dataclass(frozen=True)
class Cut:
    """
    The rows and columns of a padded batch that are computed.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(M, p + t)`):
            What is left of the batch.
        num_completion_columns (`int`):
            `t`.
        first_position (`int`):
            Column of the batch that is the first here.
        rows (`torch.Tensor` of shape `(M,)`):
            Rows of the batch.
        shape (`tuple[int, int]`):
            `(N, T)`, rows and completion columns of the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    num_completion_columns: int
    first_position: int
    rows: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_completion_columns: int,
        rows: Tensor,
        trim_left: bool,
    ) -> "Cut":
        """The given rows of a batch, without the columns that hold padding in all of them."""
        columns = used_columns(attention_mask[rows], num_completion_columns, trim_left)
        return cls(
            input_ids[rows, columns],
            attention_mask[rows, columns],
            columns.stop - (input_ids.size(1) - num_completion_columns),
            columns.start,
            rows,
            (input_ids.size(0), num_completion_columns),
        )

    def restored(self, values: Tensor) -> Tensor:
        """Values `(M, t)` at their place in the batch, `(N, T)`, with 0 elsewhere."""
        num_rows, num_columns = self.shape
        values = torch.nn.functional.pad(values, (0, num_columns - self.num_completion_columns))
        return values.new_zeros(num_rows, num_columns).index_copy(0, self.rows, values)


def first_with_context(input_ids: Tensor, attention_mask: Tensor, num_completion_columns: int) -> Tensor:
    """
    For each completion token, the first row whose tokens before it are the same.

    Args:
        input_ids (`torch.Tensor` of shape `(N, P + T)`):
            Prompts, padded left, and completions, padded right.
        attention_mask (`torch.Tensor` of shape `(N, P + T)`):
            1 for tokens, 0 for padding.
        num_completion_columns (`int`):
            `T`.

    Returns:
        `torch.Tensor` of shape `(N, T)`

    Example: the second row begins as the first does.

    ```python
    >>> import torch
    >>> ids = torch.tensor([[5, 1, 2, 3], [5, 1, 4, 3], [6, 1, 2, 3]])
    >>> first_with_context(ids, torch.ones_like(ids), 3)
    tensor([[0, 0, 0],
            [0, 0, 1],
            [2, 2, 2]])

    ```
    """
    width = input_ids.size(1) - num_completion_columns
    num_rows = input_ids.size(0)
    place = torch.arange(num_rows, device=input_ids.device)
    context = equal_rows(input_ids[:, :width], attention_mask[:, :width])
    first = place[:, None].repeat(1, num_completion_columns)
    for column in range(width, width + num_completion_columns):
        # A completion that has ended has no token here, whatever the tokens before.
        context = 2 * context + attention_mask[:, column]
        found = place.new_full((2 * num_rows,), num_rows).scatter_reduce_(0, context, place, "amin")[context]
        if torch.equal(found, place):  # from here on, all are different
            break
        first[:, column - width] = found
        context = torch.unique(torch.stack([context, input_ids[:, column]]), dim=1, return_inverse=True)[1]
    return first


def live_rows(advantages: Tensor, mask: Tensor) -> Tensor:
    """
    Which rows can move a weight: those with a token whose advantage is not exactly zero.

    At least one row is kept, the shortest that has a token, so that every process runs its forward and backward pass.

    Args:
        advantages (`torch.Tensor` of shape `(N,)` or `(N, T)`):
            Advantages, per row or per token.
        mask (`torch.Tensor` of shape `(N, T)`):
            1 where a token counts in the loss.

    Returns:
        `torch.Tensor` of shape `(N,)`: boolean.

    Example:

    ```python
    >>> import torch
    >>> mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    >>> live_rows(torch.tensor([0.0, 0.0, -1.0]), mask)
    tensor([False, False,  True])
    >>> live_rows(torch.zeros(3), mask)
    tensor([False,  True, False])

    ```
    """
    per_token = advantages[:, None] if advantages.dim() == 1 else advantages
    # Not a comparison of sums: NaN must stay in, and be seen.
    live = ((per_token != 0) & (mask != 0)).any(1)
    lengths = mask.sum(1)
    shortest = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()
    return live | ((torch.arange(len(live), device=live.device) == shortest) & ~live.any())


def used_columns(attention_mask: Tensor, num_completion_columns: int, trim_left: bool) -> slice:
    """
    The columns that are not padding in every row, and at least one of the completion.

    Args:
        attention_mask (`torch.Tensor` of shape `(N, P + T)`):
            1 for tokens, 0 for padding; prompts are padded left, completions right.
        num_completion_columns (`int`):
            `T`.
        trim_left (`bool`):
            Whether to leave out padding before the prompts. This moves the absolute positions of all tokens.

    Example:

    ```python
    >>> import torch
    >>> used_columns(torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]), 2, trim_left=True)
    slice(1, 4, None)

    ```
    """
    used = attention_mask.any(0).nonzero().flatten()
    width = attention_mask.size(1) - num_completion_columns
    first, last = (int(used[0]), int(used[-1])) if len(used) else (width, width)
    return slice(min(first, width - 1) if trim_left and width > 0 else 0, max(last, width) + 1)


def regrouped(
    micro_batches: list[dict[str, Any]], num_accumulated: int, by_group: bool, by_length: bool
) -> list[dict[str, Any]]:
    """
    Deal the rows of a generation batch out to micro-batches again, as many to each as before.

    Args:
        micro_batches (`list[dict]`):
            TRL's micro-batches: rows in random order. Entries are tensors and lists with an element for each row,
            scalars, and `None`.
        num_accumulated (`int`):
            Micro-batches of an optimizer step.
        by_group (`bool`):
            Whether groups (rows with equal prompts) are drawn in random order, rather than rows. A group at the border
            of two micro-batches is split.
        by_length (`bool`):
            Whether the rows of an optimizer step are ordered by length, so that micro-batches hold little padding.
            They are not where optimizer steps end within a generation batch and also run over its end: the next batch
            would complete a step of long rows with others.

    Returns:
        `list[dict]`
    """
    whole = {key: _joined([batch[key] for batch in micro_batches]) for key in micro_batches[0]}
    ids, mask = whole["prompt_ids"], whole["prompt_mask"]
    num_rows, num_batches = ids.size(0), len(micro_batches)
    place = torch.arange(num_rows, device=ids.device)
    if by_group:
        group = equal_rows(ids, mask)
        # TRL's shuffle decides: a group comes where its first row came.
        place = place.new_full((num_rows,), num_rows).scatter_reduce_(0, group, place, "amin")[group]
    order = torch.argsort(place, stable=True)
    steps_fit = num_batches % num_accumulated == 0 or num_accumulated % num_batches == 0
    if by_length and steps_fit:
        lengths = (mask.sum(1) + whole["completion_mask"].sum(1))[order]
        if by_group:
            longest = torch.zeros_like(lengths).scatter_reduce_(0, place[order], lengths, "amax")
            lengths = longest[place[order]]
        step = torch.arange(num_rows, device=ids.device) // (num_rows // num_batches * num_accumulated)
        longest_first = torch.argsort(lengths, descending=True, stable=True)
        order = order[longest_first[torch.argsort(step[longest_first], stable=True)]]
    parts = order.split(num_rows // num_batches)
    return [{key: _at(value, rows) for key, value in whole.items()} for rows in parts[:num_batches]]


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def _joined(parts: list[Any]) -> Any:
    """An entry of all micro-batches as one."""
    if not _has_rows(parts[0]):
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [element for part in parts for element in part]


def _at(value: Any, rows: Tensor) -> Any:
    """The given rows of an entry."""
    if not _has_rows(value):
        return value
    return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]
