"""An interrupted run ends where the run that was never interrupted ends: weights, plans, states, logs, alarms."""

import io
from collections import Counter, OrderedDict, deque

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Interrupt, config_kwargs, has_answer
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback
from trl_grpo_ext.host.checkpoints import CheckpointError
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.trainer.saving import draw_past


class Plans(GRPOCallback):
    def __init__(self):
        self.seen = []

    def on_rollouts(self, batch, **kwargs):
        prompts = None if batch.prompt_index is None else batch.prompt_index.tolist()  # where TRL's sampler chooses
        self.seen.append((prompts, batch.group_sizes.tolist(), batch.rewards.tolist()))


class Raise(TrainerCallback):
    """Ctrl-C."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(model_path, dataset, out, *, stop_at=None, resume=None, reward=has_answer, extra=(), **options):
    plans = Plans()
    callbacks = [plans, *extra] + ([Interrupt(stop_at)] if stop_at else [])
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(out, **{"max_steps": 8, "per_device_train_batch_size": 16, **options})),
        train_dataset=dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, plans.seen


def flatten(state):
    if isinstance(state, torch.Tensor):
        return [state.tolist()]
    if isinstance(state, dict):
        return [(key, flatten(value)) for key, value in state.items() if "time" not in str(key)]
    return [state]


def logs_of(trainer):
    """What was logged of the training, without what a clock says."""
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if "time" not in name} for entry in kept]


# As on every GPU, gradients of several micro-batches and passes; as in every long run, a log now and then.
EVERYTHING = {
    "group_size": "variance",
    "curriculum": "target",
    "difficulty_column": "score",
    "dynamic_sampling_rounds": 1,
    "reward_clip_quantiles": [0.05, 0.95],
    "share_prompts": True,
    "monitor": True,
    "on_alarm": {"truncated": "cool_lr"},
    "kl_target": 0.1,
    "kl_horizon": 100.0,
    "beta": 0.04,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 8,
    "log_completions": True,
}
SETTINGS = {
    "variance_online": {"group_size": "variance", "curriculum": "online"},
    "threshold_staged": {"group_size": "threshold", "curriculum": "staged", "difficulty_column": "difficulty"},
    "target": {"curriculum": "target", "difficulty_column": "score", "dynamic_sampling_rounds": 1},
    "epochs": {"dynamic_sampling_rounds": 1, "reward_clip_quantiles": [0.05, 0.95]},
    "accumulation": {"group_size": "variance", "gradient_accumulation_steps": 2},
    "lean": {"group_size": "variance", "share_prompts": True, "skip_zero_advantage": True},
    "savings": {"share_prompts": True, "steps_per_generation": 2},
    "alarm": {"monitor": True, "on_alarm": {"truncated": "cool_lr"}},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize(
    ("name", "logging_steps"), [*((name, 2) for name in SETTINGS), ("everything", 1), ("everything", 5), ("epochs", 1)]
)
def test_resume_equals_no_interruption(name, logging_steps, model_path, dataset, tmp_path):
    """The save after step 3 comes one step after a log, right after one, or before the first."""
    options = {"per_device_train_batch_size": 16, "logging_steps": logging_steps, **SETTINGS[name]}
    whole, plans = run(model_path, dataset, tmp_path / "whole", **options)
    _, before = run(model_path, dataset, tmp_path / "cut", stop_at=3, **options)
    resumed, after = run(
        model_path, dataset, tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"), **options
    )
    assert before + after == plans
    assert logs_of(resumed) == logs_of(whole)
    assert len(logs_of(whole)) == 8 // logging_steps
    for (key, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), key
    for one, two in zip(whole.grpo_callbacks, resumed.grpo_callbacks, strict=True):
        assert flatten(one.state_dict()) == flatten(two.state_dict())


def test_an_alarm_and_what_it_does_come_when_they_would_have_come(model_path, dataset, tmp_path):
    """Half of what the alarm is raised for was measured before the interruption."""
    options = {"monitor": True, "on_alarm": {"truncated": "cool_lr"}, "logging_steps": 2, "max_completion_length": 2}
    whole, _ = run(model_path, dataset, tmp_path / "whole", max_steps=16, **options)
    run(model_path, dataset, tmp_path / "cut", stop_at=5, max_steps=16, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-5")
    resumed, _ = run(model_path, dataset, tmp_path / "cut", resume=checkpoint, max_steps=16, **options)
    raised = [[entry["step"] for entry in t.state.log_history if "alarms/truncated" in entry] for t in (whole, resumed)]
    assert raised[0]
    assert raised[0] == raised[1]
    assert any(entry.get("actions/lr_scale", 1.0) < 1 for entry in logs_of(whole))
    assert logs_of(resumed) == logs_of(whole)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_metrics_that_are_nan_or_counted_are_carried_over_a_log(model_path, dataset, tmp_path):
    """A reward that says nothing of some batches logs NaN, a tensor or an int is logged as a number."""

    class Logs(GRPOCallback):
        def on_setup(self, trainer, **kwargs):
            self.trainer = trainer

        def on_step_end(self, args, state, control, **kwargs):
            step = state.global_step
            self.trainer.log_metric("odd", float("nan") if step % 3 else float(step))
            self.trainer.log_metric("tensor", torch.tensor(step))
            self.trainer.log_metric("int", step)

    options = {"logging_steps": 4}
    whole, _ = run(model_path, dataset, tmp_path / "whole", extra=[Logs()], **options)
    run(model_path, dataset, tmp_path / "cut", stop_at=3, extra=[Logs()], **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-3")
    resumed, _ = run(model_path, dataset, tmp_path / "cut", resume=checkpoint, extra=[Logs()], **options)
    assert [(entry["odd"], entry["tensor"], entry["int"]) for entry in logs_of(whole)] == [(3, 2.5, 2.5), (6, 6.5, 6.5)]
    assert logs_of(resumed) == logs_of(whole)


@pytest.mark.parametrize("note", ["plain", np.float64(1)], ids=["plain", "of any kind"])
def test_the_table_of_completions_is_carried_over_a_log(note, model_path, dataset, tmp_path, caplog):
    """Its rows were sampled before the interruption. What cannot be saved costs the rows of this table only."""

    def reward(completions, log_extra, **kwargs):
        log_extra("note", [note] * len(completions))
        return [float(len(text)) for text in completions]

    options = {"log_completions": True, "steps_per_generation": 4, "logging_steps": 4, "max_steps": 4, "monitor": True}
    whole, _ = run(model_path, dataset, tmp_path / "whole", reward=reward, **options)
    run(model_path, dataset, tmp_path / "cut", stop_at=3, reward=reward, **options)
    table = tmp_path / "cut" / "completions" / "completions_00004.parquet"
    assert not table.exists()
    resumed, _ = run(model_path, dataset, tmp_path / "cut", resume=True, reward=reward, **options)
    expected = pq.read_table(tmp_path / "whole" / "completions" / table.name).to_pydict()
    assert len(expected["prompt"]) == 64
    assert logs_of(resumed) == logs_of(whole)
    if note == "plain":
        assert pq.read_table(table).to_pydict() == expected
    else:
        assert pq.read_table(table).num_rows == 0
        assert (
            "The table of completions is not part of the checkpoints: state_dict()['extra']['note'][0]" in caplog.text
        )


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


def with_attribute(value):
    tensor = torch.ones(2)
    tensor.note = value
    return tensor


NEVER_READ = {
    "numpy number": np.float64(1),
    "numpy array": np.zeros(2),
    "deque": deque([1.0]),
    "in a list": {"a": [torch.Generator()]},
    "a key": {range(3): 1},
    "a tensor without values": torch.zeros(2, device="meta"),
    "an attribute of a tensor": with_attribute(range(3)),
    "an integer of thousands of bits": 10**700,
}


@pytest.mark.parametrize("kind", NEVER_READ)
def test_a_state_that_could_never_be_read_is_refused_when_it_is_written(kind, model_path, dataset, tmp_path):
    class Keeps(GRPOCallback):
        def state_dict(self):
            return {"kept": NEVER_READ[kind]}

    options = config_kwargs(tmp_path, save_strategy="steps", save_steps=1)
    trainer = AdaptiveGRPOTrainer(
        model_path, has_answer, args=AdaptiveGRPOConfig(**options), train_dataset=dataset, callbacks=[Keeps()]
    )
    with pytest.raises(CheckpointError, match=r"state_dict\(\) of Keeps\['kept'\].* (is a|has) .*: (make|no|save)"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers() | st.integers(2**2000, 2**2100) | st.integers(-(2**2100), -(2**2000)),
    st.floats() | st.complex_numbers(),
    st.text(st.characters(codec=None), max_size=5) | st.binary(max_size=5),
    st.binary(max_size=5).map(bytearray),
    st.sampled_from([torch.ones(2), torch.eye(2).to_sparse(), torch.zeros(1, device="meta"), torch.ones(2).bfloat16()]),
    st.sampled_from(
        [range(2), frozenset(), np.int64(1), with_attribute(True), with_attribute(range(1)), Counter("ab")]
    ),
)
hashable = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(max_size=3))
states = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashable, max_size=3),
        st.dictionaries(hashable, inner, max_size=3),
        st.dictionaries(hashable, inner, max_size=3).map(OrderedDict),
        inner.map(with_attribute),
    ),
    max_leaves=6,
)


def text_of_state(state):
    """Text that two equal states have in common: sets have no order, and NaN is not equal to itself."""
    if isinstance(state, set):
        return str(sorted(map(repr, state)))
    if isinstance(state, list | tuple):
        return f"{type(state).__name__}({[text_of_state(part) for part in state]})"
    if isinstance(state, dict):
        return f"{type(state).__name__}({[(key, text_of_state(part)) for key, part in state.items()]})"
    return repr(state)


def refusal(check):
    try:
        check()
    except ValueError as error:
        return str(error)


@given(states)
@settings(max_examples=400)
def test_what_is_taken_is_read_back_and_the_rest_has_a_place(state):
    said = refusal(lambda: check_savable({"kept": state}))
    if said is not None:
        assert said.startswith("state_dict()['kept']")
        return
    file = io.BytesIO()
    torch.save({"kept": state}, file)
    file.seek(0)
    assert text_of_state(torch.load(file, weights_only=True)["kept"]) == text_of_state(state)


def test_a_state_that_holds_itself_is_refused():
    state = {"a": []}
    state["a"].append(state)
    with pytest.raises(ValueError, match="is nested more than 100 deep: make it flat"):
        check_savable(state)


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
    args = GRPOConfig(**config_kwargs(tmp_path, max_steps=2, save_strategy="steps", save_steps=2))
    GRPOTrainer(model_path, has_answer, args=args, train_dataset=dataset).train()
    run(model_path, dataset, tmp_path, resume=str(tmp_path / "checkpoint-2"), group_size="variance")
    assert "start from scratch" in caplog.text


def test_saving_changes_nothing(model_path, dataset, tmp_path):
    """Every save lets built-in callbacks read their own state."""
    plain, plans = run(model_path, dataset, tmp_path / "plain", logging_steps=2, **EVERYTHING)
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    saving, others = run(model_path, dataset, tmp_path / "saving", logging_steps=2, **EVERYTHING, **saved)
    assert plans == others
    assert logs_of(plain) == logs_of(saving)
    assert all(map(torch.equal, plain.model.parameters(), saving.model.parameters()))
    for one, two in zip(plain.grpo_callbacks, saving.grpo_callbacks, strict=True):
        assert flatten(one.state_dict()) == flatten(two.state_dict())


def test_rollouts_that_could_not_be_read_back_are_not_written(model_path, dataset, tmp_path):
    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._buffered_inputs[1]["advantages"][0] = float("nan")

    options = config_kwargs(tmp_path, steps_per_generation=2, save_strategy="steps", save_steps=1, monitor=True)
    trainer = AdaptiveGRPOTrainer(model_path, has_answer, args=AdaptiveGRPOConfig(**options), train_dataset=dataset)
    trainer.add_callback(Spoils())
    with pytest.raises(CheckpointError, match="rollouts that are still to be trained on: 'advantages' holds NaN"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()
