"""With nothing set, training is bit for bit that of stock TRL; with it set, TRL's logs stay true."""

import pytest
import torch
from kit import config_kwargs, count_vowels, has_answer
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback

TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def run(trainer_class, config_class, path, dataset, out, *, lora=False, callbacks=None, evaluate=False, **options):
    trainer = trainer_class(
        model=path,
        reward_funcs=[count_vowels, has_answer],
        args=config_class(**config_kwargs(out, **options)),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if evaluate else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=callbacks,
    )
    trainer.train()
    logs = [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return logs, weights


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
def test_off_is_identical(name, model_path, dataset, conversational, tmp_path):
    options = dict(SETTINGS[name])
    data = conversational if options.pop("conversational", False) else dataset
    stock_logs, stock = run(GRPOTrainer, GRPOConfig, model_path, data, tmp_path / "a", **options)
    our_logs, ours = run(AdaptiveGRPOTrainer, AdaptiveGRPOConfig, model_path, data, tmp_path / "b", **options)
    assert our_logs == stock_logs
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


class Watch(GRPOCallback):
    def __init__(self):
        self.batches = []

    def on_rollouts(self, args, state, control, batch, **kwargs):
        self.batches.append(batch)


def test_watching_changes_nothing_either(model_path, dataset, tmp_path):
    stock_logs, stock = run(GRPOTrainer, GRPOConfig, model_path, dataset, tmp_path / "a")
    watch = Watch()
    our_logs, ours = run(
        AdaptiveGRPOTrainer, AdaptiveGRPOConfig, model_path, dataset, tmp_path / "b", callbacks=[watch]
    )
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    for entry, expected in zip(our_logs, stock_logs, strict=True):
        assert {key: entry[key] for key in expected} == expected
    assert len(watch.batches) == 3
    assert watch.batches[0].prompt_index is None
    assert watch.batches[0].completion_lengths.shape == (8,)
