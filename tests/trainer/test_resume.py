"""An interrupted run ends where the run that was never interrupted ends: weights, plans, callback state."""

from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import IterableDataset
from kit import config_kwargs, has_answer
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.trainer.saving import draw_past


class Plans(GRPOCallback):
    def __init__(self):
        self.seen = []

    def on_rollouts(self, batch, **kwargs):
        self.seen.append((batch.prompt_index.tolist(), batch.group_sizes.tolist(), batch.rewards.tolist()))


class Interrupt(TrainerCallback):
    """Stops as a kill after the checkpoint would: the learning rate schedule still expects all steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


class Raise(TrainerCallback):
    """Ctrl-C."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(model_path, dataset, out, *, stop_at=None, resume=None, **options):
    plans = Plans()
    callbacks = [plans] + ([Interrupt(stop_at)] if stop_at else [])
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=has_answer,
        args=AdaptiveGRPOConfig(**config_kwargs(out, max_steps=8, per_device_train_batch_size=16, **options)),
        train_dataset=dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, plans.seen


def flatten(state):
    if isinstance(state, torch.Tensor):
        return [state.tolist()]
    if isinstance(state, dict):
        return [(key, flatten(value)) for key, value in state.items()]
    return [state]


SETTINGS = {
    "variance_online": {"group_size": "variance", "curriculum": "online"},
    "threshold_staged": {"group_size": "threshold", "curriculum": "staged", "difficulty_column": "difficulty"},
    "target": {"curriculum": "target", "difficulty_column": "score", "dynamic_sampling_rounds": 1},
    "epochs": {"dynamic_sampling_rounds": 1, "reward_clip_quantiles": [0.05, 0.95]},
    "accumulation": {"group_size": "variance", "gradient_accumulation_steps": 2},
    "lean": {"group_size": "variance", "share_prompts": True, "skip_zero_advantage": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_equals_no_interruption(name, model_path, dataset, tmp_path):
    options = SETTINGS[name]
    whole, plans = run(model_path, dataset, tmp_path / "whole", **options)
    _, before = run(model_path, dataset, tmp_path / "cut", stop_at=3, **options)
    resumed, after = run(
        model_path, dataset, tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"), **options
    )
    assert before + after == plans
    for (key, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), key
    for one, two in zip(whole.grpo_callbacks, resumed.grpo_callbacks, strict=True):
        assert flatten(one.state_dict()) == flatten(two.state_dict())


def prompts_of(model_path, dataset, out, *, stop_at=None, resume=None, stock=False, **options):
    """The prompts of each step, and the weights after the last."""
    seen = []

    def reward(prompts, completions, answer, **kwargs):
        seen.append(sorted(set(prompts)))
        return has_answer(completions, answer)

    options = config_kwargs(out, max_steps=9, per_device_train_batch_size=16, **options)
    trainer = (GRPOTrainer if stock else AdaptiveGRPOTrainer)(
        model=model_path,
        reward_funcs=reward,
        args=(GRPOConfig if stock else AdaptiveGRPOConfig)(**options),
        train_dataset=dataset,
        callbacks=[Interrupt(stop_at)] if stop_at else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("options", [{"monitor": True}, {"reward_clip_range": [-1, 1]}, {"share_prompts": True}, {}])
def test_resume_in_a_later_epoch_goes_on_with_the_prompts_of_that_epoch(options, model_path, dataset, tmp_path):
    """Where TRL's sampler chooses: 26 prompts, 6 steps of 4. With nothing set, all is as in TRL, which begins anew."""
    stock, _ = prompts_of(model_path, dataset, tmp_path / "stock", stock=True)
    whole, weights = prompts_of(model_path, dataset, tmp_path / "whole", **options)
    assert whole == stock
    prompts_of(model_path, dataset, tmp_path / "cut", stop_at=7, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-7")
    after, resumed = prompts_of(model_path, dataset, tmp_path / "cut", resume=checkpoint, **options)
    is_equal = after == whole[7:] and all(map(torch.equal, weights, resumed))
    assert is_equal == bool(options)


@pytest.mark.parametrize(("num_processes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_what_was_drawn_in_earlier_epochs_is_past_on_every_process(num_processes, rank):
    """As transformers and accelerate resume: a loader for each process, an epoch that is begun, batches to skip."""

    def loader():
        sampler = RepeatSampler(range(24), 2, batch_size=4, shuffle=True, seed=7)
        batches = DataLoader(range(24), batch_size=4, sampler=sampler)
        shard = prepare_data_loader(batches, num_processes=num_processes, process_index=rank, put_on_device=False)
        return sampler, shard

    _, whole = loader()
    _, third, later = ([batch.tolist() for batch in whole] for _ in range(3))
    sampler, resumed = loader()
    draw_past(sampler, 1)
    resumed.set_epoch(1)
    assert [batch.tolist() for batch in skip_first_batches(resumed, 2)] == third[2:]
    assert [batch.tolist() for batch in resumed] == later


@pytest.mark.parametrize("kept", [np.float64(1), np.zeros(2), deque([1.0]), {"a": [torch.Generator()]}])
def test_a_state_that_could_never_be_read_is_refused_when_it_is_written(kept, model_path, dataset, tmp_path):
    class Keeps(GRPOCallback):
        def state_dict(self):
            return {"kept": kept}

    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=has_answer,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, save_strategy="steps", save_steps=1)),
        train_dataset=dataset,
        callbacks=[Keeps()],
    )
    with pytest.raises(Exception, match=r"state_dict\(\) of Keeps\['kept'\].* is a .*: make it a tensor, a number"):
        trainer.train()


def test_every_state_that_is_taken_is_read_back(tmp_path):
    state = {"a": [1, 2.0, True, None, "x", b"y", (1,), {2}], 3: OrderedDict(b=torch.ones(2)), "c": Counter("aab")}
    check_savable(state)
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["a"] == state["a"]


def test_a_stream_resumes_too(model_path, dataset, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(dataset.to_list()))
    options = {"save_strategy": "steps", "save_steps": 2, "monitor": True}
    whole, weights = prompts_of(model_path, stream, tmp_path, **options)
    after, resumed = prompts_of(model_path, stream, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)
    assert after == whole[4:]
    assert all(map(torch.equal, weights, resumed))


def test_resume_on_the_same_trainer_drops_what_was_sampled_since(model_path, dataset, tmp_path):
    options = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 2, "monitor": True}
    whole, weights = prompts_of(model_path, dataset, tmp_path / "whole", **options)
    seen = []

    def reward(prompts, completions, answer, **kwargs):
        seen.append(sorted(set(prompts)))
        return has_answer(completions, answer)

    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_steps=9, per_device_train_batch_size=16, **options)),
        train_dataset=dataset,
    )
    trainer.add_callback(Raise(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(Raise)
    seen.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == whole[2:]
    assert all(map(torch.equal, weights, trainer.model.parameters()))


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 4}])
def test_resume_in_the_middle_of_a_generation_batch(options, model_path, dataset, tmp_path):
    options = {"group_size": "variance", "curriculum": "online", **options}
    whole, plans = run(model_path, dataset, tmp_path / "whole", **options)
    _, before = run(model_path, dataset, tmp_path / "cut", stop_at=3, **options)
    resumed, after = run(
        model_path, dataset, tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"), **options
    )
    assert before + after == plans
    for (key, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), key


def test_trainer_state_stays_small(model_path, dataset, tmp_path):
    run(model_path, dataset, tmp_path / "cut", stop_at=2, group_size="variance", curriculum="online")
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert "posterior" not in (checkpoint / "trainer_state.json").read_text()
    state = torch.load(checkpoint / "grpo_callbacks.pt", weights_only=True)
    assert [name for name, _ in state["callbacks"]][:2] == ["OnlineCurriculumCallback", "VarianceGroupSizeCallback"]


def test_a_checkpoint_of_stock_trl_is_taken_with_a_warning(model_path, dataset, tmp_path, caplog):
    run(model_path, dataset, tmp_path / "cut", stop_at=2, group_size="variance")
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    for name in ("grpo_callbacks.pt", "grpo_checkpoint.json"):
        (checkpoint / name).unlink()
    run(model_path, dataset, tmp_path / "cut", resume=str(checkpoint), group_size="variance")
    assert "start from scratch" in caplog.text
