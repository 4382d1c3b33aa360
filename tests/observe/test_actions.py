"""Actions: they do what they say, let go again, survive a restart bit for bit, and refuse where they make no sense."""

from pathlib import Path

import pytest
import torch
from kit import have_same_weights, interrupt, logs_of
from transformers import TrainerCallback

from trl_grpo_ext import GRPOCallback, MonitorCallback
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

    def on_setup(self, trainer, **kwargs):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.register_step_pre_hook(self.look)

    def look(self, optimizer, args, kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.betas.append(self.trainer.beta)

    def on_rollouts(self, batch, **kwargs):
        self.sizes.append(batch.group_sizes.tolist())


@pytest.fixture
def make_trainer(make_trainer):
    """A trainer of eight steps with a `watch`, in which an alarm asks for `action` between two of them."""

    def make(out="run", action=None, first=2, last=4, callbacks=(), **given):
        watch = Watch()
        monitor = [MonitorCallback({"test": action}, [between(first, last)])] if action else []
        trainer = make_trainer(out, callbacks=[*monitor, watch, *callbacks], **{"max_steps": 8, **given})
        trainer.watch = watch
        return trainer

    return make


def logged(trainer, name):
    return [entry.get(name) for entry in logs_of(trainer)]


def checkpoints(trainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


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
def test_cooling_works_under_any_scheduler(name, trained, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 3)
    options = {"lr_scheduler_type": name, "weight_decay": 0.1, **SCHEDULERS[name]}
    plain, cooled = trained("a", **options), trained("b", action="cool_lr", **options)
    factors = [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]  # raised after step 2
    assert logged(cooled, "actions/lr_scale") == factors
    if name != "reduce_lr_on_plateau":  # which follows the rewards, and they differ
        expected = [[rate * factor for rate in rates] for rates, factor in zip(plain.watch.rates, factors, strict=True)]
        assert cooled.watch.rates == expected
        assert logged(cooled, "learning_rate") == logged(plain, "learning_rate")
    else:
        rates = logged(cooled, "learning_rate")
        assert [step[0] for step in cooled.watch.rates] == [a * b for a, b in zip(rates, factors, strict=True)]
    assert not have_same_weights(plain, cooled)


def test_firing_again_starts_the_time_anew_and_does_not_multiply(trained, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 2)
    alarms = [between(2, 3), Alarm(**{**vars(between(3, 4)), "name": "other"})]
    monitor = MonitorCallback({"test": "cool_lr", "other": "cool_lr"}, alarms)
    trainer = trained(callbacks=[monitor])
    assert logged(trainer, "actions/lr_scale") == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]


# Adapting β


def test_beta_doubles_holds_and_falls_back(trained, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.BETA_HALF_LIFE", 2)
    trainer = trained(action="adapt_beta", beta=0.1, max_steps=10)
    # Raised after step 2, over after step 4; from step 5 on it falls by half in two steps, to exactly where it began.
    scales = [1, 1, 2, 2, 2, 2**0.5, 1, 1, 1, 1]
    assert logged(trainer, "actions/beta_scale") == pytest.approx(scales)
    assert trainer.watch.betas == pytest.approx([0.1 * scale for scale in scales])
    assert logged(trainer, "beta") == trainer.watch.betas
    assert trainer.beta == 0.1


def test_beta_is_bounded(make_trainer):
    trainer = make_trainer(action="adapt_beta", beta=0.1)
    action = next(c for c in trainer.grpo_callbacks if type(c).__name__ == "AdaptBeta")
    said = [action.fire("test", trainer.control) for _ in range(5)]
    assert trainer.beta == pytest.approx(0.8)
    assert said[0] == "adapt_beta: beta from 0.1 to 0.2 until the alarm is over"


# Capping groups


def test_cap_limits_groups_while_the_alarm_lasts(trained):
    options = {"group_size": "variance", "per_device_train_batch_size": 20, "num_generations": 5, "min_group_size": 2}
    options |= {"max_group_size": 12, "max_steps": 12, "curriculum": "online"}
    assert max(map(max, trained("a", **options).watch.sizes)) > 6
    trainer = trained("b", action="cap_group_size", first=1, last=9, **options)
    watch = trainer.watch
    assert all(sum(sizes) == 20 for sizes in watch.sizes)
    assert all(max(sizes) <= 6 for sizes in watch.sizes[1:9])
    assert max(map(max, watch.sizes[9:])) > 6
    assert logged(trainer, "actions/max_group_size") == [12] + [6] * 8 + [12] * 3


class FewLarge(GRPOCallback):
    def on_group_sizes(self, **kwargs):
        return torch.tensor([8.0, 8.0])


def test_cap_lets_in_more_prompts_where_too_few_are_left(trained):
    options = {"per_device_train_batch_size": 16, "max_group_size": 8}
    trainer = trained(action="cap_group_size", callbacks=[FewLarge()], **options)
    assert trainer.watch.sizes == [[8, 8]] * 2 + [[4] * 4] * 2 + [[8, 8]] * 4


# Saving and stopping


def test_save_and_stop_saves_and_stops(trained):
    trainer = trained(action="save_and_stop", first=3)
    assert trainer.state.global_step == 3
    assert checkpoints(trainer) == ["checkpoint-3"]


class Poison(TrainerCallback):
    """What an overflow does: a gradient that is not a number, at step 3."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))


POISONED = {"monitor": True, "on_alarm": {"nan_loss": "save_and_stop"}, "per_device_eval_batch_size": 4}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}  # generating from such weights would raise
UNTOLD = {"logging_steps": 10}  # between two logs
POISONED_SAVES = {
    "every step": ({"save_strategy": "steps", "save_steps": 1}, ["checkpoint-1", "checkpoint-2"]),
    "between two logs": ({"save_strategy": "steps", "save_steps": 3, **UNTOLD}, []),
    "the best": ({"save_strategy": "best", "metric_for_best_model": "eval_reward", **EVALUATED, **UNTOLD}, []),
    "an epoch": ({"save_strategy": "epoch", **EVALUATED}, []),
}


@pytest.mark.parametrize("name", POISONED_SAVES)
def test_broken_weights_are_neither_saved_nor_evaluated(name, trained, caplog):
    options, saved = POISONED_SAVES[name]
    trainer = trained(callbacks=[Poison()], **POISONED, **options)
    assert trainer.state.global_step == 3
    assert checkpoints(trainer) == saved
    if name == "every step":
        assert "Step 3: nan_loss: grad_norm is nan. Likely cause: " in caplog.text
        assert "[save_and_stop: stopped without saving]" in caplog.text


def test_whatever_else_is_raised_with_it_broken_weights_are_not_saved(trained):
    nan = Alarm(**{**vars(between(2, 99)), "name": "nan_loss"})
    for out, alarms in (("a", [between(2, 99), nan]), ("b", [nan, between(2, 99)])):
        monitor = MonitorCallback({"test": "save_and_stop", "nan_loss": "save_and_stop"}, alarms)
        trainer = trained(out, callbacks=[monitor])
        assert trainer.state.global_step == 2
        assert checkpoints(trainer) == []


def test_it_saves_where_only_the_best_is_saved_otherwise(trained):
    options = {"save_strategy": "best", "metric_for_best_model": "reward", "greater_is_better": False}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}

    class Worse(TrainerCallback):
        """Every evaluation is worse than the one before it, so only the first is the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_reward"] = float(state.global_step)

    trainer = trained(action="save_and_stop", first=3, callbacks=[Worse()], **options)
    assert trainer.state.global_step == 3
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-3"]


def test_a_stopped_run_can_go_on(trained, make_trainer):
    options = {"group_size": "variance", "per_device_train_batch_size": 16}
    stops = {"action": "save_and_stop", "first": 3, "last": 99, **options}
    trained("a", **stops)
    resumed = make_trainer("a", **stops)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert resumed.state.global_step == 8
    assert have_same_weights(resumed, trained("b", **options))


# Restarts

ACTIVE = {
    "cool_lr": {},
    "adapt_beta": {"beta": 0.1},
    "cap_group_size": {"max_group_size": 12, "curriculum": "online", "per_device_train_batch_size": 32},
}


@pytest.mark.parametrize("last", [3, 6], ids=["released", "raised"])
@pytest.mark.parametrize("action", ACTIVE)
def test_resume_in_the_middle_of_an_action(action, last, make_trainer, trained, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.observe.actions.LR_STEPS", 4)
    options = {"group_size": "variance", "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
    options |= ACTIVE[action]
    whole, cut, resumed = interrupt(lambda out: make_trainer(out, action, last=last, **options), 4)
    for name in ("rates", "betas", "sizes"):
        before, after, expected = (getattr(trainer.watch, name) for trainer in (cut, resumed, whole))
        assert before + after == expected
    assert have_same_weights(resumed, whole)
    assert not have_same_weights(trained("plain", **options), whole)


@pytest.mark.parametrize("action", ["cool_lr", "adapt_beta", "cap_group_size", "save_and_stop"])
def test_an_action_that_never_fires_changes_nothing(action, trained):
    options = {"group_size": "variance", "beta": 0.1, "per_device_train_batch_size": 16}
    waiting = trained("b", action=action, first=99, last=100, **options)
    assert have_same_weights(trained("a", **options), waiting)


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
def test_refused_at_construction(name, make_trainer):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_deepspeed_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"asks for 'cool_lr', and DeepSpeed .*: use 'save_and_stop'"):
        check_conflicts([CoolLearningRate()], trainer)
