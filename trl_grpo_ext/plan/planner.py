"""Turns the wishes of the callbacks into the plan of a generation batch, the same on every rank."""

import inspect
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerControl, TrainerState

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.checks import check_shape
from ..hooks.records import RolloutPlan
from .sampler import PromptSampler
from .sizes import fit_group_sizes, num_groups_that_fit


class Planner:
    """
    Asks the callbacks for prompt weights and group sizes, draws prompts, and fits the sizes to the number of rows.

    Everything it uses (callback state, step, seed, counters) is the same on every rank, so the plans are too, and no
    rank talks to another.

    Args:
        args ([`AdaptiveGRPOConfig`]):
            Configuration.
        dataset ([`~datasets.Dataset`]):
            Training dataset, of which [`check_plannable`] approves.
    """

    def __init__(self, args: AdaptiveGRPOConfig, dataset: Dataset):
        self.args = args
        self.bounds = args.group_size_bounds
        self.sampler = PromptSampler(len(dataset), args.seed, args.shuffle_dataset)

    def plan(self, callbacks: list[GRPOCallback], state: TrainerState, control: TrainerControl) -> RolloutPlan:
        """The plan of the next generation batch."""
        num_rows = self.args.generation_batch_size
        common: dict[str, Any] = {"args": self.args, "state": state, "control": control}
        chooses_sizes = any(callback.overrides("on_group_sizes") for callback in callbacks)
        fewest = self.bounds[0] if chooses_sizes else self.args.num_generations
        fewest = 1 if any(callback.plans_single_rows for callback in callbacks) else fewest
        count = min(num_rows // fewest, self.sampler.num_prompts)
        candidates = self.sampler.draw(count, self._weights(callbacks, state, control))
        wishes = self._wishes(callbacks, common, candidates, num_rows) if chooses_sizes else None
        for callback in callbacks:
            processes = {"num_rows": num_rows, "num_processes": self.args.world_size}
            laid_out = callback.on_plan(**common, prompt_index=candidates, sizes=wishes, **processes)
            if laid_out is not None:
                if wishes is not None:
                    _check_reads_sizes(callback, callbacks)
                used = _check_plan(callback, laid_out, candidates, num_rows)
                self.sampler.put_back(candidates[~torch.isin(candidates, used)])
                return laid_out
        if wishes is None:
            return RolloutPlan(RolloutPlan.equal(num_rows, fewest).group_sizes, candidates)
        num_groups = num_groups_that_fit(wishes, num_rows, *self.bounds)
        self.sampler.keep(num_groups)
        return RolloutPlan(fit_group_sizes(wishes[:num_groups], num_rows, *self.bounds), candidates[:num_groups])

    def _wishes(
        self, callbacks: list[GRPOCallback], common: dict[str, Any], candidates: Tensor, num_rows: int
    ) -> Tensor:
        """Wished sizes of the candidates, or of the first of them."""
        wishes = torch.full((num_rows // self.args.num_generations,), float(self.args.num_generations))
        for callback in callbacks:
            sizes = callback.on_group_sizes(**common, prompt_index=candidates, num_rows=num_rows, sizes=wishes)
            is_tensor = isinstance(sizes, Tensor)
            if sizes is not None and not (is_tensor and sizes.dim() == 1 and len(sizes) <= candidates.numel()):
                returned = f"shape {tuple(sizes.shape)}" if is_tensor else f"a {type(sizes).__name__}"
                raise ValueError(
                    f"{type(callback).__name__}.on_group_sizes returned {returned}: return a tensor with one size for "
                    f"each of the {candidates.numel()} candidates, or for the first of them"
                )
            wishes = wishes if sizes is None else sizes
        return wishes

    def replace(
        self,
        callbacks: list[GRPOCallback],
        plan: RolloutPlan,
        replaced: Tensor,
        state: TrainerState,
        control: TrainerControl,
        discarded: Tensor | None = None,
    ) -> RolloutPlan:
        """The same plan with prompts that are not among the `discarded` in the groups `replaced`, shape `(P,)`."""
        assert plan.prompt_index is not None
        # Where the dataset is too small for fresh prompts, those that go may come back before those that stay repeat.
        stay = plan.prompt_index[~replaced]
        gone = plan.prompt_index[replaced] if discarded is None else discarded.unique()
        exclude = torch.cat([gone[~torch.isin(gone, stay)], stay])
        fresh = self.sampler.draw(int(replaced.sum()), self._weights(callbacks, state, control), exclude=exclude)
        return RolloutPlan(plan.group_sizes, plan.prompt_index.masked_scatter(replaced, fresh))

    def _weights(self, callbacks: list[GRPOCallback], state: TrainerState, control: TrainerControl) -> Tensor | None:
        """Weights `(D,)` of the prompts; `None` where no callback gives any."""
        weights: Tensor | None = None
        for callback in callbacks:
            if not callback.overrides("on_prompt_weights"):
                continue
            before = torch.ones(self.sampler.num_prompts) if weights is None else weights
            new = callback.on_prompt_weights(args=self.args, state=state, control=control, weights=before)
            if new is not None:
                check_shape(callback, "on_prompt_weights", new, before.shape)
                lowest, largest = new.aminmax()
                if not (lowest >= 0 and largest < torch.inf):
                    raise ValueError(
                        f"{type(callback).__name__}.on_prompt_weights returned weights from {lowest} to {largest}: "
                        "return finite weights, none of them negative"
                    )
                weights = new
        return weights

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state_dict)


def _check_plan(callback: GRPOCallback, plan: RolloutPlan, candidates: Tensor, num_rows: int) -> Tensor:
    rows = int(plan.group_sizes.sum())
    if rows != num_rows:
        raise ValueError(
            f"{type(callback).__name__}.on_plan laid out {rows} rows: make the group sizes add up to {num_rows}"
        )
    if plan.prompt_index is None or not torch.isin(plan.prompt_index, candidates).all():
        raise ValueError(
            f"{type(callback).__name__}.on_plan laid out prompts that are not among its candidates: set "
            "RolloutPlan.prompt_index, one entry of prompt_index for each group"
        )
    return plan.prompt_index


def _check_reads_sizes(callback: GRPOCallback, callbacks: list[GRPOCallback]) -> None:
    if "sizes" not in inspect.signature(callback.on_plan).parameters:
        other = next(type(other).__name__ for other in callbacks if other.overrides("on_group_sizes"))
        raise ValueError(
            f"{other} chooses group sizes, and {type(callback).__name__}.on_plan lays out the rows without them: take "
            "the argument `sizes` in on_plan, or leave one of the two out"
        )


def plans(callbacks: list[GRPOCallback]) -> bool:
    """Whether any callback chooses prompts or group sizes, so that TRL's sampler has to step back."""
    hooks = ("on_prompt_weights", "on_group_sizes", "on_resample", "on_plan")
    return any(callback.overrides(hook) for callback in callbacks for hook in hooks)


def check_plannable(args: AdaptiveGRPOConfig, callbacks: list[GRPOCallback], dataset: Any) -> None:
    """Raise `ValueError` for a dataset from which prompts and group sizes cannot be chosen."""
    features = "group_size, curriculum, dynamic_sampling_rounds and rollout"
    if dataset is None:
        raise ValueError(
            f"{features} choose rows of a training dataset, and there is none (the environment owns the data): pass "
            "train_dataset, or leave them off"
        )
    if not isinstance(dataset, Dataset):
        remedies = {dict: "pass one of its splits, such as dataset['train']", list: "pass Dataset.from_list(rows)"}
        remedy = next((remedy for kind, remedy in remedies.items() if isinstance(dataset, kind)), None)
        remedy = remedy or "pass a datasets.Dataset (such as load_dataset(..., streaming=False)), or leave them off"
        raise ValueError(
            f"{features} choose rows of the training dataset, which a {type(dataset).__name__} does not allow: {remedy}"
        )
    if any(callback.overrides("on_group_sizes") for callback in callbacks):
        args.check_group_sizes()
    # Where a callback lays out the rows, a batch may need fewer: but TRL counts steps like this, and would make none.
    num_prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < num_prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows and one generation batch holds {num_prompts} prompts "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}): add "
            "prompts, make the batch smaller, or raise num_generations"
        )
