"""The efficient preset as a whole: on two processes, after an interruption, and as YAML."""

import pytest
import torch
import yaml
from kit import ROOT, config_kwargs, count_vowels, have_same_weights, interrupt, launch, make_letters, weights_of

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.config import EFFICIENT, EFFICIENT_LONG_PROMPTS

PRESETS = {"efficient": EFFICIENT, "efficient_long_prompts": EFFICIENT_LONG_PROMPTS}


class Look(GRPOCallback):
    def on_setup(self, **kwargs):
        self.seen = []

    def on_rollouts(self, batch, **kwargs):
        self.seen.append([batch.prompt_index, batch.prompt_features, batch.advantages, batch.rewards])


def train_on_a_process(model_path: str, out: str, name: str, **options) -> dict:
    """Called on every process by `launch`."""
    args = AdaptiveGRPOConfig(**config_kwargs(f"{out}/run", max_steps=12, **{**PRESETS[name], **options}))
    look = Look()
    trainer = AdaptiveGRPOTrainer(
        model=model_path, reward_funcs=count_vowels, args=args, train_dataset=make_letters(), callbacks=[look]
    )
    trainer.train()
    states = [callback.state_dict() for callback in trainer.grpo_callbacks]
    return {"seen": look.seen, "weights": weights_of(trainer), "states": states, "logs": trainer.state.log_history}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", PRESETS)
def test_two_processes_agree_on_prompts_guesses_and_weights(name, model_path, tmp_path):
    one, other = launch(model_path, tmp_path / "out", train_on_a_process, name=name, per_device_train_batch_size=8)
    for key in ("seen", "weights", "states"):
        assert same(one[key], other[key]), key
    sizes = [len(index) for index, *_ in one["seen"]]
    assert sizes == [{"efficient": 16, "efficient_long_prompts": 8}[name]] * 3
    assert all(features.shape == (size, 32) for size, (_, features, *_) in zip(sizes, one["seen"], strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_resuming_equals_never_stopping(name, model_path, tmp_path):
    def make(out: str) -> AdaptiveGRPOTrainer:
        options = {**PRESETS[name], "max_steps": 12, "save_strategy": "steps", "save_steps": 5}
        args = AdaptiveGRPOConfig(**config_kwargs(out, **options))
        return AdaptiveGRPOTrainer(
            model=model_path, reward_funcs=count_vowels, args=args, train_dataset=make_letters(), callbacks=[Look()]
        )

    whole, _, resumed = interrupt(lambda folder: make(str(tmp_path / folder)), 5)
    assert have_same_weights(whole, resumed)
    states = ([callback.state_dict() for callback in trainer.grpo_callbacks] for trainer in (whole, resumed))
    assert same(*map(list, states))


@pytest.mark.parametrize("name", PRESETS)
def test_the_yaml_holds_the_same_as_the_line_in_python(name):
    text = (ROOT / "recipes" / "configs" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == PRESETS[name]
