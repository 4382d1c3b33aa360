"""Dynamic sampling: replace groups that came out flat by fresh prompts, for a bounded number of rounds."""

from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ..hooks.callback import GRPOCallback
from ..hooks.records import RolloutBatch

# How each entry of TRL's rollout batch is padded when rows of different length meet: side, value.
PADDING = {"prompt_ids": ("left", None), "prompt_mask": ("left", 0), "completion_ids": ("right", None)}
# What an entry that a batch lacks stands for: all tokens are the model's, all were sampled by the policy itself.
NEUTRAL = {"tool_mask": 1, "importance_sampling_ratio": 1}
PADDING |= {"completion_mask": ("right", 0), "tool_mask": ("right", 1), "importance_sampling_ratio": ("right", 1)}
# Entries whose columns are those of the prompt and then those of the completion.
WHOLE = ("token_type_ids", "mm_token_type_ids")
PADDING |= {f"prompt_{key}": ("left", 0) for key in WHOLE}


class DynamicSamplingCallback(GRPOCallback):
    """
    Replace flat groups (all rewards equal) by fresh prompts (dynamic sampling of DAPO, arXiv 2503.14476).

    Flatness is judged on the gathered rewards and every rank runs every round, so no rank skips a collective. What is
    thrown away is counted in `rollouts/total` and `dynamic_sampling/discarded`. Groups that are still flat after the
    last round stay.

    Args:
        max_rounds (`int`, *optional*, defaults to `1`):
            Largest number of rounds per generation batch.
    """

    is_unique = True

    def __init__(self, max_rounds: int = 1):
        self.max_rounds = max_rounds

    def on_resample(self, batch: RolloutBatch, round: int, **kwargs: Any) -> Tensor | None:
        if round < self.max_rounds:
            return batch.flat_groups()
        return None


def rows_to_regenerate(replaced: Tensor, group_ids: Tensor, num_processes: int) -> tuple[list[Tensor], int]:
    """
    Which rows each rank has to generate anew, and how many every rank must generate so that all do the same work.

    Args:
        replaced (`torch.Tensor` of shape `(P,)`):
            `True` for a group that is replaced.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each row, all ranks in order.
        num_processes (`int`):
            Number of ranks; rank `r` holds rows `[r * N / W, (r + 1) * N / W)`.

    Returns:
        `tuple[list[torch.Tensor], int]`:
            For each rank the positions among its own rows, and the largest count. Ranks with fewer generate throw-away
            rows up to that count, because a collective that one rank skips hangs all.

    Example:

    ```python
    >>> import torch
    >>> rows, count = rows_to_regenerate(torch.tensor([True, False]), torch.tensor([0, 0, 0, 1]), num_processes=2)
    >>> [r.tolist() for r in rows], count
    ([[0, 1], [0]], 2)

    ```
    """
    per_rank = replaced[group_ids].view(num_processes, -1)
    positions = [rank.nonzero().flatten() for rank in per_rank]
    return positions, max(p.numel() for p in positions)


def replace_rows(batch: dict[str, Any], fresh: dict[str, Any], positions: Tensor, pad_token_id: int) -> dict[str, Any]:
    """
    Put the first rows of a fresh rollout batch into given rows of another, padding both to one length.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Rollout batch as TRL returns it: tensors and lists with an element for each row, scalars, which are kept,
            and images, of which each row has some.
        fresh (`dict[str, torch.Tensor]`):
            Rollout batch with at least as many rows as `positions`. A mask or ratio that only one of the two has is 1
            in the other.
        positions (`torch.Tensor` of shape `(M,)`):
            Rows of `batch` to replace.
        pad_token_id (`int`):
            What token ids are padded with.

    Returns:
        `dict`:
            The merged batch.

    Example:

    ```python
    >>> import torch
    >>> batch = {"completion_ids": torch.tensor([[5, 6], [7, 8]])}
    >>> fresh = {"completion_ids": torch.tensor([[1, 2, 3]])}
    >>> replace_rows(batch, fresh, torch.tensor([1]), pad_token_id=0)["completion_ids"].tolist()
    [[5, 6, 0], [1, 2, 3]]

    ```
    """
    # Images of a row have as many tensors as it has images or patches; TRL's functions make lists of rows of them.
    batch, fresh = (split_pixel_values_by_grid(_with_halves(part)) for part in (batch, fresh))
    merged: dict[str, Any] = {}
    for key in {**batch, **fresh}:
        old, new = _filled(key, batch, fresh), _filled(key, fresh, batch)
        if isinstance(old, list) != isinstance(new, list):  # one image each can be read as either layout
            old, new = (torch.cat(part) if isinstance(part, list) else part for part in (old, new))
        if isinstance(old, list):
            merged[key] = list(old)
            for position, value in zip(positions.tolist(), new, strict=False):
                merged[key][position] = value
        elif old.ndim == 0:
            merged[key] = old
        else:
            side, value = PADDING.get(key, ("right", 0))
            fill = pad_token_id if value is None else value
            old, new = _padded(old, new[: positions.numel()], side, fill)
            merged[key] = old.index_copy(0, positions.to(old.device), new.to(old.dtype))
    return _with_wholes(unsplit_pixel_values_by_grid(merged))


