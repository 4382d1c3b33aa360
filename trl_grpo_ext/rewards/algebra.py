"""The reward algebra: rewards, their leaves, and the trees that operators make of them.

A [`Leaf`] computes its own values. A [`Composite`] joins rewards, schedules and numbers by an operator (`ops.py`). A
call evaluates each distinct leaf once (`scoring.py`, `guards.py`), then each row (`trees.py`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, TypeAlias

from ..host.calls import is_async
from . import ops
from .errors import wrong_signature_told
from .guards import Guard, LeafSettings, run, run_async
from .models import load_tokenizer, model_id, model_scores
from .naming import callable_name, constructor_source, expression, leaf_source
from .processes import Workers
from .schedules import Constant, Schedule
from .scoring import Memory, checked_values, job_of, own_rows
from .trees import rewards_in, values_of_rows

Value: TypeAlias = float | None
Operand: TypeAlias = "Reward | Schedule"


@dataclass(frozen=True)
class Reward(ops.Operators["Reward"], LeafSettings["Reward"]):
    """
    A TRL reward function that composes: `1.0 * Relevance("reference") + 0.5 * Harmlessness() - 0.001 * Length()`.

    Call it as TRL does, with the keyword arguments `prompts`, `completions`, `completion_ids` and the dataset columns.
    It returns one `float` or `None` for each completion. Rewards are immutable: every operator and method returns a new
    one. Make one from a function, a model or a hub id with [`as_reward`], or use the ready ones of this package.

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import as_reward
    >>> def digits(completions, **kwargs):
    ...     return [float(sum(character.isdigit() for character in text)) for text in completions]
    >>> reward = as_reward(digits).clip(0, 2) + 0.5 * as_reward(digits)
    >>> reward(prompts=["", ""], completions=["4 + 4 = 8", "eight"])
    [3.5, 0.0]
    >>> reward
    as_reward(digits).clip(low=0.0, high=2.0) + 0.5 * as_reward(digits)
    >>> reward.__name__
    'clip(digits)+digits'

    ```
    """

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        """One value for each completion: a list, or a coroutine of a list where the tree holds an async reward."""
        call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **kwargs}
        return self.evaluate(call)

    def evaluate(self, call: dict[str, Any]) -> Any:
        """One value for each completion, from TRL's keyword arguments `call`."""
        raise NotImplementedError

    @staticmethod
    def of(x: Any, name: str | None = None) -> "Reward":
        """[`as_reward`] under another name."""
        return as_reward(x, name)

    def leaves(self) -> list["Leaf"]:
        """The distinct leaves of the tree, from left to right."""
        raise NotImplementedError

    def named(self, name: str) -> "Reward":
        """The same reward under another name, which its metrics and its column of the completions table carry."""
        if not name:
            raise ValueError(f"named: {name!r} is empty: pass the name that the logs shall show")
        return replace(self, name=name)  # type: ignore[call-arg]

    def _join(self, op: ops.Op, *operands: Any) -> "Composite":
        return composite_of(op, *operands)


@dataclass(frozen=True, repr=False)
class Leaf(Reward):
    """
    A reward that computes its own values in `score`. They are checked, cached and counted here.

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

    reads_siblings: ClassVar[bool] = False  # whether the trainer adds the answers of the whole group as a column

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.default_name)

    @property
    def default_name(self) -> str:
        """The name of a leaf without a name of its own."""
        kind: type = type(self)  # else mypy takes `__name__` for the property below
        return kind.__name__.lower()

    # A property, so that `Leaf.__name__` is still the name of the class.
    @property
    def __name__(self) -> str:
        return self.name

    @property
    def skips(self) -> bool:
        """Whether rows without a usable value are left out, instead of stopping the run."""
        return self.errors == "skip" or (self.errors is None and self.guard is not None)

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Any:
        """One value for each row; a subclass writes this method."""
        raise NotImplementedError

    def evaluate(self, call: dict[str, Any]) -> Any:
        job = job_of(self, call)
        return checked_values(self, call, job, run(self, job))

    def leaves(self) -> list["Leaf"]:
        return [self]

    def map_leaves(self, change: Callable[["Leaf"], "Leaf"]) -> "Leaf":
        return change(self)

    def _constructor(self) -> str:
        return constructor_source(self)

    def __repr__(self) -> str:
        return leaf_source(self)


@dataclass(frozen=True, repr=False)
class AsyncLeaf(Leaf):
    """A leaf whose `score` is async."""

    async def __call__(self, *args: Any, **kwargs: Any) -> list[Value]:
        values: list[Value] = await super().__call__(*args, **kwargs)
        return values

    async def evaluate(self, call: dict[str, Any]) -> list[Value]:
        job = job_of(self, call)
        return checked_values(self, call, job, await run_async(self, job))


@dataclass(frozen=True, repr=False)
class FunctionReward(Leaf):
    """A leaf around a TRL reward function, made by [`as_reward`]. Each call gets its own copy of the rows."""

    function: Callable[..., Any]

    def score(self, **call: Any) -> Any:  # type: ignore[override]
        with wrong_signature_told(self.name, self.function, call):
            return self.function(**own_rows(call))

    @property
    def default_name(self) -> str:
        return callable_name(self.function)

    def _constructor(self) -> str:
        named = "" if self.name == self.default_name else f", name={self.name!r}"
        return f"as_reward({self.default_name}{named})"


@dataclass(frozen=True, repr=False)
class AsyncFunctionReward(AsyncLeaf, FunctionReward):
    """A leaf around an `async` TRL reward function, made by [`as_reward`]."""

    async def score(self, **call: Any) -> Any:  # type: ignore[override]
        with wrong_signature_told(self.name, self.function, call):
            return await self.function(**own_rows(call))


@dataclass(frozen=True, repr=False)
class RewardModel(Leaf):
    """
    The score of a reward model for prompt and completion: the first logit of a sequence classification model.

    TRL computes the same score for a model in `reward_funcs`, except that `chat_template_kwargs` do not apply here. A
    hub id or folder is loaded at the first call, once for each process and device. It is pickled without its weights.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `torch.nn.Module`):
            Hub id or folder, or the model itself.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the tokenizer saved with the model.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass.
        device (`str` or `torch.device`, *optional*):
            Defaults to the device of this training process for an id, and for a model object to where it is.
        max_length (`int`, *optional*):
            Longest input in tokens. Longer ones lose their beginning, so that the completion's end is always scored.
        name (`str`, *optional*, defaults to the last part of the model's id):
            Name in the logs.

    Example:
    ```python
    >>> RewardModel("org/my-reward-model").__name__
    'my-reward-model'

    ```
    """

    model: Any
    tokenizer: Any = None
    batch_size: int = field(default=16, kw_only=True)
    device: Any = field(default=None, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"RewardModel: batch_size={self.batch_size} scores nothing: pass at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"RewardModel: max_length={self.max_length} leaves no token: pass at least 1, or None")
        if self.tokenizer is None and not model_id(self.model):
            raise ValueError(
                f"RewardModel: {type(self.model).__name__} does not say where it was loaded from: pass tokenizer=..."
            )

    @property
    def default_name(self) -> str:
        return model_id(self.model).rstrip("/").split("/")[-1] or type(self.model).__name__

    def _constructor(self) -> str:
        text = super()._constructor()
        return text if isinstance(self.model, str) else text.replace(repr(self.model), f"<{type(self.model).__name__}>")

    def score(self, prompts: list[Any], completions: list[Any], *args: Any, **kwargs: Any) -> Any:
        tokenizer = load_tokenizer(model_id(self.model)) if self.tokenizer is None else self.tokenizer
        return model_scores(self.model, tokenizer, prompts, completions, self.batch_size, self.device, self.max_length)


def as_reward(x: Any, name: str | None = None) -> Reward:
    """
    Make a [`Reward`] of anything that TRL takes as a reward.

    Args:
        x (`Callable`, `str`, [`~transformers.PreTrainedModel`], `torch.nn.Module` or [`Reward`]):
            A reward function with TRL's signature (sync or async; a function, a `functools.partial` or an object with
            `__call__`), a model with a scalar head, or such a model's hub id or folder. See [`RewardModel`].
        name (`str`, *optional*):
            Name in the logs. Defaults to the name of the function, or the last part of the model's id.

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
        return RewardModel(x, name=name or "")
    if not callable(x):
        raise TypeError(f"{x!r} is no reward: pass a reward function, a model, or a model's hub id or folder")
    kind = AsyncFunctionReward if is_async(x) else FunctionReward
    return kind(x, name=name or "")


def composite_of(op: ops.Op, *operands: Any) -> "Composite":
    """The composite of `op` over rewards, schedules, numbers and TRL reward functions; async where a leaf is async."""
    children: list[Operand] = []
    for operand in operands:
        if not ops.is_operand(operand):
            raise TypeError(f"{operand!r} is no reward, reward function, schedule or number: pass one of these")
        if isinstance(operand, Reward | Schedule):
            children.append(operand)
        else:
            children.append(Constant(operand) if isinstance(operand, Real) else as_reward(operand))  # type: ignore[arg-type]
    leaves = [leaf for child in children if isinstance(child, Reward) for leaf in child.leaves()]
    return (AsyncComposite if any(map(is_async, leaves)) else Composite)(op, tuple(children))


@dataclass(frozen=True, repr=False)
class Composite(Reward):
    """
    An operator over rewards, schedules and constants; made by the operators and methods of [`Reward`].

    With TRL's `log_metric` and `log_extra` among the keyword arguments, each distinct leaf logs its raw mean as
    `rewards/{leaf}/mean` and its raw values as a column of the completions table. Each scheduled weight logs
    `reward_weights/{what it weighs}`.
    """

    op: ops.Op
    children: tuple[Operand, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        names = [leaf.name for leaf in self.leaves()]
        if not names:
            raise TypeError(f"{self!r} holds no reward: pass at least one")
        for name in names:
            if names.count(name) > 1:
                remedy = 'tell them apart with .named("another name")'
                raise ValueError(f"two different rewards are called {name!r}: {remedy}")
        if self.__name__ in names:
            why = "is the name of a reward inside it, and their metrics would mix"
            raise ValueError(f"{self.__name__!r} {why}: choose another one")

    @property
    def __name__(self) -> str:
        return expression(self, naming=True)

    def __repr__(self) -> str:
        return expression(self, naming=False)

    def evaluate(self, call: dict[str, Any]) -> Any:
        leaves = self.leaves()
        return values_of_rows(self, call, leaves, [leaf.evaluate(call) for leaf in leaves])

    def leaves(self) -> list[Leaf]:
        distinct: list[Leaf] = []
        for node in rewards_in(self):
            if isinstance(node, Leaf) and node not in distinct:
                distinct.append(node)
        return distinct

    def map_leaves(self, change: Callable[[Leaf], Leaf]) -> "Composite":
        children = (child.map_leaves(change) if isinstance(child, Reward) else child for child in self.children)
        return replace(self, children=tuple(children))


@dataclass(frozen=True, repr=False)
class AsyncComposite(Composite):
    """A composite with an async leaf. The async leaves wait together, and one thread runs the others meanwhile."""

    async def __call__(self, *args: Any, **kwargs: Any) -> list[Value]:
        values: list[Value] = await super().__call__(*args, **kwargs)
        return values

    async def evaluate(self, call: dict[str, Any]) -> list[Value]:
        leaves = self.leaves()
        blocking = [leaf for leaf in leaves if not is_async(leaf)]
        waiting = [leaf for leaf in leaves if is_async(leaf)]
        ready, *awaited = await asyncio.gather(
            asyncio.to_thread(lambda: [leaf.evaluate(call) for leaf in blocking]),
            *(leaf.evaluate(call) for leaf in waiting),
            return_exceptions=True,  # so that no coroutine is left running when another one fails
        )
        for result in (ready, *awaited):
            if isinstance(result, BaseException):
                raise result
        columns = {id(leaf): values for leaf, values in zip(blocking + waiting, [*ready, *awaited], strict=True)}
        return values_of_rows(self, call, leaves, [columns[id(leaf)] for leaf in leaves])


def minimum(*operands: Any) -> Composite:
    """
    The smallest operand for each row, over those that are not `None`; `None` where no reward among them applies.

    Args:
        operands ([`Reward`], `float`, schedule or TRL reward function):
            At least one of them a reward or a reward function.

    Returns:
        [`Reward`]

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import Length
    >>> length = Length("characters")
    >>> minimum(length, 3)(prompts=["", ""], completions=["ab", "abcde"])
    [2.0, 3.0]
    >>> maximum(length, 3)(prompts=["", ""], completions=["ab", "abcde"])
    [3.0, 5.0]

    ```
    """
    return composite_of(ops.Extreme("minimum"), *operands)


def maximum(*operands: Any) -> Composite:
    """The largest operand for each row; see [`minimum`]."""
    return composite_of(ops.Extreme("maximum"), *operands)
