"""Actions: they do what they say, let go again, survive a restart bit for bit, and refuse where they make no sense."""

import pytest
import torch
from kit import config_kwargs, has_answer
from runs import Interrupt, same
from transformers import TrainerCallback

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, MonitorCallback
from trl_grpo_ext.config import ACTIONS
from trl_grpo_ext.hooks.checks import check_conflicts
from trl_grpo_ext.observe.actions import CLASSES, CoolLearningRate
from trl_grpo_ext.observe.alarms import Alarm
from trl_grpo_ext.observe.readings import Reading


def between(first: int, last: int) -> Alarm:
    """An alarm that is raised by the log of step `first` and cleared by that of step `last`."""

    def measure(logs, history):
        return Reading(float(first <= history.num_logs + 1 < last), "by hand")

    return Alarm("test", measure, 0.5, 0.5, warmup=0, patience=1, calm=1, cause="c", remedy="r", source="s")


class Watch(GRPOCallback):
    """What the optimizer is about to use, and the sizes of the groups."""

    def __init__(self):
        self.rates, self.betas, self.sizes = [], [], []

    def on_setup(self, args, state, control, trainer, **kwargs):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.register_step_pre_hook(self.look)

    def look(self, optimizer, args, kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.betas.append(self.trainer.beta)

    def on_rollouts(self, args, state, control, batch, **kwargs):
        self.sizes.append(batch.group_sizes.tolist())


def make(model_path, dataset, out, action, first=2, last=4, callbacks=(), **options):
    watch = Watch()
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=has_answer,
        args=AdaptiveGRPOConfig(**config_kwargs(out, **{"max_steps": 8, **options})),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if "eval_strategy" in options else None,
        callbacks=[*([MonitorCallback({"test": action}, [between(first, last)])] if action else []), watch, *callbacks],
    )
    return trainer, watch


def logged(trainer, name):
    return [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]


def test_every_action_of_the_configuration_has_a_class():
    assert tuple(CLASSES) == ACTIONS


# Cooling the learning rate

PLATEAU = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
    "metric_for_best_model": "reward",
}
SCHEDULERS = {
    "linear": {},
    "cosine": {},
    "constant_with_warmup": {"warmup_steps": 4},
    "polynomial": {},
    "reduce_lr_on_plateau": PLATEAU,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_cooling_works_under_any_scheduler(name, model_path, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 3)
    options = {"lr_scheduler_type": name, "weight_decay": 0.1, **SCHEDULERS[name]}
    plain, plain_watch = make(model_path, dataset, tmp_path / "a", None, **options)
    plain.train()
    cooled, watch = make(model_path, dataset, tmp_path / "b", "cool_lr", **options)
    cooled.train()
    factors = [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]  # raised after step 2
    assert logged(cooled, "actions/lr_scale") == factors
    if name != "reduce_lr_on_plateau":  # which follows the rewards, and they differ
        expected = [[rate * factor for rate in rates] for rates, factor in zip(plain_watch.rates, factors, strict=True)]
        assert watch.rates == expected
        assert logged(cooled, "learning_rate") == logged(plain, "learning_rate")
    else:
        rates = logged(cooled, "learning_rate")
        assert [step[0] for step in watch.rates] == [a * b for a, b in zip(rates, factors, strict=True)]
    assert not same(plain, cooled)


def test_firing_again_starts_the_time_anew_and_does_not_multiply(model_path, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 2)
    alarms = [between(2, 3), Alarm(**{**vars(between(3, 4)), "name": "other"})]
    monitor = MonitorCallback({"test": "cool_lr", "other": "cool_lr"}, alarms)
    trainer, _ = make(model_path, dataset, tmp_path, None, callbacks=[monitor])
    trainer.train()
    assert logged(trainer, "actions/lr_scale") == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]


# Adapting β


