"""Two real processes (gloo on the CPU): the ranks agree on plans, numbers and weights without talking about them."""

import pytest
import torch
from accelerate import PartialState
from kit import Record, batches_of, has_answer, launch, make_letters, trainer_of, weights_of

from trl_grpo_ext import CriticBaseline


def train(model_path, out, resume=None, flat_rank=None, critic=False, **options) -> dict:
    """What each rank believes about each batch, and what it ends with."""

    def flat_on_one_rank(completion_ids, **kwargs):
        is_flat = PartialState().process_index == flat_rank
        return [0.0 if is_flat else float(ids[0] % 7) for ids in completion_ids]

    reward = has_answer if flat_rank is None else flat_on_one_rank
    callbacks = [Record, *([CriticBaseline] if critic else [])]
    trainer = trainer_of(model_path, make_letters(), f"{out}/run", reward, callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    batches = [
        {
            "prompts": None if batch.prompt_index is None else batch.prompt_index.tolist(),
            "sizes": batch.group_sizes.tolist(),
            "rewards": batch.rewards.tolist(),
            "advantages": batch.advantages.tolist(),
            "lengths": batch.completion_lengths.tolist(),
            "discarded": [] if batch.discarded is None else batch.discarded.prompt_index.tolist(),
            "own_prompts": [row["prompt"] for row in batch.rows],
        }
        for batch in batches_of(trainer)
    ]
    states = [callback.state_dict() for callback in trainer.grpo_callbacks]
    return {"batches": batches, "weights": weights_of(trainer), "states": states, "logs": trainer.state.log_history}


def assert_ranks_agree(first: dict, second: dict) -> None:
    for one, two in zip(first["batches"], second["batches"], strict=True):
        assert {k: v for k, v in one.items() if k != "own_prompts"} == {
            k: v for k, v in two.items() if k != "own_prompts"
        }
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_ranks_leave_out_the_same_passes(model_path, tmp_path):
    """... of which the third over each batch is not computed."""
    options = {"num_iterations": 3, "reuse_drift_limit": 1e-9, "max_steps": 6, "flat_rank": 2}  # neither
    first, second = launch(model_path, tmp_path / "out", train, **options)
    assert_ranks_agree(first, second)
    for rank in (first, second):
        left_out = [entry["reuse/skipped"] for entry in rank["logs"] if "loss" in entry]
        assert left_out == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
        gradients = [entry["grad_norm"] for entry in rank["logs"] if "loss" in entry]
        assert [norm > 0 for norm in gradients] == [True, True, False, True, True, False]


@pytest.mark.parametrize("dynamic_sampling_rounds", [0, 2])
def test_ranks_agree_and_groups_straddle_them(model_path, tmp_path, dynamic_sampling_rounds):
    ranks = launch(
        model_path,
        tmp_path / "out",
        train,
        group_size="variance",
        curriculum="online",
        reward_clip_range=[-1, 1],
        dynamic_sampling_rounds=dynamic_sampling_rounds,
        max_steps=4,
        per_device_train_batch_size=10,
        num_generations=5,
        min_group_size=3,
    )
    assert_ranks_agree(*ranks)
    batches = ranks[0]["batches"]
    assert all(sum(batch["sizes"]) == 20 for batch in batches)
    # Rows of a group on both sides of the border between rank 0 (rows 0 to 9) and rank 1.
    borders = [10 not in torch.tensor(batch["sizes"]).cumsum(0).tolist() for batch in batches]
    assert any(borders)
    for index, batch in enumerate(batches):
        expected = [p for p, n in zip(batch["prompts"], batch["sizes"], strict=True) for _ in range(n)]
        own = ranks[0]["batches"][index]["own_prompts"] + ranks[1]["batches"][index]["own_prompts"]
        assert own == [f"say {chr(ord('a') + p)}" for p in expected]
    discarded = sum(len(batch["discarded"]) for batch in batches)
    assert (discarded > 0) == (dynamic_sampling_rounds > 0)


def test_resume_on_two_ranks(model_path, tmp_path):
    options = {
        "group_size": "variance",
        "curriculum": "online",
        "dynamic_sampling_rounds": 1,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = launch(model_path, tmp_path / "whole", train, **options)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-3")
    resumed = launch(model_path, tmp_path / "resumed", train, **options, resume=checkpoint)
    assert_ranks_agree(*resumed)
    assert resumed[0]["batches"] == whole[0]["batches"][3:]
    for name, value in whole[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], value)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_rank_that_has_only_flat_groups(loss_type, model_path, tmp_path):
    """It still runs its passes, so nobody waits for it, and both ranks end with the weights of a full computation."""
    options = {"flat_rank": 1, "loss_type": loss_type, "max_steps": 4, "learning_rate": 1e-3, "scale_rewards": "none"}
    full = launch(model_path, tmp_path / "full", train, **options)
    lean = launch(model_path, tmp_path / "lean", train, **options, share_prompts=True, skip_zero_advantage=True)
    for name, value in lean[0]["weights"].items():
        assert torch.equal(value, lean[1]["weights"][name])
        assert torch.allclose(value, full[0]["weights"][name], atol=1e-5)
    logs = [[entry for entry in run[0]["logs"] if "reward" in entry] for run in (full, lean)]
    for one, two in zip(*logs, strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["frac_reward_zero_std"] >= 0.5


def test_the_value_model_of_a_critic_is_one_on_all_ranks(model_path, tmp_path):
    options = {"critic": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = launch(model_path, tmp_path / "whole", train, **options)
    resumed = launch(
        model_path, tmp_path / "resumed", train, **options, resume=str(tmp_path / "whole" / "run/checkpoint-2")
    )
    for run in (whole, resumed):
        assert_ranks_agree(*run)
        states = [rank["states"][-1]["value_model"] for rank in run]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert resumed[0]["batches"] == whole[0]["batches"][2:]
    saved = [run[0]["states"][-1]["value_model"] for run in (whole, resumed)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert saved[0]["head.weight"].any()
