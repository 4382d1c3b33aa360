"""A saving is tried once on a few tokens before it is used: what a configuration does not tell, the numbers do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..host.processes import gather_values


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """While open, `model` is in evaluation mode, without dropout; then each of its modules is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def relative_error(found: Tensor, expected: Tensor) -> float:
    """
    Root mean square of the differences, in units of the spread of `expected`.

    Example:

    ```python
    >>> import torch
    >>> relative_error(torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([1.0, 3.0, float("inf")]))  # (1/3)^0.5 / 1
    0.5773...

    ```
    """
    found, expected = found.float(), expected.float()
    difference = torch.where(found == expected, 0.0, found - expected)
    finite = expected[expected.isfinite()]
    spread = (finite - finite.mean()).square().mean().sqrt().clamp(min=1e-6)
    return (difference.square().mean().sqrt() / spread).item()


def precision_of(dtype: torch.dtype) -> float:
    """Relative size of a rounding error in products of matrices of this type."""
    has_tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-11 if dtype == torch.float32 and has_tf32 else torch.finfo(dtype).eps / 2


@contextmanager
def nudged(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """While open, embeddings are off by a rounding error, which shows what a model makes of one."""

    def nudge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(output.size(-1), device=output.device) % 2)
        # Twice, since half of it may be rounded away.
        return (output.float() * (1 + 2 * precision_of(dtype) * sign)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def rounding(noise: float) -> float:
    """
    Relative error up to which two ways to compute the same numbers differ by rounding alone.

    Rounding grows with the depth of a model, so what one error becomes is measured.

    Args:
        noise (`float`):
            Relative error of the results where the embeddings are [`nudged`].

    Example:

    ```python
    >>> rounding(noise=1e-6), rounding(noise=0.02)
    (2e-05, 0.04)

    ```
    """
    return min(max(2 * noise, 2e-5), 0.1)


def why_not(compare: Callable[[], tuple[Tensor, Tensor, float]], what: str) -> str | None:
    """
    Why a saving is not used, from what a trial of it computes. All processes come to the same answer.

    Args:
        compare (`Callable`):
            Returns what is computed with the saving and without it, and the relative error that is rounding.
        what (`str`):
            What is computed, for the reason.

    Returns:
        `str`, *optional*: the reason of the first process that has one, or `None` where numbers agree on all.

    Example:

    ```python
    >>> import torch
    >>> why_not(lambda: (torch.ones(2), torch.tensor([1.0, 3.0]), 0.001), "logits")
    'in a trial, logits were off by 1.4 of their spread (at most 0.001 is rounding)'
    >>> why_not(lambda: {}["cache"], "logits")
    "in a trial, computing logits failed with KeyError: 'cache'"

    ```
    """
    reason = None
    try:
        found, expected, limit = compare()
        error = relative_error(found, expected)
        if not error <= limit:  # NaN, too
            reason = f"in a trial, {what} were off by {error:.2g} of their spread (at most {limit:.2g} is rounding)"
    except Exception as error:  # any: a model may be anything, and without the saving it may well work
        first_line = (str(error).splitlines() or [""])[0][:200]
        reason = f"in a trial, computing {what} failed with {type(error).__name__}: {first_line}"
    return next((other for other in gather_values(reason) if other is not None), None)