def test_beta_doubles_holds_and_falls_back(model_path, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.BETA_HALF_LIFE", 2)
    trainer, watch = make(model_path, dataset, tmp_path, "adapt_beta", beta=0.1, max_steps=10)
    trainer.train()
    # Raised after step 2, over after step 4; from step 5 on it falls by half in two steps, to exactly where it began.
    scales = [1, 1, 2, 2, 2, 2**0.5, 1, 1, 1, 1]
    assert logged(trainer, "actions/beta_scale") == pytest.approx(scales)
    assert watch.betas == pytest.approx([0.1 * scale for scale in scales])
    assert logged(trainer, "beta") == watch.betas
    assert trainer.beta == 0.1


def test_beta_is_bounded(model_path, dataset, tmp_path):
    trainer, _ = make(model_path, dataset, tmp_path, "adapt_beta", beta=0.1)
    action = next(c for c in trainer.grpo_callbacks if type(c).__name__ == "AdaptBeta")
    said = [action.fire("test", trainer.control) for _ in range(5)]
    assert trainer.beta == pytest.approx(0.8)
    assert said[0] == "adapt_beta: beta from 0.1 to 0.2 until the alarm is over"


# Capping groups


def test_cap_limits_groups_while_the_alarm_lasts(model_path, dataset, tmp_path):
    options = {"group_size": "variance", "per_device_train_batch_size": 20, "num_generations": 5, "min_group_size": 2}
    options |= {"max_group_size": 12, "max_steps": 12, "curriculum": "online"}
    plain, before = make(model_path, dataset, tmp_path / "a", None, **options)
    plain.train()
    assert max(map(max, before.sizes)) > 6
    trainer, watch = make(model_path, dataset, tmp_path / "b", "cap_group_size", first=1, last=9, **options)
    trainer.train()
    assert all(sum(sizes) == 20 for sizes in watch.sizes)
    assert all(max(sizes) <= 6 for sizes in watch.sizes[1:9])
    assert max(map(max, watch.sizes[9:])) > 6
    assert logged(trainer, "actions/max_group_size") == [12] + [6] * 8 + [12] * 3


class FewLarge(GRPOCallback):
    def on_group_sizes(self, args, state, control, prompt_index, num_rows, **kwargs):
        return torch.tensor([8.0, 8.0])


def test_cap_lets_in_more_prompts_where_too_few_are_left(model_path, dataset, tmp_path):
    trainer, watch = make(
        model_path, dataset, tmp_path, None, per_device_train_batch_size=16, max_group_size=8, callbacks=[FewLarge()]
    )
    trainer.add_callback(MonitorCallback({"test": "cap_group_size"}, [between(2, 4)]))
    trainer.train()
    assert watch.sizes == [[8, 8]] * 2 + [[4] * 4] * 2 + [[8, 8]] * 4


# Saving and stopping


def test_save_and_stop_saves_and_stops(model_path, dataset, tmp_path):
    trainer, _ = make(model_path, dataset, tmp_path, "save_and_stop", first=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


class Poison(TrainerCallback):
    """What an overflow does: a gradient that is not a number, at step 3."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))


def test_broken_weights_are_not_saved(model_path, dataset, tmp_path, caplog):
    options = {"monitor": True, "on_alarm": {"nan_loss": "save_and_stop"}, "save_strategy": "steps", "save_steps": 1}
    trainer, _ = make(model_path, dataset, tmp_path, None, callbacks=[Poison()], **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert "Step 3: nan_loss: grad_norm is nan. Likely cause: " in caplog.text
    assert "[save_and_stop: stopped without saving]" in caplog.text


@pytest.mark.parametrize(
    "asked",
    [
        {"save_strategy": "steps", "save_steps": 3},
        {"save_strategy": "best", "metric_for_best_model": "eval_reward", "eval_strategy": "steps", "eval_steps": 3},
    ],
)
def test_broken_weights_are_not_saved_between_two_logs_either(asked, model_path, dataset, tmp_path):
    options = {"monitor": True, "on_alarm": {"nan_loss": "save_and_stop"}, "per_device_eval_batch_size": 4, **asked}
    trainer, _ = make(model_path, dataset, tmp_path, None, callbacks=[Poison()], **{**options, "logging_steps": 10})
    trainer.train()
    assert trainer.state.global_step == 3
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_broken_weights_are_not_saved_at_the_end_of_the_epoch_nor_evaluated(model_path, dataset, tmp_path):
    options = {"monitor": True, "on_alarm": {"nan_loss": "save_and_stop"}, "save_strategy": "epoch"}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    trainer, _ = make(model_path, dataset, tmp_path, None, callbacks=[Poison()], **options)
    trainer.train()  # generating from such weights raises
    assert trainer.state.global_step == 3
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_whatever_else_is_raised_with_it_broken_weights_are_not_saved(model_path, dataset, tmp_path):
    nan = Alarm(**{**vars(between(2, 99)), "name": "nan_loss"})
    for number, alarms in enumerate([[between(2, 99), nan], [nan, between(2, 99)]]):
        monitor = MonitorCallback({"test": "save_and_stop", "nan_loss": "save_and_stop"}, alarms)
        trainer, _ = make(model_path, dataset, tmp_path / str(number), None, callbacks=[monitor])
        trainer.train()
        assert trainer.state.global_step == 2
        assert list((tmp_path / str(number)).glob("checkpoint-*")) == []


def test_it_saves_where_only_the_best_is_saved_otherwise(model_path, dataset, tmp_path):
    options = {"save_strategy": "best", "metric_for_best_model": "reward", "greater_is_better": False}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}

    class Worse(TrainerCallback):
        """Every evaluation is worse than the one before it, so only the first is the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_reward"] = float(state.global_step)

    trainer, _ = make(model_path, dataset, tmp_path, "save_and_stop", first=3, callbacks=[Worse()], **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_a_stopped_run_can_go_on(model_path, dataset, tmp_path):
    options = {"group_size": "variance", "per_device_train_batch_size": 16}
    stopped, _ = make(model_path, dataset, tmp_path / "a", "save_and_stop", first=3, last=99, **options)
    stopped.train()
    resumed, _ = make(model_path, dataset, tmp_path / "a", "save_and_stop", first=3, last=99, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 8
    whole, _ = make(model_path, dataset, tmp_path / "b", None, **options)
    whole.train()
    assert same(resumed, whole)


# Restarts

ACTIVE = {
    "cool_lr": {},
    "adapt_beta": {"beta": 0.1},
    "cap_group_size": {"max_group_size": 12, "curriculum": "online", "per_device_train_batch_size": 32},
}


@pytest.mark.parametrize("last", [3, 6], ids=["released", "raised"])
@pytest.mark.parametrize("action", ACTIVE)
def test_resume_in_the_middle_of_an_action(action, last, model_path, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 4)
    options = {"group_size": "variance", "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
    options |= ACTIVE[action]
    whole, watch = make(model_path, dataset, tmp_path / "whole", action, last=last, **options)
    whole.train()
    cut, before = make(model_path, dataset, tmp_path / "cut", action, last=last, callbacks=[Interrupt(4)], **options)
    cut.train()
    resumed, after = make(model_path, dataset, tmp_path / "cut", action, last=last, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert before.rates + after.rates == watch.rates
    assert before.betas + after.betas == watch.betas
    assert before.sizes + after.sizes == watch.sizes
    assert same(resumed, whole)
    plain, _ = make(model_path, dataset, tmp_path / "plain", None, **options)
    plain.train()
    assert not same(plain, whole)


@pytest.mark.parametrize("action", ["cool_lr", "adapt_beta", "cap_group_size", "save_and_stop"])
def test_an_action_that_never_fires_changes_nothing(action, model_path, dataset, tmp_path):
    options = {"group_size": "variance", "beta": 0.1, "per_device_train_batch_size": 16}
    plain, _ = make(model_path, dataset, tmp_path / "a", None, **options)
    plain.train()
    waiting, _ = make(model_path, dataset, tmp_path / "b", action, first=99, last=100, **options)
    waiting.train()
    assert same(plain, waiting)


# What is refused

REFUSED = {
    "needs_monitor": ({"on_alarm": {"kl_spike": "cool_lr"}}, r"on_alarm=.* needs monitor=True.*: set it"),
    "alarm": (
        {"on_alarm": {"kl": "cool_lr"}, "monitor": True},
        "on_alarm has no alarm 'kl': use one of 'all_correct', ",
    ),
    "action": (
        {"on_alarm": {"kl_spike": "stop"}, "monitor": True},
        "on_alarm asks for 'stop' on 'kl_spike': use one of 'adapt_beta', 'cool_lr', 'cap_group_size', 'save_and_stop'",
    ),
    "no_mapping": ({"on_alarm": "cool_lr", "monitor": True}, "on_alarm='cool_lr' must map alarms to actions, such as"),
    "no_beta": (
        {"on_alarm": {"kl_spike": "adapt_beta"}, "monitor": True},
        "asks for 'adapt_beta', and with beta=0 .*: set beta, for example to 0.04, or use 'cool_lr'",
    ),
    "two_controllers": (
        {"on_alarm": {"kl_spike": "adapt_beta"}, "monitor": True, "kl_target": 0.1, "beta": 0.1},
        "asks for 'adapt_beta', and kl_target moves beta already: leave one of them out",
    ),
    "fixed_groups": (
        {"on_alarm": {"truncated": "cap_group_size"}, "monitor": True},
        "asks for 'cap_group_size', and group_size='fixed' .*: set group_size='variance' or",
    ),
    "no_room": (
        {"on_alarm": {"truncated": "cap_group_size"}, "monitor": True, "group_size": "threshold", "max_group_size": 4},
        "max_group_size=4 cannot be lowered without going below num_generations=4: raise max_group_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name, model_path, dataset, tmp_path):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(model_path, dataset, tmp_path, None, **options)


def test_deepspeed_is_refused(model_path, dataset, tmp_path):
    trainer, _ = make(model_path, dataset, tmp_path, None)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"asks for 'cool_lr', and DeepSpeed .*: use 'save_and_stop'"):
        check_conflicts([CoolLearningRate()], trainer)
