"""Pure choices about rows: which teach, which columns are padding, which micro-batch a row goes to."""

import torch
from torch import Tensor

from .packing import equal_rows

# What a micro-batch of text holds. Other keys (images, ...) are left to TRL as they are.
ROW_KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "num_items_in_batch",
}


def is_text_only(inputs: dict[str, Tensor | None]) -> bool:
    """Whether a batch holds nothing but text."""
    return {key for key, value in inputs.items() if value is not None} <= ROW_KEYS


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


def compose(
    micro_batches: list[dict[str, Tensor | None]], num_accumulated: int, by_group: bool, by_length: bool
) -> list[dict[str, Tensor | None]]:
    """
    Put the rows of a generation batch together anew, as many in each micro-batch as before.

    Args:
        micro_batches (`list[dict[str, torch.Tensor]]`):
            TRL's micro-batches: rows in random order.
        num_accumulated (`int`):
            Micro-batches per optimizer step.
        by_group (`bool`):
            Whether to draw whole groups (rows with equal prompts) in random order, rather than rows. A group at the
            border of two micro-batches is split.
        by_length (`bool`):
            Whether to order what falls into one optimizer step by length, so that micro-batches hold little padding.
            Left undone where optimizer steps end within a generation batch and also run over its end, since the next
            batch would complete a step of long rows with others.

    Returns:
        `list[dict[str, torch.Tensor]]`
    """

    def joined(key: str) -> Tensor | None:
        parts = [batch[key] for batch in micro_batches]
        if parts[0] is None or parts[0].dim() == 0:
            return parts[0]
        return torch.cat(parts)  # type: ignore[arg-type]

    whole = {key: joined(key) for key in micro_batches[0]}
    ids, mask, completion_mask = whole["prompt_ids"], whole["prompt_mask"], whole["completion_mask"]
    assert ids is not None
    assert mask is not None
    assert completion_mask is not None
    num_rows = ids.size(0)
    place = torch.arange(num_rows, device=ids.device)
    if by_group:
        group = equal_rows(ids, mask)
        # TRL's shuffle decides: a group comes where its first row came.
        place = place.new_full((num_rows,), num_rows).scatter_reduce_(0, group, place, "amin")[group]
    order = torch.argsort(place, stable=True)
    steps_fit = len(micro_batches) % num_accumulated == 0 or num_accumulated % len(micro_batches) == 0
    if by_length and steps_fit:
        lengths = (mask.sum(1) + completion_mask.sum(1))[order]
        if by_group:
            longest = torch.zeros_like(lengths).scatter_reduce_(0, place[order], lengths, "amax")
            lengths = longest[place[order]]
        window = torch.arange(num_rows, device=ids.device) // (num_rows // len(micro_batches) * num_accumulated)
        by = torch.argsort(lengths, descending=True, stable=True)
        order = order[by[torch.argsort(window[by], stable=True)]]
    whole = {key: value if value is None or value.dim() == 0 else value[order] for key, value in whole.items()}
    size = num_rows // len(micro_batches)
    return [
        {
            key: value if value is None or value.dim() == 0 else value[i * size : (i + 1) * size]
            for key, value in whole.items()
        }
        for i in range(len(micro_batches))
    ]
