"""Held-out evaluation of real runs: it moves nothing, goes on where it was, keeps the best and stops in time."""

import json
import logging
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from kit import (
    args_of,
    count_vowels,
    has_answer,
    have_same_weights,
    interrupt,
    launch,
    logs_of,
    make_letters,
    weights_of,
)
from kit import trainer_of as plain_trainer_of
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig, HeldOutCallback
from trl_grpo_ext.observe import tables
from trl_grpo_ext.observe.held_out import HeldOut
from trl_grpo_ext.observe.measures import values_of
from trl_grpo_ext.observe.record import HELD_OUT
from trl_grpo_ext.rewards import Length, as_reward

EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}


def letters():
    """Twice as many prompts as there are letters, half of which the training never sees."""
    rows = make_letters()
    return concatenate_datasets([rows, rows.map(lambda row: {"prompt": f"now {row['prompt']}"})])


def talks():
    """Twenty-two conversations of two turns."""
    prompts = [[{"role": "user", "content": f"say {letter}"}] for letter in "abcdefghijklmnopqrstuv"]
    return Dataset.from_list([{"prompt": prompt, "turns": ["and?"], "answer": "a"} for prompt in prompts])


def trainer_of(model, out, dataset=None, **given):
    given = {"eval_dataset": letters(), **given}
    return plain_trainer_of(model, make_letters() if dataset is None else dataset, out, **given)


def held_out_of(trainer):
    return next(callback for callback in trainer.grpo_callbacks if isinstance(callback, HeldOutCallback))


def evaluations_of(trainer):
    """The logs of the evaluations, without how long they took."""
    found = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    return [{k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))} for entry in found]


def lines_of(folder):
    return [json.loads(line) for line in (folder / HELD_OUT).read_text().splitlines()]


class Scripted:
    """A metric that is, for all answers of an evaluation, what a list says, with some noise between the prompts."""

    __name__ = "scripted"

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __call__(self, completions, **kwargs):
        value = self.values[min(self.calls, len(self.values) - 1)]
        self.calls += 1
        return [value + 0.001 * (i % 2) for i in range(len(completions))]


def by_chance(completions, **kwargs):
    """A metric that draws from every generator there is."""
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completions]


# It moves nothing


SAMPLED = {"num_generations_eval": 3, "eval_pass_at": [1, 3], "per_device_eval_batch_size": 6}


@pytest.mark.parametrize("options", [{"eval_metrics": ["reward"]}, {"eval_metrics": ["kit.has_answer"], **SAMPLED}])
def test_training_is_bit_for_bit_that_without_evaluation(options, model_path, tmp_path):
    states, trainers = [], []
    for name, given in (("without", {"max_steps": 4}), ("with", {**options, **EVERY_2})):
        trainer = trainer_of(model_path, tmp_path / name, reward_funcs=count_vowels, **given)
        trainer.train()
        trainers.append(trainer)
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]
    assert have_same_weights(*trainers)
    logs = [[{k: v for k, v in e.items() if "time" not in k} for e in logs_of(trainer)] for trainer in trainers]
    assert all(alone.items() <= looked.items() for alone, looked in zip(*logs, strict=True))
    assert [entry["step"] for entry in evaluations_of(trainers[1])] == [0, 2, 4]


def test_metrics_that_draw_take_no_number_of_the_training(model_path, tmp_path):
    whole, looked = (
        trainer_of(model_path, tmp_path / name, callbacks=callbacks, max_steps=2)
        for name, callbacks in (("without", []), ("with", [HeldOutCallback({"chance": by_chance})]))
    )
    for trainer in (whole, looked):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        trainer.train()
    assert have_same_weights(whole, looked)
    # The same numbers each time, so that they are no noise of the gain.
    first, last = (entry["eval_chance"] for entry in evaluations_of(looked))
    assert first == last


# What it measures


