"""The monitor sees, records and tells, and changes nothing; its record survives a restart; trackers get its metrics."""

import inspect
import json
import math
import resource
import sqlite3
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from kit import (
    NAN,
    Interrupt,
    batch_of,
    count_vowels,
    has_answer,
    have_same_weights,
    launch,
    logs_of,
    make_letters,
    trainer_of,
    weights_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer, TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, MonitorCallback, RolloutBatch
from trl_grpo_ext.observe.alarms import Alarm
from trl_grpo_ext.observe.effect import fingerprint
from trl_grpo_ext.observe.monitor import metrics_of, widened
from trl_grpo_ext.observe.readings import level
from trl_grpo_ext.observe.record import RunRecord, entries_of, read_lines
from trl_grpo_ext.observe.report import read_run


@pytest.fixture
def make_trainer(make_trainer):
    """A trainer with two rewards, which writes into the folder of the test itself."""
    return lambda out=".", **given: make_trainer(out, **{"reward_funcs": [count_vowels, has_answer], **given})


def record(out) -> tuple[dict, list[dict], list[dict]]:
    folder = Path(out) / "monitor"
    run = json.loads((folder / "run.json").read_text())
    return run, *(
        [json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("metrics", "alarms")
    )


# It changes nothing


SETTINGS = {
    "plain": {},
    "beta": {"beta": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "slices": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4},
    "eval": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8},
}
NEW = {"rollouts/", "advantage/", "time/", "alarms/"}


def without_times(entry: dict) -> dict:
    return {k: v for k, v in entry.items() if not any(t in k for t in ("time", "per_second"))}


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_metrics_are_those_of_stock_trl(name, trained):
    stock = trained("a", cls=GRPOTrainer, **SETTINGS[name])
    monitored = trained("b", monitor=True, **SETTINGS[name])
    assert have_same_weights(stock, monitored)
    for entry, expected in zip(monitored.state.log_history, stock.state.log_history, strict=True):
        assert without_times({k: v for k, v in entry.items() if k in expected}) == without_times(expected)
        assert all(any(key.startswith(prefix) for prefix in NEW) for key in entry.keys() - expected.keys())


def test_features_train_the_same_with_it(trained):
    options = {"group_size": "variance", "curriculum": "online", "dynamic_sampling_rounds": 1, "max_steps": 4}
    options |= {"per_device_train_batch_size": 16}
    assert have_same_weights(trained("a", **options), trained("b", monitor=True, **options))


def test_off_there_is_no_record(tmp_path, trained):
    trained(max_steps=1)
    assert not (tmp_path / "monitor").exists()


# Metrics


def rollouts(groups, advantages=None, **fields) -> RolloutBatch:
    batch = batch_of(groups, **fields)
    batch.advantages = torch.zeros(len(batch.rewards)) if advantages is None else torch.tensor(advantages)
    return batch


NOTHING_YET = (math.inf, -math.inf)


def look(batch, reward_range=NOTHING_YET):
    """Metrics of a batch, and the range of rewards with it."""
    reward_range = widened(reward_range, batch)
    return {name: pytest.approx(value) for name, value in metrics_of(batch, reward_range).items()}, reward_range


def test_metrics_by_hand():
    # Groups of 2, 3, 1, 2: flat at 1, varying, flat at 0 (a single one), flat at NaN.
    groups = [[1.0, 1.0], [0.0, 1.0, 0.0], [0.0], [NAN, NAN]]
    batch = rollouts(groups, [0, 0, -0.5, 1.0, -0.5, 0, 0, 0])
    assert look(batch)[0] == {
        "rollouts/flat_high": 2 / 8,
        "rollouts/flat_low": 3 / 8,
        "advantage/mean": 0.0,
        "advantage/abs_mean": 2 / 8,
        "advantage/nonzero": 3 / 8,
    }


def test_advantages_per_token_count_where_there_is_a_token():
    batch = rollouts([[0.0, 1.0, 2.0]], [[1.0, -1.0, 9.0], [2.0, math.nan, 9.0], [0.0, 0.0, 0.0]])
    batch.completion_lengths = torch.tensor([2, 1, 3])
    metrics, _ = look(batch)
    assert metrics["advantage/mean"] == 2 / 6
    assert metrics["advantage/abs_mean"] == 4 / 6
    assert metrics["advantage/nonzero"] == 2 / 3
    batch.completion_lengths, batch.advantages = torch.zeros(3), torch.empty(3, 0)
    assert look(batch)[0]["advantage/abs_mean"] == 0


def test_a_completion_without_others_is_flat_unless_it_has_an_advantage():
    batch = rollouts([[0.0], [0.0], [1.0], [1.0]], [[0.5, 0.0], [0.0, 0.0], [0.0, -0.5], [0.0, 0.0]])
    batch.completion_lengths = torch.tensor([2, 2, 2, 2])
    metrics, _ = look(batch)
    assert (metrics["rollouts/flat_low"], metrics["rollouts/flat_high"]) == (0.25, 0.25)


def test_in_groups_of_one_the_advantage_decides():
    right, mixed = rollouts([[1.0]] * 4), rollouts([[1.0], [1.0], [0.0], [0.0]], [0.5, 0.5, -0.5, -0.5])
    shifted = rollouts([[1.0]] * 4, [0.5] * 4)  # a baseline below the rewards
    shares = [{name: m for name, m in look(batch)[0].items() if "flat" in name} for batch in (right, mixed, shifted)]
    assert shares == [
        {"rollouts/flat_high": 1, "rollouts/flat_low": 0},
        {"rollouts/flat_high": 0, "rollouts/flat_low": 0},
        {"rollouts/flat_high": 0, "rollouts/flat_low": 0},
    ]
    # What was replaced has no advantages: then it taught nothing, alone or not.
    mixed.discarded = rollouts([[0.0], [1.0, 2.0]], [])
    assert look(mixed)[0]["rollouts/flat_low"] == 1 / 7


def test_high_and_low_go_by_the_rewards_of_the_run():
    def high(groups, before=NOTHING_YET):
        metrics, reward_range = look(rollouts(groups), before)
        return metrics["rollouts/flat_high"], reward_range

    # As long as one reward is all there is, its sign tells.
    assert high([[0.0, 0.0]])[0] == 0.0
    share, seen = high([[5.0, 5.0]])
    assert share == 1.0
    share, seen = high([[-1.0, 2.0], [7.0, 7.0]], seen)
    assert share == 0.5
    # The range is -1 to 7 by now, and 3.5 lies above its middle.
    assert high([[3.5, 3.5], [2.5, 2.5]], seen) == (0.5, (-1.0, 7.0))


def test_discarded_groups_count():
    metrics, _ = look(rollouts([[0.0, 1.0], [0.0, 1.0]], discarded=[[0.0, 0.0], [1.0, 1.0]]))
    assert (metrics["rollouts/flat_high"], metrics["rollouts/flat_low"]) == (0.25, 0.25)


def test_infinite_rewards_do_not_move_the_range():
    assert look(rollouts([[0.0, 1.0], [math.inf, -math.inf]]))[1] == (0.0, 1.0)
    assert look(rollouts([[NAN, NAN]]))[1] == NOTHING_YET


def test_shares_add_up_in_a_run(trained):
    trainer = trained(reward_funcs=[has_answer], monitor=True, max_steps=6)
    for entry in trainer.state.log_history[:-1]:
        shares = [entry[f"rollouts/{name}"] for name in ("informative", "flat_high", "flat_low")]
        assert sum(shares) == pytest.approx(1)


# Time per phase


def slow_reward(completions, **kwargs):
    time.sleep(0.2)
    return count_vowels(completions)


class SlowUpdate(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.3)


def test_time_goes_to_its_phase(monkeypatch, make_trainer):
    generate = AdaptiveGRPOTrainer._generate
    monkeypatch.setattr(
        AdaptiveGRPOTrainer, "_generate", lambda self, prompts: (time.sleep(0.4), generate(self, prompts))[1]
    )
    options = {"monitor": True, "callbacks": [SlowUpdate()], "steps_per_generation": 2, "max_steps": 4}
    trainer = make_trainer(reward_funcs=[slow_reward], **options)
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    logs = logs_of(trainer)
    seconds = {phase: [entry[f"time/{phase}"] for entry in logs] for phase in ("generate", "score", "update")}
    for step in (0, 2):  # one generation serves two steps
        assert seconds["generate"][step] >= 0.4
        assert seconds["score"][step] >= 0.2
    for step in (1, 3):
        assert seconds["generate"][step] == seconds["score"][step] == 0
    assert all(0.3 <= value < 0.3 + elapsed - 4 * 0.3 for value in seconds["update"])
    assert sum(map(sum, seconds.values())) <= elapsed


def test_what_is_timed_is_there_in_trl():
    assert list(inspect.signature(GRPOTrainer._generate).parameters) == ["self", "prompts"]
    assert "_calculate_rewards" in vars(GRPOTrainer)


# The record


def test_record_of_a_run(model_path, tmp_path, trained):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    trainer = trained(monitor=True, reward_weights=[1.0, 0.5], **options)
    run, metrics, alarms = record(tmp_path)
    assert run["status"] == "finished"
    assert (run["max_steps"], run["num_processes"], run["model"]) == (3, 1, model_path)
    assert (run["reward_names"], run["reward_weights"]) == (["count_vowels", "has_answer"], [1.0, 0.5])
    assert run["config"]["learning_rate"] == 0.01
    assert run["versions"]["torch"] == torch.__version__
    packages = {"python", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "trl_grpo_ext"}
    assert run["versions"].keys() == packages
    assert [(m["step"], "loss" in m, "eval_reward" in m) for m in metrics] == [
        (1, True, False),
        (2, True, False),
        (2, False, True),
        (3, True, False),
        (3, False, True),
    ]
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_reward" in entry]
    for line, entry in zip(metrics, history, strict=True):
        assert {k: v for k, v in line.items() if k != "time"} == entry
    assert abs(metrics[-1]["time"] - time.time()) < 600
    assert [alarm["name"] for alarm in alarms] == ["truncated"]


def test_status_while_it_runs(tmp_path, trained):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((record(tmp_path)[0]["status"], len(record(tmp_path)[1])))

    trained(monitor=True, callbacks=[Look()])
    assert seen == [("running", 0), ("running", 1), ("running", 2)]  # a line is there as soon as it is logged


def test_secrets_stay_out(tmp_path, trained):
    options = {"hub_token": "hf_secret", "vllm_server_base_url": "http://user:hunter2@host:8000"}
    options |= {"model_init_kwargs": {"token": "hf_secret", "revision": "main"}}
    trained(monitor=True, max_steps=1, **options)
    text = (tmp_path / "monitor" / "run.json").read_text()
    assert "hf_secret" not in text
    assert "hunter2" not in text
    assert "HUB_TOKEN" not in text
    config = json.loads(text)["config"]
    assert config["model_init_kwargs"] == {"revision": "main"}
    assert config["vllm_server_base_url"] == "http://host:8000"


def none_at_all(completions, **kwargs):
    return [None] * len(completions)


def test_nan_is_null(tmp_path, trained):
    trained(reward_funcs=[count_vowels, none_at_all], monitor=True, max_steps=1)
    _, (line,), _ = record(tmp_path)
    assert line["rewards/none_at_all/mean"] is None
    assert line["reward"] is not None


def test_a_new_run_replaces_the_old_record(tmp_path, trained):
    trained(monitor=True, max_steps=3)
    trained(monitor=True, max_steps=2)
    run, metrics, _ = record(tmp_path)
    assert [m["step"] for m in metrics] == [1, 2]
    assert "resumed_at_steps" not in run
    assert list((tmp_path / "monitor").glob("*.tmp")) == []


def untimed(lines):
    return list(map(without_times, lines))


def test_resumed_record_equals_the_uninterrupted_one(tmp_path, make_trainer, trained):
    # Killed at step 3, after a checkpoint at 2; `truncated` is raised at step 3, so it happens twice.
    options = {
        "reward_funcs": [has_answer],
        "monitor": True,
        "group_size": "variance",
        "per_device_train_batch_size": 16,
    }
    options |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trained("whole", **options)
    trained("cut", callbacks=[Stop(3)], **options)
    with (tmp_path / "cut/monitor/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward')
    started = json.loads((tmp_path / "cut/monitor/run.json").read_text())["started"]
    make_trainer("cut", **options).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    run, metrics, alarms = record(tmp_path / "cut")
    _, expected_metrics, expected_alarms = record(tmp_path / "whole")
    assert untimed(metrics) == untimed(expected_metrics)
    assert untimed(alarms) == untimed(expected_alarms)
    assert [alarm["name"] for alarm in alarms] == ["truncated"]
    assert run["resumed_at_steps"] == [2]
    assert run["started"] == started
    assert run["status"] == "finished"


class Stop(TrainerCallback):
    """A kill: the checkpoint of this step is never written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def test_resume_without_a_record_begins_one(tmp_path, make_trainer, trained):
    options = {"monitor": True, "group_size": "variance", "max_steps": 4, "per_device_train_batch_size": 16}
    trained("a", callbacks=[Interrupt(2)], **options)
    make_trainer("b", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    run, metrics, _ = record(tmp_path / "b")
    assert run["resumed_at_steps"] == [2]
    assert [m["step"] for m in metrics] == [3, 4]


def test_half_written_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert list(read_lines(path, tmp_path)) == [{"step": 1}, {"step": 2}]
    assert list(read_lines(tmp_path / "none.jsonl", tmp_path)) == []


def test_a_disk_that_is_full_for_a_while_costs_lines_and_not_the_run(tmp_path, caplog):
    record = RunRecord(tmp_path / "monitor")
    record.start({}, 0)
    record.log(1, {"loss": 1.0}, [])
    size = record.metrics.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))  # nine bytes are left: half a line
    try:
        record.log(2, {"loss": 2.0}, [])
        record.log(3, {"loss": 3.0}, [])
        record.update(status="finished")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert record.metrics.stat().st_size == size + 9
    record.log(4, {"loss": 4.0}, [])
    record.log(5, {"loss": 5.0}, [])
    assert [entry["step"] for entry in entries_of(record.metrics, tmp_path)] == [1, 4, 5]
    assert read_run(tmp_path).last_step == 5
    (line,) = caplog.messages
    assert "metrics.jsonl could not be written ([Errno 27] File too large): training goes on, and the record" in line


def test_a_record_that_cannot_begin_stops_the_run(tmp_path, trained):
    (tmp_path / "monitor").write_text("a file")
    with pytest.raises(OSError, match="monitor"):
        trained(monitor=True, max_steps=1)


# Alarms in a run


def hopeless(completions, **kwargs):
    return [0.0] * len(completions)


def test_alarm_is_told_once_and_everywhere(tmp_path, caplog, trained):
    trainer = trained(reward_funcs=[hopeless], monitor=True, max_steps=12, max_completion_length=40)
    _, metrics, alarms = record(tmp_path)
    alarms = [alarm for alarm in alarms if alarm["name"] == "all_wrong"]
    (alarm,) = alarms
    assert alarm.keys() == {"step", "time", "name", "state", "evidence", "cause", "remedy", "action"}
    assert (alarm["step"], alarm["state"], alarm["action"]) == (
        10,
        "raised",
        None,
    )  # 5 logs of warm-up, then 5 in a row
    lines = [line for line in caplog.messages if "all_wrong" in line]
    assert lines == [
        f"Step 10: all_wrong: rollouts/flat_low is 1. Likely cause: {alarm['cause']}. Remedy: {alarm['remedy']}"
    ]
    raised = [entry["step"] for entry in metrics if entry.get("alarms/all_wrong")]
    assert raised == [10, 11, 12]
    assert [e["step"] for e in trainer.state.log_history if e.get("alarms/all_wrong")] == raised


# A run that trains nothing


class Unused(torch.nn.Module):
    """A part of the model that its forward pass never reaches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def model_of(model_path, part: str):
    """A tiny model of which only what is named can be trained."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    if part == "frozen adapter":
        return PeftModel.from_pretrained(model, model_path + "-adapter")
    model.requires_grad_(False)
    if part == "a part that takes no part":
        model.unused = Unused()
    elif part == "one norm":
        model.model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("part", ["frozen adapter", "nothing"])
def test_a_model_of_which_nothing_can_be_trained_is_refused(part, model_path, make_trainer):
    if part == "frozen adapter":
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), adapter).save_pretrained(
            model_path + "-adapter"
        )
    with pytest.raises(ValueError, match=r"no parameter with requires_grad=True.*is_trainable=True"):
        make_trainer(model=model_of(model_path, part), monitor=True)


# Steps until the alarm: two batches, or more than one where a batch serves several steps. The first step of a warmup
# has a learning rate of 0. A log that is far off does not delay the alarm.
WITHOUT_EFFECT = {
    "plain": ({}, 2),
    "warmup": ({"warmup_steps": 2}, 3),
    "seldom logged": ({"logging_steps": 50}, 2),
    "slices": ({"steps_per_generation": 2, "per_device_train_batch_size": 4}, 3),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_weights_that_never_change_are_told_within_two_batches(name, model_path, tmp_path, trained, caplog):
    options, step = WITHOUT_EFFECT[name]
    model = model_of(model_path, "a part that takes no part")
    model.enable_input_require_grads()  # as gradient checkpointing does, or the loss would have no gradient at all
    trained(model=model, **{"monitor": True, "max_steps": 4, **options})
    told = [alarm for alarm in record(tmp_path)[2] if alarm["name"] == "nothing_trained"]
    assert [(alarm["step"], alarm["state"]) for alarm in told] == [(step, "raised")]
    assert "batches with advantages left every weight as it was" in caplog.text


@pytest.mark.parametrize("part", ["one norm", "everything"])
def test_weights_that_change_are_no_alarm(part, model_path, tmp_path, trained):
    model = model_of(model_path, part)
    if part == "everything":
        model.requires_grad_(True)
    trainer = trained(model=model, monitor=True, learning_rate=1e-6)
    assert "nothing_trained" not in [alarm["name"] for alarm in record(tmp_path)[2]]
    assert not any("updates/without_effect" in entry for entry in trainer.state.log_history)


def test_batches_without_advantages_are_no_proof(tmp_path, trained):
    trained(reward_funcs=[hopeless], monitor=True, max_steps=4, weight_decay=0.0)
    assert "nothing_trained" not in [alarm["name"] for alarm in record(tmp_path)[2]]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.data())
def test_a_fingerprint_tells_one_changed_bit(values, data):
    weights = torch.tensor(values)
    changed = weights.clone()
    bits = changed.view(torch.int32)
    bits[data.draw(st.integers(0, len(values) - 1))] ^= 1 << data.draw(st.integers(0, 30))
    assert fingerprint(weights) == fingerprint(torch.nn.Parameter(weights.clone()))
    assert fingerprint(weights) != fingerprint(changed)


class Overflow(TrainerCallback):
    """A gradient that is not finite at step 2, and an optimizer that leaves such a step out."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.hook = next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.hook.remove()


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_fp16_leaves_out_is_no_lost_gradient(tmp_path, monkeypatch, skipped, trained):
    if skipped:
        monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    trainer = trained(monitor=True, max_steps=2, callbacks=[Overflow()])
    assert not math.isfinite(trainer.state.log_history[1]["grad_norm"])
    assert [alarm["name"] for alarm in record(tmp_path)[2]] == ([] if skipped else ["nan_loss"])


def test_two_monitors_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"two callbacks of the class MonitorCallback, .*: leave the option unset"):
        make_trainer(monitor=True, callbacks=[MonitorCallback()])


def test_passed_by_hand_it_does_the_same(tmp_path, trained):
    trained("a", monitor=True)
    trained("b", callbacks=[MonitorCallback])
    assert untimed(record(tmp_path / "a")[1]) == untimed(record(tmp_path / "b")[1])


def test_in_a_stock_trainer_it_is_idle_and_says_so(tmp_path, trained, caplog):
    trained(cls=GRPOTrainer, max_steps=1, callbacks=[MonitorCallback()])
    assert "MonitorCallback is a GRPOCallback, and this trainer does not call its hooks" in caplog.text
    assert not (tmp_path / "monitor").exists()


def test_order_of_the_other_callbacks_stays(make_trainer):
    class Mine(GRPOCallback):
        pass

    trainer = make_trainer(monitor=True, reward_clip_range=[0, 1], callbacks=[Mine()])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    names = [name for name in names if name != "StepMarks"]
    assert names == ["MonitorCallback", "DefaultFlowCallback", "RewardClipCallback", "Mine", "PrinterCallback"]


# The parser


def test_on_alarm_from_yaml_and_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("monitor: true\non_alarm:\n  kl_spike: cool_lr\n  nan_loss: save_and_stop\n")
    parser = TrlParser((AdaptiveGRPOConfig,))
    common = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu"]
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "c.yaml"), *common])
    assert args.monitor
    assert args.on_alarm == {"kl_spike": "cool_lr", "nan_loss": "save_and_stop"}
    parser = TrlParser((AdaptiveGRPOConfig,))
    (args,) = parser.parse_args_and_config(
        [*common, "--monitor", "true", "--on_alarm", '{"truncated": "save_and_stop"}']
    )
    assert args.on_alarm == {"truncated": "save_and_stop"}


