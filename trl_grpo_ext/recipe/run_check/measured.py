"""What a check measured, as plain data. [`~trl_grpo_ext.recipe.run_check.findings.findings_of`] reads it."""

from dataclasses import dataclass, field

from ...trainer.trial import Drawn, Update
from .maths import Component, Share, ended_share, enough_budget
from .probes import Paid


@dataclass(frozen=True)
class Setting:
    """
    What the run was told, as far as the findings depend on it.

    Args:
        budget (`int`), group_size (`int`), learning_rate (`float`), temperature (`float`):
            `max_completion_length`, `num_generations` (1 where groups are single), and the options of those names.
        compares_within (`bool`):
            Whether the baseline is that of the group.
        masks_cut (`bool`):
            `mask_truncated_completions`.
        columns (`list[str]`), reference (`str`, *optional*), references (`float`):
            Columns of the dataset, that with the references, and the share of rows that have one.
        distinct_prompts (`int`), num_rows (`int`):
            Of the dataset; 0 for a stream. At most the first 5000 rows are compared.
        num_trained (`int`):
            Parameters with `requires_grad`.
        num_frozen_adapter (`int`), num_adapter (`int`):
            Parameters of adapters, and how many of them are frozen.
        end_of_turn (`str`, *optional*):
            What the template writes after an answer, where no token that ends generation is in it.
        samples_again (`bool`), has_curriculum (`bool`):
            Whether `dynamic_sampling_rounds` and `curriculum` are set.
    """

    budget: int
    group_size: int
    learning_rate: float
    temperature: float = 1.0
    compares_within: bool = True
    masks_cut: bool = False
    columns: list[str] = field(default_factory=list)
    reference: str | None = None
    references: float = 1.0
    distinct_prompts: int = 0
    num_rows: int = 0
    num_trained: int = 1
    num_frozen_adapter: int = 0
    num_adapter: int = 0
    end_of_turn: str | None = None
    samples_again: bool = False
    has_curriculum: bool = False


@dataclass(frozen=True)
class Plan:
    """
    What the run will do, from what was measured.

    Args:
        rollouts (`int`), prompts (`float`):
            Of an optimizer step, over all processes.
        steps (`float`), steps_per_epoch (`float`, *optional*):
            Optimizer steps.
        sample_seconds (`float`), reward_seconds (`float`), update_seconds (`float`):
            Of an optimizer step. Rewards are a part of sampling.
        memory (`float`):
            Largest use so far in GiB, on the GPU where there is one.
        on_gpu (`bool`):
            Whether it is that of a GPU.
    """

    rollouts: int
    prompts: float
    steps: float
    steps_per_epoch: float | None
    sample_seconds: float
    reward_seconds: float
    update_seconds: float
    memory: float
    on_gpu: bool

    @property
    def step_seconds(self) -> float:
        return self.sample_seconds + self.update_seconds


@dataclass(frozen=True)
class Measured:
    """
    What a check measured.

    Args:
        setting ([`Setting`]):
            What the run was told.
        answers (`list[Drawn]`):
            All answers, with the number of the prompt's group in `group`.
        trial_lengths (`list[tuple[int, bool]]`), trial_budget (`int`):
            Lengths of some longer answers and whether they ended; 0 where none were sampled.
        shares (`list[Share]`):
            Expected share of informative groups of several sizes.
        components (`list[Component]`):
            Parts of the reward; the first is the total.
        paid (`list[Paid]`):
            What the reward pays for answers that nobody wants.
        update ([`Update`], *optional*):
            What an update does; `None` where none was tried.
        plan ([`Plan`], *optional*):
            What the run will do.
        error (`str`, *optional*):
            What stopped the check.
        seconds (`float`):
            What the check took.
    """

    setting: Setting
    answers: list[Drawn] = field(default_factory=list)
    trial_lengths: list[tuple[int, bool]] = field(default_factory=list)
    trial_budget: int = 0
    shares: list[Share] = field(default_factory=list)
    components: list[Component] = field(default_factory=list)
    paid: list[Paid] = field(default_factory=list)
    update: Update | None = None
    plan: Plan | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def groups(self) -> list[list[Drawn]]:
        """The scored answers of each prompt."""
        groups: dict[int, list[Drawn]] = {}
        for answer in self.answers:
            if answer.is_scored:
                groups.setdefault(answer.group, []).append(answer)
        return list(groups.values())

    @property
    def totals(self) -> list[list[float | None]]:
        return [[answer.total for answer in group] for group in self.groups]

    @property
    def ended(self) -> float:
        """Share of the answers that end in time."""
        return sum(answer.ended for answer in self.answers) / max(1, len(self.answers))

    @property
    def _lengths(self) -> tuple[list[int], list[bool]]:
        # Longer answers replace those that were cut: both are of one policy, and cut ones only say "later".
        pairs = [(answer.length, answer.ended) for answer in self.answers] + self.trial_lengths
        return [length for length, _ in pairs], [ends for _, ends in pairs]

    def budget_for(self, share: float) -> int | None:
        """Budget within which that share of the answers ends; `None` where none that was tried is enough."""
        return enough_budget(*self._lengths, share)

    def ended_within(self, budget: int) -> float:
        return ended_share(*self._lengths, budget)

    @property
    def share(self) -> Share | None:
        """Expected share of informative groups at the size of the run."""
        return next((share for share in self.shares if share.size == self.setting.group_size), None)

    @property
    def informative(self) -> float:
        """Share of the sampled groups whose rewards differ."""
        totals = [{total for total in group if total is not None} for group in self.totals]
        return sum(len(values) > 1 for values in totals) / max(1, len(totals))
