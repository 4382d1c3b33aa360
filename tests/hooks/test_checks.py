"""What hooks may return, and what cannot be combined: every refusal says value, rule and remedy."""

from types import SimpleNamespace

import pytest
import torch
from kit import NAN, batch_of

from trl_grpo_ext import GRPOCallback
from trl_grpo_ext.hooks import Conflict
from trl_grpo_ext.hooks.callback import call_hook
from trl_grpo_ext.hooks.checks import check_advantages, check_conflicts, check_finite, check_shape
from trl_grpo_ext.hooks.conflicts import FACTS


class Lays(GRPOCallback):
    def on_plan(self, **kwargs):
        return None


class LaysToo(Lays):
    pass


def against(*others: str) -> GRPOCallback:
    """A callback that can stand none of these."""
    conflicts = tuple(Conflict(other, f"no {{other}} because of {other}") for other in others)
    return type("Picky", (GRPOCallback,), {"conflicts": conflicts})()


def trainer(**facts):
    plain = {"is_vlm": False, "tools": None, "rollout_func": None, "rollout": None, "is_deepspeed_enabled": False}
    return SimpleNamespace(**{**plain, "multi_objective_aggregation": "sum_then_normalize", **facts})


@pytest.mark.parametrize("other", ["on_plan", "Lays", "LaysToo"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_conflict_with_a_hook_or_a_class_is_found_in_any_order(other, is_first):
    picky, lays = against("on_generate", other), LaysToo()
    with pytest.raises(ValueError, match=f"no LaysToo because of {other}"):
        check_conflicts([picky, lays] if is_first else [lays, picky], trainer())
    check_conflicts([picky], trainer())
    check_conflicts([picky, GRPOCallback()], trainer())


def test_a_callback_is_in_no_conflict_with_itself():
    lays = type("Both", (Lays,), {"conflicts": (Conflict("on_plan", "no {other}"),)})()
    check_conflicts([lays], trainer())
    with pytest.raises(ValueError, match="no Lays"):
        check_conflicts([lays, Lays()], trainer())


DEEPSPEED = {"is_deepspeed_enabled": True}
HELD = {
    "vision-language models": {"is_vlm": True},
    "tools": {"tools": [print]},
    "rollout_func": {"rollout_func": print},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
    "DeepSpeed": DEEPSPEED,
    "DeepSpeed ZeRO-3": {
        **DEEPSPEED,
        "args": SimpleNamespace(hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: True)),
    },
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_conflict_with_a_fact_holds_where_the_trainer_has_it(fact):
    check_conflicts([against(fact)], trainer())
    with pytest.raises(ValueError, match=f"no {fact}"):
        check_conflicts([against(fact)], trainer(**HELD[fact]))


def test_a_rollout_of_ours_is_no_rollout_func():
    rollout = SimpleNamespace()
    rollout.generate = type("Bound", (), {"__self__": rollout})()
    check_conflicts([against("rollout_func")], trainer(rollout=rollout, rollout_func=rollout.generate))


def test_twins_are_refused_where_they_are_one_object_or_say_so():
    one, other = Lays(), Lays()
    check_conflicts([one, other], trainer())
    with pytest.raises(ValueError, match=r"two callbacks of the class Lays, .* leave the option unset"):
        check_conflicts([one, other, one], trainer())
    unique = type("Unique", (Lays,), {"is_unique": True})
    check_conflicts([unique(), one], trainer())
    with pytest.raises(ValueError, match="two callbacks of the class Unique"):
        check_conflicts([unique(), one, unique()], trainer())


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, 2), 1.0, [0.0, 0.0]])
def test_another_shape_is_refused(value):
    with pytest.raises(ValueError, match=r"Lays.on_rewards returned .*: return a tensor of shape \(2,\) or \(2, 1\)"):
        check_shape(Lays(), "on_rewards", value, (2,), (2, 1))
    check_shape(Lays(), "on_rewards", torch.zeros(2, 1), (2,), (2, 1))


def test_infinite_rewards_are_refused_with_the_name_of_their_function():
    check_finite(batch_of([[1.0, NAN]]))
    with pytest.raises(ValueError, match=r"infinite \('second' in 2 rows\).*set reward_clip_range"):
        check_finite(batch_of([[[0.0, torch.inf], [1.0, -torch.inf], [1.0, NAN]]]))


@pytest.mark.parametrize("advantages", [[0.0, NAN], [[0.0, 1.0], [torch.inf, 0.0]]])
def test_advantages_that_would_make_weights_nan_are_refused(advantages):
    batch = batch_of([[1.0, 0.0]], completion_lengths=torch.tensor([2, 1]))
    batch.advantages = torch.tensor(advantages)
    with pytest.raises(
        ValueError, match=r"Lays.on_advantages made the advantages of 1 of 2 completions NaN or infinite"
    ):
        check_advantages(Lays(), batch)
    batch.advantages = torch.tensor([[0.0, 1.0], [2.0, NAN]])  # behind the end of the completion
    check_advantages(Lays(), batch)


def test_hooks_are_called_by_name_and_those_of_transformers_arguments_are_there():
    class Reads(GRPOCallback):
        def on_rewards(self, args, batch, **kwargs):
            return args, batch, sorted(kwargs)

    assert Reads.overrides("on_rewards")
    assert not Reads.overrides("on_rollouts")
    of = SimpleNamespace(args="args", state="state", control="control")
    assert call_hook(Reads(), "on_rewards", of, batch="batch") == ("args", "batch", ["control", "state"])
