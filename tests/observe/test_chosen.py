"""The options that somebody chose make the configuration again, and what follows from them is not among them."""

import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.config import EFFICIENT
from trl_grpo_ext.observe.chosen import as_plain, chosen_options

BASE = {"output_dir": "x", "bf16": False, "use_cpu": True}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
VALUES = {
    "per_device_train_batch_size": st.sampled_from([2, 4, 8, 16]),
    "gradient_accumulation_steps": st.sampled_from([1, 2, 4]),
    "steps_per_generation": st.sampled_from([1, 2, 4]),
    "generation_batch_size": st.sampled_from([16, 32, 64]),
    "num_generations": st.sampled_from([2, 4, 8]),
    "group_size": st.sampled_from(["fixed", "single", "variance"]),
    "baseline": st.sampled_from(["group", "batch", "predicted"]),
    "scale_rewards": st.sampled_from(["group", "batch", "none", True]),
    "activation_checkpointing": st.booleans(),
    "lr_scheduler_type": st.sampled_from(["linear", "constant"]),
    "learning_rate": st.sampled_from([1e-6, 1e-5, 1.0]),
    "curriculum": st.sampled_from(["none", "online"]),
    "debug": st.sampled_from(["", "underflow_overflow"]),
    "reward_weights": st.sampled_from([None, [1.0, 0.5]]),
}


def made(**options):
    return AdaptiveGRPOConfig(**BASE, **options)


def chosen(args) -> dict:
    return {name: value for name, value in chosen_options(args.to_dict(), type(args)).items() if name not in BASE}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_was_chosen_makes_the_configuration(options):
    try:
        args = made(**options)
    except ValueError:
        assume(False)
    found = chosen(args)
    again = made(**{name: [] if name == "debug" and not value else value for name, value in found.items()})
    assert as_plain(again.to_dict()) == as_plain(args.to_dict())
    # Nothing that nobody set, but for another name of the size of a batch.
    assert found.keys() - {"steps_per_generation"} <= options.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps"}),
        ({"generation_batch_size": 32}, {"steps_per_generation"}),
        ({"activation_checkpointing": False}, {"activation_checkpointing"}),
        (BEST, BEST.keys()),
        ({"group_size": "single"}, {"group_size"}),
        (EFFICIENT, EFFICIENT.keys() - {"scale_rewards"}),
    ],
)
def test_what_follows_is_left_out(options, expected):
    assert chosen(made(**options)).keys() == expected


def test_processes_are_no_choice():
    given_ = {**made(per_device_train_batch_size=2, num_generations=2).to_dict(), "generation_batch_size": 16}
    given_["num_generations"] = 8  # which 8 processes of 2 rows allow, and one does not
    found = chosen_options(given_).keys() - BASE.keys()
    assert found == {"per_device_train_batch_size"}


def test_whatever_a_file_says_is_soon_read():
    odd = [10**12, -1, 0, float("nan"), float("inf"), "", "{", "x" * 100_000, [], {"a": [1]}, None, True]
    start = time.monotonic()
    for name in VALUES:
        for value in odd:
            assert set(chosen_options({"group_size": "single", name: value})) <= {"group_size", name}
    assert time.monotonic() - start < 60