def _with_halves(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose entries that run over prompt and completion are cut in two, which are padded on different sides."""
    width = batch["prompt_ids"].size(1) if "prompt_ids" in batch else 0
    halves = {key: batch[key] for key in WHOLE if key in batch}
    cut = {f"prompt_{key}": value[:, :width] for key, value in halves.items()}
    cut |= {f"completion_{key}": value[:, width:] for key, value in halves.items()}
    return {key: value for key, value in batch.items() if key not in WHOLE} | cut


def _with_wholes(batch: dict[str, Any]) -> dict[str, Any]:
    for key in WHOLE:
        if f"prompt_{key}" in batch:
            batch[key] = torch.cat([batch.pop(f"prompt_{key}"), batch.pop(f"completion_{key}")], dim=1)
    return batch


def _filled(key: str, batch: dict[str, Any], other: dict[str, Any]) -> Any:
    """An entry of a batch; where only the other batch has it, what it means that it is missing."""
    if key in batch:
        return batch[key]
    if key not in NEUTRAL:
        raise ValueError(
            f"Of two rounds of dynamic sampling, only one has {key!r}, so their rows cannot be merged: return it for "
            "every row, or set dynamic_sampling_rounds=0"
        )
    ids, like = batch["completion_ids"], other[key]
    shape = (len(ids), ids.size(1) if like.size(1) == other["completion_ids"].size(1) else like.size(1))
    return torch.full(shape, NEUTRAL[key], dtype=like.dtype, device=like.device)


def _padded(one: Tensor, other: Tensor, side: str, fill: float) -> tuple[Tensor, Tensor]:
    """Two tensors as large as the larger of them in all dimensions but the first."""
    shape = [max(sizes) for sizes in zip(one.shape[1:], other.shape[1:], strict=True)]
    padded = []
    for values in (one, other):
        missing = [size - now for size, now in zip(shape, values.shape[1:], strict=True)]
        pads = [pad for left in reversed(missing) for pad in ((left, 0) if side == "left" else (0, left))]
        padded.append(torch.nn.functional.pad(values, pads, value=fill) if any(missing) else values)
    return padded[0], padded[1]


def take_logs(logs: dict[str, Any]) -> dict[str, list[Any]]:
    """Empty the columns of TRL's completions table and return what was in them."""
    taken = {}
    for name, column in _columns(logs).items():
        taken[name] = list(column)
        column.clear()
    return taken


def put_logs(logs: dict[str, Any], taken: dict[str, list[Any]], where: Tensor, source: Tensor) -> None:
    """
    Put the columns back, with the rows `where` replaced by the rows `source` of what was logged in between.

    A column that only one of the two has is filled with `None`, because the columns of a table have one length.
    """
    fresh = {name: list(column) for name, column in _columns(logs).items()}
    for name, column in _columns(logs).items():
        if not taken.get(name) and not fresh[name]:  # images that nobody logs
            continue
        merged = taken.get(name) or [None] * len(taken["prompt"])
        for to, origin in zip(where.tolist(), source.tolist(), strict=True):
            merged[to] = fresh[name][origin] if fresh[name] else None
        column.clear()
        column.extend(merged)


def _columns(logs: dict[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = ("prompt", "completion", "advantages", "images")
    columns = {name: logs[name] for name in names if name in logs}
    columns |= {f"rewards/{name}": column for name, column in logs["rewards"].items()}
    return columns | {f"extra/{name}": column for name, column in logs["extra"].items()}


def global_positions(positions: list[Tensor], num_rows: int, count: int) -> tuple[Tensor, Tensor]:
    """
    Where the regenerated rows of all ranks go, and where they come from.

    Args:
        positions (`list[torch.Tensor]`):
            For each rank, the rows to regenerate among its own.
        num_rows (`int`):
            Number of rows of all ranks `N`.
        count (`int`):
            Number of rows that each rank generated.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            Rows of the batch, and rows of what was gathered from the ranks.

    Example:

    ```python
    >>> import torch
    >>> where, source = global_positions([torch.tensor([0, 1]), torch.tensor([0])], num_rows=4, count=2)
    >>> where.tolist(), source.tolist()
    ([0, 1, 2], [0, 1, 2])

    ```
    """
    per_rank = num_rows // len(positions)
    where = torch.cat([own + rank * per_rank for rank, own in enumerate(positions)])
    source = torch.cat([torch.arange(own.numel()) + rank * count for rank, own in enumerate(positions)])
    return where, source