# Trackers


class RankMetric(GRPOCallback):
    """A metric that nobody gathered: on rank 0 it is 0, on rank 1 it is 1."""

    def on_setup(self, trainer, **kwargs):
        self.rank = trainer.accelerator.process_index

    def on_rollouts(self, batch, **kwargs):
        batch.metrics["rank"] = float(self.rank)


def train(model_path, out, rank_metric=False, **options) -> dict:
    """A run in a process of its own."""
    alarm = Alarm("rank", level("rank"), 0.5, 0.5, warmup=0, patience=1, calm=1, cause="c", remedy="r", source="s")
    callbacks = [RankMetric(), MonitorCallback({"rank": "adapt_beta"}, [alarm])] if rank_metric else []
    trainer = trainer_of(model_path, make_letters(), f"{out}/run", callbacks=callbacks, **options)
    trainer.train()
    states = [callback.state_dict() for callback in trainer.grpo_callbacks]
    return {"weights": weights_of(trainer), "states": states, "beta": trainer.beta, "logs": trainer.state.log_history}


# What the docs promise: of TRL, of this package, of the monitor.
EXPECTED = ["loss", "grad_norm", "reward", "reward_std", "entropy", "num_tokens"]
EXPECTED += ["group_size/mean", "group_size/min", "group_size/max", "rollouts/total", "rollouts/informative"]
EXPECTED += ["reward_clip/frac", "curriculum/position", "rollouts/flat_high", "rollouts/flat_low"]
EXPECTED += ["advantage/mean", "advantage/abs_mean", "advantage/nonzero", "time/generate", "time/score", "time/update"]
FULL = {"group_size": "variance", "curriculum": "staged", "difficulty_column": "difficulty"}
FULL |= {"reward_clip_quantiles": [0.05, 0.95]}


