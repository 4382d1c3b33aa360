"""An interrupted run ends where the run that was never interrupted ends: weights, plans, callback state."""

from collections import Counter, OrderedDict, deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import IterableDataset
from kit import Interrupt, Record, batches_of, has_answer, have_same_weights, interrupt
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from trl_grpo_ext import GRPOCallback
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.trainer.saving import draw_past


class Raise(TrainerCallback):
    """Ctrl-C."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def plans_of(trainer):
    return [
        (batch.prompt_index.tolist(), batch.group_sizes.tolist(), batch.rewards.tolist())
        for batch in batches_of(trainer)
    ]


@pytest.fixture
def planned(make_trainer):
    return partial(make_trainer, callbacks=[Record], max_steps=8, per_device_train_batch_size=16)


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
def test_resume_equals_no_interruption(name, planned):
    whole, cut, resumed = interrupt(partial(planned, **SETTINGS[name]), step=3)
    assert plans_of(cut) + plans_of(resumed) == plans_of(whole)
    assert have_same_weights(whole, resumed)
    for one, two in zip(whole.grpo_callbacks, resumed.grpo_callbacks, strict=True):
        assert flatten(one.state_dict()) == flatten(two.state_dict())


@pytest.fixture
def seen_by_reward(make_trainer):
    """A trainer and the prompts of each of its steps."""

    def make(out, **given):
        seen = []

        def reward(prompts, completions, answer, **kwargs):
            seen.append(sorted(set(prompts)))
            return has_answer(completions, answer)

        trainer = make_trainer(out, reward_funcs=reward, **{"max_steps": 9, "per_device_train_batch_size": 16, **given})
        trainer.seen = seen
        return trainer

    return make


@pytest.mark.parametrize("options", [{"monitor": True}, {"reward_clip_range": [-1, 1]}, {"share_prompts": True}, {}])
def test_resume_in_a_later_epoch_goes_on_with_the_prompts_of_that_epoch(options, seen_by_reward):
    """Where TRL's sampler chooses: 26 prompts, 6 steps of 4. With nothing set, all is as in TRL, which begins anew."""
    stock = seen_by_reward("stock", cls=GRPOTrainer)
    stock.train()
    whole, _, resumed = interrupt(partial(seen_by_reward, **options), step=7)
    assert whole.seen == stock.seen
    is_equal = resumed.seen == whole.seen[7:] and have_same_weights(whole, resumed)
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
def test_a_state_that_could_never_be_read_is_refused_when_it_is_written(kept, make_trainer):
    class Keeps(GRPOCallback):
        def state_dict(self):
            return {"kept": kept}

    trainer = make_trainer(save_strategy="steps", save_steps=1, callbacks=[Keeps])
    with pytest.raises(Exception, match=r"state_dict\(\) of Keeps\['kept'\].* is a .*: make it a tensor, a number"):
        trainer.train()


def test_every_state_that_is_taken_is_read_back(tmp_path):
    state = {"a": [1, 2.0, True, None, "x", b"y", (1,), {2}], 3: OrderedDict(b=torch.ones(2)), "c": Counter("aab")}
    check_savable(state)
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["a"] == state["a"]


def test_a_stream_resumes_too(seen_by_reward, dataset):
    stream = IterableDataset.from_generator(lambda: iter(dataset.to_list()))
    whole, _, resumed = interrupt(partial(seen_by_reward, dataset=stream, monitor=True), step=4)
    assert resumed.seen == whole.seen[4:]
    assert have_same_weights(whole, resumed)


def test_resume_on_the_same_trainer_drops_what_was_sampled_since(seen_by_reward):
    options = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 2, "monitor": True}
    whole = seen_by_reward("whole", **options)
    whole.train()
    trainer = seen_by_reward("cut", **options)
    trainer.add_callback(Raise(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(Raise)
    trainer.seen.clear()
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
    assert trainer.seen == whole.seen[2:]
    assert have_same_weights(whole, trainer)


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 4}])
def test_resume_in_the_middle_of_a_generation_batch(options, planned):
    whole, cut, resumed = interrupt(partial(planned, group_size="variance", curriculum="online", **options), step=3)
    assert plans_of(cut) + plans_of(resumed) == plans_of(whole)
    assert have_same_weights(whole, resumed)


def until(make, step, **options):
    trainer = make(**options)
    trainer.add_callback(Interrupt(step))
    trainer.train()
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def test_trainer_state_stays_small(planned):
    checkpoint = until(planned, 2, group_size="variance", curriculum="online")
    assert "posterior" not in (checkpoint / "trainer_state.json").read_text()
    state = torch.load(checkpoint / "grpo_callbacks.pt", weights_only=True)
    assert [name for name, _ in state["callbacks"]][:2] == ["OnlineCurriculumCallback", "VarianceGroupSizeCallback"]


def test_a_checkpoint_of_stock_trl_is_taken_with_a_warning(planned, caplog):
    checkpoint = until(planned, 2, group_size="variance")
    for name in ("grpo_callbacks.pt", "grpo_checkpoint.json"):
        (checkpoint / name).unlink()
    planned(group_size="variance").train(resume_from_checkpoint=str(checkpoint))
    assert "start from scratch" in caplog.text
