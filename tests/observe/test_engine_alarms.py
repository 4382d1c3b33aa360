"""Alarms of vLLM in real runs: stand-ins with other log-probabilities, ratios at their cap, or old weights."""

import pytest
from kit import trainer_of
from rollout_helpers import TrueVLLM, length_of_text, make_conversations, use_vllm
from transformers import AutoModelForCausalLM

ENGINES = {
    "healthy": lambda trainer, path: TrueVLLM(trainer),
    "sampling_mismatch": lambda trainer, path: TrueVLLM(trainer, shift=0.2),
    "sampling_ratios": lambda trainer, path: TrueVLLM(trainer, shift=-0.4),
    "stale_engine": lambda trainer, path: TrueVLLM(trainer, AutoModelForCausalLM.from_pretrained(path)),
}
ALARMS = {*ENGINES} - {"healthy"}


@pytest.mark.training
@pytest.mark.parametrize("name", ENGINES)
def test_an_alarm_names_what_ails_the_engine(name, model_path, tmp_path, monkeypatch):
    # Ratios of whole answers go beyond their cap of 3 where each of five tokens is off by 0.4; single ones do not.
    mode = "sequence_mask" if name == "sampling_ratios" else "token_truncate"
    options = {"monitor": True, "max_steps": 40, "vllm_importance_sampling_mode": mode}
    options |= {"learning_rate": 3e-4, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 16}
    trainer = trainer_of(model_path, make_conversations(), tmp_path, length_of_text, **options)
    use_vllm(trainer, monkeypatch, ENGINES[name](trainer, model_path))
    trainer.train()
    raised = {
        key.removeprefix("alarms/")
        for entry in trainer.state.log_history
        for key in entry
        if key.removeprefix("alarms/") in ALARMS
    }
    # Behind each of the others, log-probabilities end up far apart, too.
    assert raised == (set() if name == "healthy" else {name, "sampling_mismatch"})