def test_tensorboard_gets_the_metrics(tmp_path, trained):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"monitor": True, "on_alarm": {"all_wrong": "adapt_beta"}, "beta": 0.1, "max_steps": 12, **FULL}
    trained(reward_funcs=[hopeless], report_to="tensorboard", **options)
    _, metrics, _ = record(tmp_path)
    (events,) = tmp_path.glob("runs/*/events.out.tfevents.*")
    accumulator = event_accumulator.EventAccumulator(str(events))
    accumulator.Reload()
    for name in [*EXPECTED, "kl", "beta", "actions/beta_scale"]:
        points = [(e.step, pytest.approx(e.value)) for e in accumulator.Scalars(f"train/{name}")]
        assert points == [(m["step"], m[name]) for m in metrics]
    # Already with the log that raised it.
    assert [(e.step, e.value) for e in accumulator.Scalars("train/alarms/all_wrong")] == [(10, 1), (11, 1), (12, 1)]


def test_trackio_gets_the_metrics(model_path, tmp_path):
    pytest.importorskip("trackio")
    store = tmp_path / "trackio"
    options = {"report_to": "trackio", "project": "tiny", "run_name": "first", "monitor": True}
    options |= {"beta": 0.1, "max_steps": 6, **FULL}
    (result,) = launch(
        model_path, tmp_path / "out", train, processes=1, environment={"TRACKIO_DIR": str(store)}, **options
    )
    with sqlite3.connect(store / "tiny.db") as connection:
        rows = connection.execute("select metrics from metrics where run_name = 'first'").fetchall()
    entries = [json.loads(metrics) for (metrics,) in rows]
    stored = {entry["train/global_step"]: entry for entry in entries if "train/loss" in entry}
    logs = [entry for entry in result["logs"] if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        for name in [*EXPECTED, "kl"]:
            assert stored[entry["step"]][f"train/{name}"] == pytest.approx(entry[name])
    assert stored[6]["train/alarms/truncated"] == 1


# Two processes


def test_ranks_agree_and_one_writes(model_path, tmp_path):
    options = {"monitor": True, "on_alarm": {"truncated": "cool_lr", "dead_reward": "cap_group_size"}, "beta": 0.1}
    options |= {"kl_target": 0.01, "kl_horizon": 100, "group_size": "variance", "max_steps": 8}
    first, second = launch(model_path, tmp_path, train, **options)
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert str(first["states"]) == str(second["states"])
    assert first["beta"] == second["beta"] != 0.1
    for one, two in zip(first["logs"], second["logs"], strict=True):
        assert without_times(one) == without_times(two)
    assert [entry["actions/lr_scale"] for entry in first["logs"][:-1]] == [1] * 3 + [0.5] * 5
    run, metrics, alarms = record(tmp_path / "run")
    assert run["num_processes"] == 2
    assert [m["step"] for m in metrics] == list(range(1, 9))  # and not twice
    assert [alarm["name"] for alarm in alarms] == ["truncated"]


def test_a_number_that_differs_between_ranks_cannot_part_them(model_path, tmp_path):
    first, second = launch(model_path, tmp_path, train, rank_metric=True, beta=0.1, max_steps=2)
    assert [entry.get("rank") for entry in (first["logs"][0], second["logs"][0])] == [0.0, 1.0]
    # Rank 1 alone would have raised the alarm and changed its β.
    assert first["beta"] == second["beta"] == 0.1
    assert str(first["states"]) == str(second["states"])


def test_a_link_put_in_place_of_the_record_is_not_written_through(tmp_path, caplog):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    record = RunRecord(tmp_path / "run")
    record.start({"max_steps": 3}, step=0)
    record.metrics.unlink()
    record.metrics.symlink_to(precious)
    record.log(1, {"loss": 0.5}, [])
    assert precious.read_text() == "mine"
    assert "could not be written" in caplog.text