def test_what_is_logged_is_what_the_answers_are_worth(model_path, tmp_path):
    options = {"eval_metrics": ["Length('characters')", "kit.count_vowels"], **EVERY_2}
    trainer = trainer_of(model_path, tmp_path, **options)
    trainer.train()
    logged = evaluations_of(trainer)
    lines = lines_of(tmp_path)
    assert len(lines) == 3 * 52
    for entry in logged:
        own = [line for line in lines if line["step"] == entry["step"]]
        assert [line["row"] for line in own] == list(range(52))
        answers = [line["answer"] for line in own]
        assert [line["question"] for line in own] == letters()["prompt"]
        worth = has_answer(answers, letters()["answer"])
        assert entry["eval_reward"] == entry["eval_rewards/has_answer/mean"] == pytest.approx(sum(worth) / 52)
        assert entry["eval_length"] == pytest.approx(sum(map(len, answers)) / 52)
        vowels = count_vowels(answers)
        assert entry["eval_count_vowels"] == pytest.approx(sum(vowels) / 52)
        assert [line["scores"]["count_vowels"] for line in own] == vowels
    start, last = logged[0], logged[-1]
    gain = last["eval_length"] - start["eval_length"]
    assert last["eval_length/gain"] == pytest.approx(gain)
    assert gain != 0.0
    assert last["eval_length/gain_low"] < gain < last["eval_length/gain_high"]
    assert start["eval_length/gain_low"] == start["eval_length/gain_high"] == 0.0
    held_out = held_out_of(trainer)
    assert (held_out.before.step, held_out.after.step) == (0, 4)
    assert held_out.after.per_prompt("count_vowels")[3] == vowels[3]


def test_samples_and_pass_at_k(model_path, tmp_path):
    trainer = trainer_of(
        model_path, tmp_path, max_steps=1, eval_pass_threshold=2.0, **SAMPLED, reward_funcs=count_vowels
    )
    trainer.train()
    entry = evaluations_of(trainer)[0]
    own = [line for line in lines_of(tmp_path) if line["step"] == 0]
    assert [(line["row"], line["sample"]) for line in own] == [(row, i) for row in range(52) for i in range(3)]
    passed = [[count_vowels([line["answer"]])[0] >= 2 for line in own if line["row"] == row] for row in range(52)]
    assert any(any(row) and not all(row) for row in passed)
    assert entry["eval_reward/pass@1"] == pytest.approx(sum(sum(row) / 3 for row in passed) / 52)
    assert entry["eval_reward/pass@3"] == pytest.approx(sum(map(any, passed)) / 52)


def test_greedy_is_the_default_and_answers_do_not_depend_on_the_batch(model_path, tmp_path):
    answers = []
    for size in (5, 64):
        trainer = trainer_of(
            model_path, tmp_path, eval_metrics=["reward"], per_device_eval_batch_size=size, num_generations=4
        )
        answers.append(held_out_of(trainer).answers_to(letters()).answers)
    assert answers[0] == answers[1]


def test_several_datasets_are_kept_apart(model_path, tmp_path):
    eval_dataset = {"small": make_letters(), "big": letters()}
    options = {"eval_metrics": ["Length"], "metric_for_best_model": "big_length", "eval_patience": 3, **EVERY_2}
    trainer = trainer_of(model_path, tmp_path, eval_dataset=eval_dataset, **options)
    trainer.train()
    logged = evaluations_of(trainer)
    assert [sorted(entry) for entry in logged[:2]] == [sorted(logged[2 + i]) for i in range(2)]
    assert "eval_small_length/gain_low" in logged[0]
    assert "eval_big_length/gain_low" in logged[1]
    assert {line.get("dataset") for line in lines_of(tmp_path)} == {"small", "big"}
    callback = held_out_of(trainer)
    assert list(callback.starts) == ["eval_small", "eval_big"]
    assert callback.starts["eval_big"].num_prompts == 52
    assert len(callback.lows) == 3
    # Other prompts are measured and compared with nothing.
    metrics = trainer.evaluate(make_letters().select(range(3)))
    assert "eval_length" in metrics
    assert "eval_length/gain" not in metrics


def test_a_part_of_the_reward_is_a_metric_too(model_path, tmp_path):
    asked = []

    def counted(completions, **kwargs):
        asked.append(len(completions))
        return count_vowels(completions)

    reward = as_reward(counted) - 0.1 * Length("characters")
    options = {"eval_metrics": ["counted", "Length('characters')"], "max_steps": 1}
    trainer = trainer_of(model_path, tmp_path, reward_funcs=reward, **options)
    metrics = trainer.evaluate()
    assert asked == [52]  # once for both
    assert metrics["eval_counted"] == metrics["eval_rewards/counted/mean"]
    assert metrics["eval_length/gain_low"] == 0.0
    with pytest.raises(ValueError, match="'length' is measured already"):
        trainer_of(model_path, tmp_path, reward_funcs=reward, eval_metrics=["Length('words')"])


