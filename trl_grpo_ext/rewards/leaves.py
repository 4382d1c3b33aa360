"""Leaves of the reward algebra: rewards that compute their own values, and `as_reward`, which makes one of anything."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..host.calls import is_async
from .base import Reward, Value
from .guards import Guard, run, run_async
from .processes import Workers
from .scoring import Memory, begin, settle


@dataclass(frozen=True, repr=False)
class Leaf(Reward):
    """
    A reward that computes its own values in `score`, and the place where they are checked, cached and counted.

    Args:
        name (`str`, *optional*, defaults to `default_name`):
            Name in the logs.
        errors (`str`, *optional*):
            Set by [`~Reward.on_error`]; `None` is `"skip"` for a guarded leaf, and else `"raise"`.
        cache_size (`int`, *optional*):
            Set by [`~Reward.cached`].
        guard ([`Guard`], *optional*):
            Set by `timeout`, `retry`, `concurrency` and `in_processes`.
    """

    name: str = field(default="", kw_only=True)
    errors: str | None = field(default=None, kw_only=True)
    cache_size: int | None = field(default=None, kw_only=True)
    guard: Guard | None = field(default=None, kw_only=True)
    _memory: Memory = field(default_factory=Memory, init=False, compare=False)
    _workers: Workers = field(default_factory=Workers, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.default_name)

    @property
    def default_name(self) -> str:
        """The name of a leaf that was given none."""
        kind: type = type(self)  # else mypy takes `__name__` for the property below
        return kind.__name__.lower()

    # A property, so that `Leaf.__name__` is still the name of the class.
    @property
    def __name__(self) -> str:
        return self.name

    @property
    def skips(self) -> bool:
        """Whether rows without a usable value are left out, rather than stopping the training."""
        return self.errors == "skip" or (self.errors is None and self.guard is not None)

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        """Values for the rows, one each; what a subclass writes."""
        raise NotImplementedError

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        return self.evaluate(
            {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **kwargs}
        )

    def evaluate(self, call: dict[str, Any]) -> Any:
        """Checked values for TRL's keyword arguments `call`."""
        job = begin(self, call)
        return settle(self, call, job, run(self, job))

    def leaves(self) -> list["Leaf"]:
        return [self]

    def map_leaves(self, change: Callable[["Leaf"], "Leaf"]) -> "Leaf":
        return change(self)

    def _constructor(self) -> str:
        shown = []
        for item in fields(self):
            value = getattr(self, item.name)
            default = self.default_name if item.name == "name" else item.default
            # `errors`, `cache_size` and `guard` are shown as the methods that set them.
            if item.init and item.name not in ("errors", "cache_size", "guard") and value != default:
                shown.append(f"{item.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __repr__(self) -> str:
        cached = "" if self.cache_size is None else f".cached(max_size={self.cache_size})"
        guarded = "" if self.guard is None else self.guard.source()
        shown = self.errors is not None and self.errors != ("raise" if self.guard is None else "skip")
        return self._constructor() + guarded + cached + (f".on_error({self.errors!r})" if shown else "")


@dataclass(frozen=True, repr=False)
class FunctionReward(Leaf):
    """A leaf around a TRL reward function; made by [`as_reward`]."""

    function: Callable[..., Any]

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        return self.function(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)

    @property
    def default_name(self) -> str:
        return callable_name(self.function)

    def _constructor(self) -> str:
        named = "" if self.name == self.default_name else f", name={self.name!r}"
        return f"as_reward({self.default_name}{named})"


@dataclass(frozen=True, repr=False)
class AsyncFunctionReward(FunctionReward):
    """A leaf around an `async` TRL reward function; made by [`as_reward`]."""

    async def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[Value]:
        values: list[Value] = await super().__call__(prompts, completions, completion_ids, **kwargs)
        return values

    async def evaluate(self, call: dict[str, Any]) -> list[Value]:
        job = begin(self, call)
        return settle(self, call, job, await run_async(self, job))


def callable_name(function: Callable[..., Any]) -> str:
    """The name TRL's logs use for a reward function: that of the function, or of the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def as_reward(x: Any, name: str | None = None) -> Reward:
    """
    Make a [`Reward`] of anything that TRL takes as a reward.

    Args:
        x (`Callable`, `str`, [`~transformers.PreTrainedModel`], `torch.nn.Module` or [`Reward`]):
            A reward function with TRL's signature (sync or async; a function, a `functools.partial` or an object with
            `__call__`), a model with a scalar head, or such a model's hub id or folder. See [`RewardModel`].
        name (`str`, *optional*):
            Name in the logs; defaults to that of the function, or the last part of the model's id.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> def shout(completions, **kwargs):
    ...     return [float(text.isupper()) for text in completions]
    >>> reward = as_reward(shout)
    >>> reward.__name__, reward(prompts=[""], completions=["YES"])
    ('shout', [1.0])

    ```
    """
    if isinstance(x, Reward):
        return x if name is None else x.named(name)
    if isinstance(x, type):
        raise TypeError(f"{x.__name__} is a class: make an object of it first, {x.__name__}(...)")
    if isinstance(x, str) or hasattr(x, "named_parameters"):  # a model, without importing torch to ask
        from .models import RewardModel

        return RewardModel(x, name=name or "")
    if not callable(x):
        raise TypeError(f"{x!r} is no reward: pass a reward function, a model, or a model's hub id or folder")
    kind = AsyncFunctionReward if is_async(x) else FunctionReward
    return kind(x, name=name or "")
