"""From what was measured to what is wrong, why, and what would help. Pure functions of [`Measured`]."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...trainer.trial import Reach
from .measured import Measured
from .probes import KINDS, UNWANTED, Paid, mean_of

# What a run that is stopped would not learn; what is odd; what would help.
LEVELS = ("stop", "look", "hint")
FLAT = 0.02  # share of informative groups below which a run learns nothing
CUT = 0.9  # share of cut answers above which the budget decides, and not the policy
HALF = 0.5


@dataclass(frozen=True)
class Finding:
    """
    Something that was found.

    Args:
        level (`str`):
            `"stop"`: the run would learn nothing, or what nobody wants. `"look"`: something is odd. `"hint"`: an
            option would help.
        name (`str`):
            Short name, as in `docs/check.md`.
        what (`str`):
            What was measured.
        remedy (`str`):
            What to do.
    """

    level: str
    name: str
    what: str
    remedy: str


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def findings_of(measured: Measured) -> list[Finding]:
    """What was found, the worst first."""
    found = [*_of_data(measured)]
    if measured.error is not None:
        columns = ", ".join(measured.setting.columns)
        what = f"sampling stopped with {measured.error}"
        found.append(
            Finding("stop", "fails", what, f"the run would stop there, too. Columns of the dataset: {columns}")
        )
    elif measured.answers:
        found += [*_of_length(measured), *_of_groups(measured), *_of_components(measured), *_of_probes(measured)]
    found += _of_update(measured)
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _of_data(measured: Measured) -> Iterator[Finding]:
    setting = measured.setting
    if setting.num_rows > 1 and setting.distinct_prompts == 1:
        what = f"all {setting.num_rows} rows of the dataset have one prompt"
        yield Finding("look", "one_prompt", what, "check the column that `prompt` was made of")
    if setting.reference is not None and setting.references < 1:
        is_none = setting.references == 0
        what = f"column {setting.reference!r} is empty in {percent(1 - setting.references)} of the rows"
        yield Finding("stop" if is_none else "look", "empty_reference", what, "fill it, or drop those rows")
    if setting.group_size == 1 and setting.compares_within:
        what = "each prompt gets one answer, which is compared with the others of its prompt"
        yield Finding(
            "stop", "group_of_one", what, "set num_generations to 2 or more, or baseline='predicted' or 'batch'"
        )


def _of_length(measured: Measured) -> Iterator[Finding]:
    setting, cut = measured.setting, 1 - measured.ended
    if setting.end_of_turn is not None:
        what = f"the chat template ends an answer with {setting.end_of_turn!r}, and no token of it ends generation"
        remedy = "set eos_token to the token of the template, or correct the template"
        yield Finding("stop", "no_end_of_turn", what, remedy)
    if cut < HALF:
        return
    budget = measured.budget_for(0.95)
    if budget is not None:
        remedy = f"max_completion_length={budget} would let 95 % end"
    elif measured.trial_budget:
        ends = percent(measured.ended_within(measured.trial_budget))
        remedy = f"even {measured.trial_budget} tokens let {ends} end: ask for shorter answers, or check the template"
    else:
        remedy = "raise max_completion_length, or ask for shorter answers"
    what = f"{percent(cut)} of the answers are cut at {setting.budget} tokens"
    if setting.masks_cut and cut >= CUT:
        yield Finding("stop", "cut", f"{what}, and mask_truncated_completions takes those out of the loss", remedy)
    elif cut >= CUT and measured.informative <= 0.1:
        what += f", and the rewards of {percent(1 - measured.informative)} of the prompts do not differ"
        yield Finding("stop", "cut", what, remedy)
    else:
        what += "; their rewards differ all the same, so the run learns from fragments"
        yield Finding("hint", "cut", what, remedy)


def _of_groups(measured: Measured) -> Iterator[Finding]:
    groups = [group for group in measured.groups if len(group) > 1]
    if not groups:
        return
    equal = sum(len({answer.text for answer in group}) == 1 for group in groups) / len(groups)
    if equal >= CUT:
        what = (
            f"all answers of {percent(equal)} of the prompts are one text (temperature={measured.setting.temperature})"
        )
        yield Finding("stop", "equal_answers", what, "raise temperature, or top_p and top_k")
    totals = [answer.total for group in groups for answer in group]
    present = [total for total in totals if total is not None]
    if not present:
        what = f"no reward applies to any of {len(totals)} answers: every function returned None"
        yield Finding("stop", "no_reward", what, "check the columns that the functions read, and what they return")
        return
    share = measured.share
    expected = measured.informative if share is None else share.share
    if not measured.setting.compares_within:
        if max(present) == min(present):
            what = f"all {len(present)} answers are worth {present[0]:g}"
            yield Finding("stop", "flat", what, "check the reward on some answers")
        return
    if expected < FLAT:
        what = f"the rewards of {percent(expected)} of the groups differ, so {percent(1 - expected)} have no gradient"
        yield Finding("stop", "flat", what, _why_flat(measured, present))
    elif expected < HALF:
        high = sum(_mean(group) > _middle(present) for group in measured.totals if _is_flat(group))
        flat = sum(map(_is_flat, measured.totals))
        options = []
        if not measured.setting.samples_again:
            options.append("dynamic_sampling_rounds=1 replaces flat groups")
        if not measured.setting.has_curriculum:
            options.append("curriculum='online' draws prompts whose rewards vary")
        options.append("the preset efficient.yaml compares across prompts, so no group is flat")
        what = (
            f"{percent(1 - expected)} of the groups teach nothing; of {flat} flat prompts, {high} pay above the middle"
        )
        yield Finding("hint", "flat_groups", what, "; ".join(options))


def _is_flat(group: list[float | None]) -> bool:
    return len({total for total in group if total is not None}) <= 1


def _mean(group: list[float | None]) -> float:
    present = [total for total in group if total is not None]
    return sum(present) / len(present) if present else -math.inf


def _middle(values: list[float]) -> float:
    return (min(values) + max(values)) / 2


def _why_flat(measured: Measured, present: list[float]) -> str:
    if max(present) > min(present):
        return "prompts differ and answers do not: easier or harder prompts, a higher temperature, or partial credit"
    reference = next((paid for paid in measured.paid if paid.kind == "reference" and paid.error is None), None)
    if reference is not None and reference.mean > present[0]:
        return "too hard for the policy: easier prompts, a cold start, or partial credit"
    return "check the reward on some answers, and the columns that it reads"


def _of_components(measured: Measured) -> Iterator[Finding]:
    parts = measured.components[1:] if len(measured.components) > 2 else measured.components[:1]
    reference = next((paid for paid in measured.paid if paid.kind == "reference" and paid.error is None), None)
    for part in parts:
        if part.applies == 0:
            if len(parts) > 1:
                what = f"{part.name} returned None for every answer"
                yield Finding("look", "never_applies", what, "check the column that it reads, or drop it")
            continue
        if not part.is_constant:
            continue
        everything = "the reward" if part.name == "total" else part.name
        what = f"{everything} pays {part.low:g} for every answer"
        wanted = math.nan
        if reference is not None:
            wanted = reference.mean if part.name == "total" else reference.values.get(part.name, math.nan)
        level = "stop" if len(parts) == 1 else "look"
        name = "always_earned" if part.low > 0 and not wanted > part.low else "never_earned"
        remedy = "it cancels out: drop it, or make it harder to earn"
        if wanted > part.low:
            what += f", and {wanted:g} for the references"
            remedy = "too hard for the policy: a cold start, easier prompts or partial credit"
        elif name == "never_earned" and not math.isnan(wanted):
            columns = ", ".join(measured.setting.columns)
            what += ", and no more for the references"
            remedy = f"it is broken, or reads another column than theirs; columns: {columns}"
        elif name == "never_earned":
            remedy = "it cancels out: check it on an answer that should earn it, or drop it"
        yield Finding(level, name, what, remedy)


def _of_probes(measured: Measured) -> Iterator[Finding]:
    by_kind = {paid.kind: paid for paid in measured.paid if paid.error is None}
    for paid in measured.paid:
        if paid.error is not None:
            what = f"the reward fails on {KINDS[paid.kind]}: {paid.error}"
            yield Finding("look", "reward_fails", what, "the policy may write this: catch it, or use on_error('skip')")
    unwanted = [by_kind[kind] for kind in UNWANTED if kind in by_kind and kind != "other_reference"]
    reference = by_kind.get("reference")
    if reference is not None:
        better = [(paid, *_compared(paid, reference)) for paid in unwanted]
        told = [
            f"{KINDS[paid.kind]} {paid.mean:.3g} (more for {more} of {count} prompts)"
            for paid, more, count in better
            if more > HALF * count
        ]
        if told:
            what = f"more than for the reference ({reference.mean:.3g}) is paid for {'; '.join(told)}"
            remedy = "the policy would learn to write that: add a gate or a penalty, or check the reward"
            yield Finding("stop", "pays_unwanted", what, remedy)
        written = mean_of([total for group in measured.totals for total in group])
        told = [f"{KINDS[paid.kind]} {paid.mean:.3g}" for paid in unwanted if written < paid.mean < reference.mean]
        if told:
            what = f"more than for the answers of the policy ({written:.3g}) is paid for {'; '.join(told)}"
            remedy = f"the references earn {reference.mean:.3g}, but this is nearer: read completions now and then"
            yield Finding("hint", "near_by", what, remedy)
    else:
        best = max((total for group in measured.totals for total in group if total is not None), default=math.inf)
        told = [f"{KINDS[paid.kind]} {paid.mean:.3g}" for paid in unwanted if paid.mean > best]
        if told:
            what = f"more than for the best of all sampled answers ({best:.3g}) is paid for {'; '.join(told)}"
            yield Finding("look", "pays_unwanted", what, "the policy may learn to write that: add a gate or a penalty")
    other = by_kind.get("other_reference")
    if reference is not None and other is not None:
        higher, count = _compared(reference, other)
        written = mean_of([total for group in measured.totals for total in group])
        if count > 1 and higher == 0 and not reference.mean > written:
            what = "the references pay no more than those of other prompts, and no more than what the policy writes"
            yield Finding("look", "blind", what, "check the columns that the reward reads")


def _compared(one: Paid, other: Paid) -> tuple[int, int]:
    """For how many prompts the first kind of answer pays more, and how many have both."""
    pairs = [(a, b) for a, b in zip(one.totals, other.totals, strict=True) if a is not None and b is not None]
    return sum(a > b + 1e-6 for a, b in pairs), len(pairs)


def _of_update(measured: Measured) -> Iterator[Finding]:
    setting, update = measured.setting, measured.update
    if setting.num_frozen_adapter == setting.num_adapter > 0:
        what = f"all {setting.num_adapter} parameters of the adapter are frozen"
        yield Finding("stop", "frozen_adapter", what, "load it with is_trainable=True, or pass peft_config")
    elif setting.num_frozen_adapter:
        what = f"{setting.num_frozen_adapter} of {setting.num_adapter} parameters of the adapter are frozen"
        yield Finding(
            "look", "frozen_adapter", what, "set requires_grad of all of them, or load with is_trainable=True"
        )
    if setting.learning_rate == 0:
        yield Finding("stop", "no_learning_rate", "the learning rate is 0", "set learning_rate")
    if setting.num_trained == 0:
        what = "no parameter has requires_grad=True"
        yield Finding("stop", "nothing_trained", what, "pass peft_config, load with is_trainable=True, or unfreeze")
    if update is None:
        return
    lost = [reach.name for reach in update.parameters if not math.isfinite(reach.gradient)]
    if lost:
        what = f"the gradient of {_named(lost, update.parameters)} is not finite"
        yield Finding("stop", "not_finite", what, "use bf16 or fp32 in place of fp16; check the reward for huge values")
        return
    unreached = [reach.name for reach in update.parameters if reach.gradient == 0]
    if len(unreached) == len(update.parameters):
        what = f"no gradient reaches any of {len(unreached)} parameters that are to be trained"
        yield Finding("stop", "no_gradient", what, "check which are frozen, and that the adapter is the active one")
    elif unreached:
        what = f"no gradient reaches {_named(unreached, update.parameters)}"
        yield Finding("look", "no_gradient", what, "freeze them, or check that the model uses them")
    zero = [reach for reach in update.parameters if "lora_B" in reach.name]
    if zero and all(reach.is_zero for reach in zero) and setting.learning_rate > 0:
        what = f"all {len(zero)} matrices B of the adapter are zero after an update, so it does nothing"
        yield Finding("stop", "adapter_at_zero", what, "check requires_grad of lora_B, and the learning rate")
    pulled = sum(reach.num_pulled for reach in update.parameters)
    lost_share = 1 - sum(reach.num_moved for reach in update.parameters) / max(1, pulled)
    if setting.learning_rate > 0 and pulled and lost_share > HALF:
        what = (
            f"rounding loses an update at learning rate {update.learning_rate:g} for {percent(lost_share)} of weights"
        )
        remedy = "keep the trained weights in float32 (dtype: float32), or raise learning_rate"
        yield Finding("stop" if lost_share > 1 - FLAT else "look", "nothing_moves", what, remedy)


def _named(names: list[str], everything: list[Reach]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} of {len(everything)} parameters ({shown}{more})"