# It goes on where it was


def test_a_resumed_run_is_the_uninterrupted_one(model_path, tmp_path):
    def make(name):
        options = {"eval_metrics": ["Length"], "metric_for_best_model": "length", "load_best_model_at_end": True}
        options |= {"eval_patience": 9, "save_strategy": "steps", "save_steps": 2, **SAMPLED, **EVERY_2, "max_steps": 6}
        return trainer_of(model_path, tmp_path / name, reward_funcs=count_vowels, **options)

    whole, _, resumed = interrupt(make, step=3)
    assert have_same_weights(whole, resumed)
    assert evaluations_of(whole) == evaluations_of(resumed)
    first, second = held_out_of(whole), held_out_of(resumed)
    assert first.state_dict() == second.state_dict()
    assert first.before == second.before
    assert first.after == second.after
    texts = [(tmp_path / name / HELD_OUT).read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert whole.state.best_global_step == resumed.state.best_global_step


def test_with_other_prompts_gains_are_counted_anew(model_path, tmp_path, caplog):
    trainer = trainer_of(model_path, tmp_path, eval_metrics=["Length"], max_steps=1)
    trainer.train()
    state = held_out_of(trainer).state_dict()
    other = trainer_of(model_path, tmp_path, eval_dataset=make_letters(), eval_metrics=["Length"])
    callback = held_out_of(other)
    callback.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        metrics = other.evaluate()
    assert "the held-out prompts are not those of the start" in caplog.text
    assert metrics["eval_length/gain_low"] == 0.0
    assert callback.before.num_prompts == 26


def test_a_second_training_begins_anew(model_path, tmp_path):
    trainer = trainer_of(model_path, tmp_path, eval_metrics=["Length"], max_steps=1)
    trainer.train()
    first = held_out_of(trainer).after
    trainer.train()
    assert held_out_of(trainer).before.answers == first.answers
    assert [line["step"] for line in lines_of(tmp_path)] == [0] * 52 + [1] * 52


class Spoil(TrainerCallback):
    """Ends a run whose weights have become NaN, after every other callback had its say."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(model.parameters()).data.fill_(math.nan)
            control.should_training_stop = True


def test_broken_weights_are_not_asked(model_path, tmp_path):
    trainer = trainer_of(model_path, tmp_path, eval_metrics=["reward"], callbacks=[Spoil()], max_steps=4, **SAMPLED)
    trainer.train()
    assert [entry["step"] for entry in evaluations_of(trainer)] == [0]


class StopLate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 1


def test_whoever_ends_a_run_its_end_is_evaluated(model_path, tmp_path):
    trainer = trainer_of(model_path, tmp_path, eval_metrics=["reward"], callbacks=[StopLate()], max_steps=4)
    trainer.train()
    assert [entry["step"] for entry in evaluations_of(trainer)] == [0, 1]


# It keeps the best


@pytest.mark.parametrize("rollout", ["single", "multi_turn", "hierarchical"])
@pytest.mark.parametrize("is_peft", [False, True])
def test_the_best_weights_are_restored(rollout, is_peft, model_path, tmp_path):
    rows = {"hierarchical": 6, "multi_turn": 8}.get(rollout, 8)
    options = {"rollout": rollout, "num_plans": 2, "num_implementations": 2, "num_generations": 2, **EVERY_2}
    options |= {"per_device_train_batch_size": rows, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    options |= {"plan_template": "plan {prompt}", "metric_for_best_model": "scripted", "load_best_model_at_end": True}
    scripted = Scripted([0.1, 0.5, 0.9, 0.2])
    data = talks() if rollout == "multi_turn" else talks().remove_columns("turns")
    given = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if is_peft else {}
    callback = HeldOutCallback([scripted], batch_size=64)
    trainer = trainer_of(
        model_path,
        tmp_path,
        data,
        eval_dataset=data,
        reward_funcs=count_vowels,
        callbacks=[callback],
        **given,
        **options,
    )
    last = {}
    end = callback.on_step_end
    callback.on_step_end = lambda args, state, control, **kwargs: (
        last.update({state.global_step: weights_of(trainer)}),
        end(args, state, control, **kwargs),
    )[-1]
    trainer.train()
    assert scripted.calls == 4
    assert trainer.state.best_global_step == 4
    kept = weights_of(trainer)
    assert all(torch.equal(kept[name], last[4][name]) for name in kept)
    assert any(not torch.equal(kept[name], last[6][name]) for name in kept)
    assert (callback.before.step, callback.after.step) == (0, 4)
    assert callback.after.mean("scripted") == pytest.approx(0.9, abs=0.001)
    assert lines_of(tmp_path)[-1] == {"step": 6, "kept": 4}


def test_transformers_own_ways_to_know_the_best_work(model_path, tmp_path):
    scripted = Scripted([0.5, 0.1, 0.3, 0.2, 0.25])
    options = {"save_strategy": "best", "metric_for_best_model": "eval_scripted", "load_best_model_at_end": True}
    options |= {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2}
    callbacks = [HeldOutCallback([scripted], batch_size=64), EarlyStoppingCallback(2)]
    trainer = trainer_of(model_path, tmp_path, callbacks=callbacks, **options)
    trainer.train()
    assert trainer.state.global_step == 8
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert held_out_of(trainer).after.step == 4


# It stops in time


@pytest.mark.parametrize(
    ("values", "options", "stop"),
    [
        ([0.0, 0.2, 0.4, 0.3, 0.4, 0.5], {}, 8),  # best at step 4: two evaluations wait
        ([0.0, -0.1, -0.2], {}, 4),  # the start is the best
        ([0.0, -0.1, -0.2, -0.1, -0.15], {"greater_is_better": False}, 8),
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2], {}, 12),
    ],
)
def test_training_stops_after_evaluations_without_a_higher_lower_bound(values, options, stop, model_path, tmp_path):
    options = {"metric_for_best_model": "scripted", "max_steps": 12, **options}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    callback = HeldOutCallback([Scripted(values)], patience=2, batch_size=64)
    trainer = trainer_of(model_path, tmp_path, callbacks=[callback], **options)
    trainer.train()
    assert trainer.state.global_step == stop


def test_a_gain_within_the_noise_is_no_gain(model_path, tmp_path):
    class Noisy(Scripted):
        def __call__(self, completions, **kwargs):
            self.calls += 1
            size = 0.0 if self.calls == 1 else 1.0  # the mean rises by 0.1 each time, and prompts scatter by 1
            return [0.1 * self.calls + size * (-1) ** i for i in range(len(completions))]

    options = {"metric_for_best_model": "noisy", "max_steps": 12, "eval_strategy": "steps", "eval_steps": 2}
    callback = HeldOutCallback({"noisy": Noisy([])}, patience=2, batch_size=64)
    trainer = trainer_of(model_path, tmp_path, callbacks=[callback], **options)
    trainer.train()
    # The gain is above 0 from the first evaluation on; its lower bound is 0.1 - 0.28 then, and 0.2 - 0.28.
    assert trainer.state.global_step == 4


# Two processes


def evaluate_on_all(model_path, out, **options):
    scripted = Scripted([0.0, 0.3, 0.2, 0.1, 0.1])
    callback = HeldOutCallback({"scripted": scripted, "length": Length("characters")}, patience=2, batch_size=64)
    options |= {"metric_for_best_model": "scripted", "load_best_model_at_end": True, "save_strategy": "steps"}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 8}
    trainer = trainer_of(model_path, out, callbacks=[callback], eval_dataset=letters().select(range(27)), **options)
    trainer.train()
    return {
        "step": trainer.state.global_step,
        "logs": evaluations_of(trainer),
        "state": callback.state_dict(),
        "weights": [p.sum().item() for p in trainer.model.parameters()],
    }


def test_processes_agree_and_say_what_one_says(model_path, tmp_path):
    options = {"per_device_train_batch_size": 4}
    first, second = launch(model_path, tmp_path / "two", evaluate_on_all, **options)
    assert first == second
    assert first["step"] == 3
    (one,) = launch(model_path, tmp_path / "one", evaluate_on_all, 1, per_device_train_batch_size=8)
    assert one["step"] == 3
    assert one["state"]["starts"]["eval"]["answers"] == first["state"]["starts"]["eval"]["answers"]
    assert [entry["eval_scripted"] for entry in one["logs"]] == pytest.approx(
        [entry["eval_scripted"] for entry in first["logs"]], abs=1e-3
    )
    written = lines_of(tmp_path / "two")
    assert [line["row"] for line in written if line["step"] == 0 and "row" in line] == list(range(27))


def fail_on_one(model_path, out):
    def broken(completions, **kwargs):
        if torch.distributed.get_rank() == 1:
            raise OSError("no judge")
        return [1.0] * len(completions)

    trainer = trainer_of(model_path, out, callbacks=[HeldOutCallback([broken])], max_steps=1)
    trainer.train()
    return [entry.get("eval_failed/broken") for entry in evaluations_of(trainer)]


def test_a_metric_that_fails_on_one_process_is_counted_on_all(model_path, tmp_path):
    assert launch(model_path, tmp_path / "out", fail_on_one) == [[26.0, 26.0]] * 2


# Bad input


def picky(completions, answer, **kwargs):
    """Fails where the answer is b, does not apply to c, and is no number for d."""
    if "b" in answer:
        raise KeyError("b")
    return [{"c": None, "d": math.nan}.get(each, 1.0) for each in answer]


def test_a_metric_that_fails_on_some_rows_costs_those_rows(model_path, tmp_path):
    trainer = trainer_of(
        model_path, tmp_path, eval_dataset=make_letters(), callbacks=[HeldOutCallback([picky])], max_steps=1
    )
    trainer.train()
    entry = evaluations_of(trainer)[0]
    assert entry["eval_picky"] == 1.0
    assert entry["eval_failed/picky"] == 2.0
    assert "eval_failed/reward" not in entry
    scores = [line["scores"]["picky"] for line in lines_of(tmp_path)][:26]
    assert scores == [1.0, None, None, None] + [1.0] * 22
    assert entry["eval_picky/gain_low"] == 0.0


def test_a_metric_that_fails_on_every_row_is_an_error(model_path, tmp_path):
    def broken(completions, no_such_column, **kwargs):
        return [1.0] * len(completions)

    trainer = trainer_of(model_path, tmp_path, callbacks=[HeldOutCallback([broken])], max_steps=1)
    with pytest.raises(
        ValueError, match=r"the metric 'broken' failed on each of 52 held-out answers, .*no_such_column"
    ):
        trainer.train()


def test_a_metric_without_a_value_is_left_out_and_never_the_best(model_path, tmp_path):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    options = {"metric_for_best_model": "nothing", "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = trainer_of(
        model_path, tmp_path, callbacks=[HeldOutCallback([nothing])], save_steps=2, **options, **EVERY_2
    )
    trainer.train()
    assert not any("eval_nothing" in entry for entry in evaluations_of(trainer))
    assert trainer.state.best_model_checkpoint is None
    assert held_out_of(trainer).after.step == 4


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"eval_dataset": None}, "no prompts: pass eval_dataset"),
        ({"eval_dataset": make_letters().select([])}, "eval_dataset has no rows: pass at least one"),
        ({"eval_dataset": {"a": make_letters(), "b": make_letters().select([])}}, r"eval_dataset\['b'\] has no rows"),
        ({"eval_dataset": make_letters().to_iterable_dataset()}, "eval_dataset is a IterableDataset.*asked again"),
        ({"eval_dataset": make_letters().rename_column("prompt", "q")}, "no column 'prompt', only"),
        ({"eval_metrics": ["Lenght()"]}, "did you mean Length"),
        ({"eval_metrics": ["rewrd"]}, "or did you mean 'reward', which the training rewards"),
        ({"eval_metrics": ["Length", "Length('words')"]}, "'length' is measured already: give this one another"),
        ({"metric_for_best_model": "loss"}, "held-out answers have no loss"),
        ({"metric_for_best_model": "lenght"}, "is not measured on the held-out prompts: did you mean 'length'"),
        ({"metric_for_best_model": "rewards/has_anwser/mean"}, "did you mean 'rewards/has_answer/mean'"),
        ({"eval_patience": 2}, "eval_strategy='no' makes none between"),
        ({"eval_patience": 2, **EVERY_2, "metric_for_best_model": "rewards/has_answer/mean"}, "name one of them"),
        ({"eval_patience": 2, **EVERY_2, "eval_dataset": make_letters().select(range(19))}, "19 held-out prompts are"),
        (
            {"metric_for_best_model": "reward/gain_low", "eval_dataset": make_letters().select(range(19))},
            "is not measured",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(given, problem, model_path, tmp_path):
    given = {"eval_metrics": ["Length"], **given}
    with pytest.raises(ValueError, match=problem):
        trainer_of(model_path, tmp_path, **given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"eval_temperature": -1.0}, "eval_temperature=-1.0 must be finite and not negative"),
        ({"eval_temperature": 0.0, "num_generations_eval": 4}, "4 greedy answers to a prompt are all equal"),
        ({"eval_pass_at": [1, 8], "num_generations_eval": 4}, "asks for pass@8 of num_generations_eval=4"),
        ({"eval_pass_at": [1], "eval_pass_threshold": math.nan}, "eval_pass_threshold=nan must be finite"),
        ({"eval_patience": 0}, "eval_patience=0 stops before it looks"),
    ],
)
def test_options_are_checked(options, problem):
    with pytest.raises(ValueError, match=problem):
        args_of(**options)


def test_options_say_what_they_switch_on():
    assert not args_of().evaluates_held_out
    assert args_of().num_generations_eval is None
    args = args_of(eval_metrics=["reward"], load_best_model_at_end=True, save_steps=2, save_strategy="steps", **EVERY_2)
    assert (args.num_generations_eval, args.metric_for_best_model, args.greater_is_better) == (1, "reward", True)
    assert args_of(eval_temperature=0.7).num_generations_eval is None  # as many as in training, as TRL says


def test_options_from_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("eval_metrics: [\"Length('words')\", reward]\neval_pass_at: [1, 2]\n")
    flags = ["--num_generations_eval", "2", "--eval_patience", "3", "--output_dir", str(tmp_path), "--bf16", "false"]
    parser = TrlParser(AdaptiveGRPOConfig)
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *flags])
    assert args.eval_metrics == ["Length('words')", "reward"]
    assert (args.eval_pass_at, args.eval_patience, args.num_generations_eval) == ([1, 2], 3, 2)


def test_a_few_prompts_are_named_as_such(model_path, tmp_path, caplog):
    few = make_letters().select(range(19))
    trainer = trainer_of(model_path, tmp_path, eval_dataset=few, eval_metrics=["reward"], max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("19 held-out prompts are too few to tell a gain from noise: use at least 20") == 1
    assert "eval_reward/gain" in evaluations_of(trainer)[-1]
    assert "eval_reward/gain_low" not in evaluations_of(trainer)[-1]


def test_tools_are_refused(model_path, tmp_path):
    def tell_time() -> str:
        """The time."""
        return "noon"

    with pytest.raises(ValueError, match=r"tools|response schema|template"):
        trainer_of(model_path, tmp_path, eval_metrics=["reward"], tools=[tell_time])


# Where it goes


class Tracker:
    """What a tracker module offers, as far as tables go."""

    run = "running"

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)

    def Table(self, dataframe):  # noqa: N802
        return dataframe.to_dict("list")


def test_trackers_get_a_table(monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    rows = [{"row": 0, "answer": "a", "scores": {"total": 1.0}}, {"row": 1, "answer": "b", "scores": {"total": None}}]
    tables.log_table(["tensorboard", "wandb"], "eval_completions", 5, rows)
    (logged,) = tracker.logged
    table = logged["eval_completions"]
    assert table["step"] == [5, 5]
    assert table["answer"] == ["a", "b"]
    assert table["total"][0] == 1.0
    tracker.run = None
    tables.log_table(["wandb"], "eval_completions", 5, rows)
    tables.log_table([], "eval_completions", 5, rows)
    assert len(tracker.logged) == 1


@pytest.mark.parametrize("logs_completions", [False, True])
def test_the_table_of_training_completions_is_left_alone(logs_completions, model_path, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("trl_grpo_ext.observe.evaluation.log_table", lambda *given: logged.append(given))
    trainer = trainer_of(model_path, tmp_path, eval_metrics=["reward"], max_steps=1, log_completions=logs_completions)
    trainer.train()
    assert trainer.log_completions == logs_completions
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == int(logs_completions)
    assert [given[1:3] for given in logged] == [("eval_completions", step) for step in (0, 1)] * logs_completions


def test_turns_are_told_apart():
    held_out = HeldOut(
        ["q"] * 3, ["a", "b", "c"], {"part": [1.0, 2.0, 6.0], "total": [1.0, 2.0, 6.0]}, [0, 1, 1], [1, 1, 2]
    )
    values = values_of(held_out, {}, ["part"], [])
    assert values["reward"] == 2.5  # of the prompts: 1, and 4
    assert (values["rewards/part/turn_1/mean"], values["rewards/part/turn_2/mean"]) == (1.5, 6.0)


def test_a_damaged_state_is_refused(model_path, tmp_path):
    callback = held_out_of(trainer_of(model_path, tmp_path, eval_metrics=["reward"]))
    data = HeldOut(["q"], ["a"], {"total": [1.0]}).to_dict()
    for damaged in ("nothing", {}, {**data, "answers": []}, {**data, "scores": {"total": []}}):
        state = {**callback.state_dict(), "starts": {"eval": damaged}}
        with pytest.raises(ValueError, match="held-out evaluation"):
            callback.load_state_dict(state)
    assert HeldOut.from_dict(data) == HeldOut(["q"], ["a"], {"total": [1.0]})


def test_a_reward_model_is_asked_with_its_tokenizer():
    from trl_grpo_ext.observe.held_out import reward_of

    model, tokenizer = SimpleNamespace(named_parameters=None), SimpleNamespace()
    trainer = SimpleNamespace(reward_funcs=[model, count_vowels], reward_processing_classes=[tokenizer, None])
    trainer.reward_func_names, trainer.reward_weights = ["judge", "count_vowels"], torch.tensor([2.0, 1.0])
    reward = reward_of(trainer)
    assert [leaf.name for leaf in reward.leaves()] == ["judge", "count_vowels"]
    assert reward.leaves()[0].tokenizer is tokenizer
    trainer.reward_funcs, trainer.reward_processing_classes = [as_reward(count_vowels) - Length()], [None]
    trainer.reward_func_names, trainer.reward_weights = ["x"], torch.tensor([1.0])
    assert reward_of(trainer) is trainer.reward_funcs[0]


# Tasks


@pytest.mark.training
def test_each_task_is_measured_and_may_choose_the_best(model_path, tmp_path):
    tasks = ["vowel" if letter in "aeiou" else "other" for letter in "abcdefghijklmnopqrstuvwxyz"]
    dataset = make_letters().add_column("task", tasks)
    options = {"task_column": "task", "eval_metrics": ["Length"], "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "tasks/vowel/reward"}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(model_path, tmp_path, dataset, eval_dataset=dataset, **options)
    trainer.train()
    first, *_, last = evaluations_of(trainer)
    held_out = held_out_of(trainer)
    for task in ("vowel", "other"):
        rows = [row for row, own in enumerate(tasks) if own == task]
        mine = [held_out.before.per_prompt("total")[row] for row in rows]
        assert first[f"eval_tasks/{task}/reward"] == pytest.approx(sum(mine) / len(mine))
        names = ("reward", "reward/gain", "length", "length/gain", "mean_length", "clipped_ratio")
        assert {f"eval_tasks/{task}/{name}" for name in names} <= {*last}
        assert last[f"eval_tasks/{task}/mean_length"] == last[f"eval_tasks/{task}/length"]  # both in tokens
    scores = {entry["step"]: entry["eval_tasks/vowel/reward"] for entry in evaluations_of(trainer) if entry["step"]}
    assert trainer.state.best_metric == pytest.approx(max(scores.values()))


def test_held_out_prompts_need_their_task(model_path, tmp_path):
    dataset = make_letters().add_column("task", ["a"] * 26)
    with pytest.raises(ValueError, match="eval_dataset has no column 'task', which task_column names"):
        trainer_of(model_path, tmp_path, dataset, task_column="task", eval_metrics=["reward"])
    options = {"task_column": "task", "metric_for_best_model": "tasks/b/reward", "eval_metrics": ["reward"]}
    with pytest.raises(ValueError, match="did you mean 'tasks/a/reward'"):
        trainer_of(model_path, tmp_path, dataset, eval_dataset=dataset, **options)
