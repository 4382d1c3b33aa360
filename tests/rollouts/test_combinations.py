"""Every rollout with whatever else there is, and resumed."""

import pytest
import torch
from kit import batches_of, have_same_weights, interrupt, logs_of, weights_of
from peft import LoraConfig
from rollout_helpers import first_turns, has_letter, length_of_text, make_conversations

ROLLOUTS = {
    "shared": {"rollout": "multi_turn", "turn_columns": ["letter"]},
    "independent": {"rollout": "multi_turn", "turn_columns": ["letter"], "history": "independent"},
    "hierarchical": {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 2, "num_generations": 2},
}
COMBINATIONS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 40},  # some end in time
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "iterations": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"reward_clip_range": [0, 4], "reward_clip_quantiles": [0.1, 0.9], "scale_rewards": "batch"},
    "clipping totals": {"reward_clip_range": [0, 4], "reward_clip_quantiles": [0.1, 0.9], "reward_clip_on": "total"},
    "curriculum": {"curriculum": "online"},
    "adapter": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "beta": 0.1},
}


def given_of(rollout: str, slices: int = 1, **options) -> dict:
    """What a trainer is given; a batch has 16 sequences, or two trees, whatever the number of its slices."""
    is_tree = rollout == "hierarchical"
    data = {"dataset": first_turns() if is_tree else make_conversations(), "reward_funcs": length_of_text}
    return data | {"per_device_train_batch_size": (18 if is_tree else 16) // slices} | ROLLOUTS[rollout] | options


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_trains(name, rollout, make_trainer):
    rewards = [length_of_text] if rollout == "hierarchical" else [length_of_text, has_letter]
    slices = 2 if name in ("iterations", "accumulation") else 1
    options = {"max_steps": 2, "reward_funcs": rewards, **COMBINATIONS[name]}
    trainer = make_trainer(**given_of(rollout, slices, **options))
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(value.isfinite().all() for value in after.values())
    assert "train_loss" in trainer.state.log_history[-1]


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_resume_equals_no_interruption(rollout, make_trainer):
    def seen(trainer):
        fields = ("prompt_index", "turns", "parents", "rewards", "advantages")
        return [str([getattr(batch, name).tolist() for name in fields]) for batch in batches_of(trainer)]  # NaN is NaN

    options = given_of(rollout, max_steps=6, curriculum="online")
    whole, cut, resumed = interrupt(lambda out: make_trainer(out, **options), 3)
    assert seen(cut) + seen(resumed) == seen(whole)
    assert have_same_weights(whole, resumed)
    assert logs_of(whole)[-1]["reward"] == logs_of(resumed)[-1]["reward"]
