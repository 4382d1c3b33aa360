"""With nothing set, training is bit for bit that of stock TRL; with it set, TRL's logs stay true."""

import pytest
from kit import Record, batches_of, count_vowels, has_answer, have_same_weights, make_letters
from peft import LoraConfig
from trl import GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOTrainer

TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def run(make_trainer, cls, lora=False, evaluate=False, **given):
    if lora:
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if evaluate:
        given["eval_dataset"] = make_letters().select(range(4))
    trainer = make_trainer(cls.__name__, cls=cls, reward_funcs=[count_vowels, has_answer], **given)
    trainer.train()
    logs = [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in trainer.state.log_history
    ]
    return trainer, logs


SETTINGS = {
    "plain": {},
    "conversational": {"conversational": True},
    "peft": {"lora": True},
    "beta": {"beta": 0.1},
    "peft_beta": {"lora": True, "beta": 0.1},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "num_iterations": {"num_iterations": 2, "max_steps": 4},
    "steps_per_generation": {"steps_per_generation": 2, "max_steps": 4},
    "eval": {"evaluate": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8},
    "scale_batch": {"scale_rewards": "batch", "loss_type": "dr_grpo"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_off_is_identical(name, make_trainer, conversational):
    options = dict(SETTINGS[name])
    if options.pop("conversational", False):
        options["dataset"] = conversational
    stock, stock_logs = run(make_trainer, GRPOTrainer, **options)
    ours, our_logs = run(make_trainer, AdaptiveGRPOTrainer, **options)
    assert our_logs == stock_logs
    assert have_same_weights(ours, stock)


def test_watching_changes_nothing_either(make_trainer):
    stock, stock_logs = run(make_trainer, GRPOTrainer)
    ours, our_logs = run(make_trainer, AdaptiveGRPOTrainer, callbacks=[Record])
    assert have_same_weights(ours, stock)
    for entry, expected in zip(our_logs, stock_logs, strict=True):
        assert {key: entry[key] for key in expected} == expected
    batches = batches_of(ours)
    assert len(batches) == 3
    assert batches[0].prompt_index is None
    assert batches[0].completion_lengths.shape == (8,)
