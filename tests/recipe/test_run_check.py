"""The check of a run: healthy runs pass, sick ones are named, and the run afterwards is the one without a check."""

import dataclasses
import importlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from checked_run import check_of, likes_vowels, save_ending_model, two_ranks, vowels
from chromium import BROWSER, Page
from datasets import Dataset
from kit import (
    NAN,
    PYTHONPATH,
    Record,
    args_of,
    batches_of,
    config_kwargs,
    have_same_weights,
    launch,
    logs_of,
    make_model,
    make_tokenizer,
    text_of,
    trainer_of,
    weights_of,
)
from peft import LoraConfig
from trl import ModelConfig

from trl_grpo_ext import GRPOCallback
from trl_grpo_ext.recipe.run_check import check_run, command
from trl_grpo_ext.recipe.run_check.findings import findings_of
from trl_grpo_ext.recipe.run_check.measured import Measured, Setting
from trl_grpo_ext.recipe.run_check.page import duration, print_page, render
from trl_grpo_ext.recipe.run_check.probes import as_text, reference_column
from trl_grpo_ext.recipe.script import parse_arguments
from trl_grpo_ext.rewards import Length, as_reward
from trl_grpo_ext.trainer.trial import Reach, Update

pytestmark = pytest.mark.training

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
    return save_ending_model(tmp_path_factory.mktemp("ending"))


@pytest.fixture
def check(ending, tmp_path):
    return lambda **given: check_of(ending, tmp_path / "run", **given)


def levels_of(result):
    return {finding.name: finding.level for finding in result.findings}


# Nothing is wrong


def test_a_healthy_run_passes_and_the_page_says_what_it_costs(check, tmp_path):
    result = check(output=tmp_path, num_prompts=12)
    assert (result.names, result.learns) == ([], True), result.findings
    measured = result.measured
    assert len(measured.answers) >= 48
    assert len(measured.groups) >= 12
    assert {paid.kind for paid in measured.paid} >= {"reference", "empty", "question", "one_token", "other_reference"}
    assert [paid.mean for paid in measured.paid if paid.kind == "reference"] == [1.0]
    assert all(reach.gradient > 0 and reach.num_moved for reach in measured.update.parameters)
    assert measured.plan.rollouts == 8
    assert measured.plan.prompts == 2
    assert measured.plan.steps == 3
    assert measured.plan.steps_per_epoch == 13
    assert measured.plan.step_seconds > 0
    assert measured.plan.memory > 0
    assert result.page == tmp_path / "check.html"
    page = result.page.read_text()
    assert "Nothing is wrong with this run" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    "options",
    [
        {"peft_config": LORA},
        {"share_prompts": True, "skip_zero_advantage": True, "gradient_checkpointing": True},
        {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"group_size": "single", "baseline": "predicted", "scale_rewards": "batch", "curriculum": "predicted"},
        {"group_size": "variance", "curriculum": "staged", "difficulty_column": "difficulty", "monitor": True},
        {"multi_objective_aggregation": "normalize_then_sum", "loss_type": "grpo"},
    ],
    ids=["lora", "lean", "reference", "efficient", "variance", "normalize"],
)
def test_the_run_afterwards_is_the_one_without_a_check(ending, tmp_path, options):
    trainers = []
    for checked in (True, False):
        given = {"max_completion_length": 12, "reward_funcs": likes_vowels, "callbacks": [Record()], **options}
        trainer = trainer_of(ending, vowels(), tmp_path / f"{checked}", **given)
        if checked:
            before = weights_of(trainer)
            states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
            result = check_run(trainer, num_prompts=6, show=False)
            assert result.learns, result.findings
            assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            assert random.getstate() == states[0]
            assert numpy.random.get_state()[1].tolist() == states[1]
            assert torch.equal(torch.get_rng_state(), states[2])
            assert trainer.optimizer is None
            assert batches_of(trainer) == []
        trainer.train()
        trainers.append(trainer)
    one, other = trainers
    assert have_same_weights(one, other)
    timed = ("time", "runtime", "per_second")
    for first, second in zip(logs_of(one), logs_of(other), strict=True):
        kept = [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in (first, second)]
        assert kept[0] == kept[1]
    assert [batch.rewards.tolist() for batch in batches_of(one)] == [
        batch.rewards.tolist() for batch in batches_of(other)
    ]
    assert not have_same_weights(
        one, trainer_of(ending, vowels(), tmp_path / "fresh", peft_config=options.get("peft_config"))
    )


class Counts(GRPOCallback):
    """Keeps its state in an object of its own, and gives it to checkpoints."""

    def on_setup(self, **kwargs):
        self.seen = SimpleNamespace(batches=0)

    def on_rewards(self, batch, **kwargs):
        self.seen.batches += 1

    def state_dict(self):
        return {"batches": self.seen.batches}

    def load_state_dict(self, state_dict):
        self.seen.batches = state_dict["batches"]


def test_the_state_that_a_callback_checkpoints_is_put_back(ending, tmp_path):
    counts = Counts()
    trainer = trainer_of(ending, vowels(), tmp_path, reward_funcs=likes_vowels, callbacks=[counts])
    counts.seen.batches = 7
    assert check_run(trainer, num_prompts=4, show=False).learns
    assert counts.seen.batches == 7


def test_an_error_in_between_puts_everything_back(ending, tmp_path):
    calls = []

    def breaks(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) > 1:
            raise RuntimeError("judge is down")
        return likes_vowels(completions)

    trainer = trainer_of(ending, vowels(), tmp_path, reward_funcs=breaks)
    before = torch.get_rng_state()
    result = check_run(trainer, num_prompts=8, show=False)
    assert levels_of(result) == {"fails": "stop"}
    assert "judge is down" in result.findings[0].what
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer._num_rollouts == 0


@pytest.mark.parametrize(
    "options",
    [
        {"rollout": "multi_turn", "num_generations": 2},
        {"rollout": "multi_turn", "history": "independent", "num_generations": 2},
        {
            "rollout": "hierarchical",
            "num_plans": 2,
            "num_implementations": 2,
            "num_generations": 2,
            "per_device_train_batch_size": 6,
        },
    ],
    ids=["shared", "independent", "trees"],
)
def test_conversations_and_trees_are_sampled_as_the_run_does(ending, tmp_path, options):
    rows = [
        {"prompt": [{"role": "user", "content": f"say {a}"}], "reference": "aei"[i % 3] * (1 + i)}
        for i, a in enumerate("abcdef")
    ]
    if options["rollout"] == "multi_turn":
        rows = [{**row, "turns": [{"role": "user", "content": "more"}]} for row in rows]
    trainers = []
    for checked in (True, False):
        given = {"max_completion_length": 12, "reward_funcs": [likes_vowels, 0.01 * Length()], **options}
        trainer = trainer_of(ending, Dataset.from_list(rows), tmp_path / f"{checked}", **given)
        if checked:
            result = check_run(trainer, num_prompts=4, show=False)
            assert result.learns, result.findings
            assert [part.name for part in result.measured.components[:2]] == ["total", "likes_vowels"]
            assert len(result.measured.groups) >= 4
            assert result.measured.paid
        trainer.train()
        trainers.append(trainer)
    assert have_same_weights(*trainers)


RECIPES = {
    "helpful": ["--num_generations", "4"],
    "harmless": ["--num_generations", "4", "--cold_start_steps", "0"],  # a random model never declines
    "multi_turn": ["--num_generations", "2"],
    "hierarchical": ["--num_generations", "2", "--per_device_train_batch_size", "12"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_found_in_the_shipped_recipes(name, ending, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    module = importlib.import_module(name)
    results = []
    monkeypatch.setattr(
        module,
        "train_and_compare",
        lambda *run, **beside: results.append(check_run(*run, num_prompts=6, num_answers=4, show=False)),
    )
    (arguments,) = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == name and value.__name__.endswith("Arguments")
    ]
    flags = ["--model_name_or_path", ending, "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    flags += ["--disable_tqdm", "true", "--max_completion_length", "24"]
    flags += ["--per_device_train_batch_size", "8", "--max_test_prompts", "4", *RECIPES[name]]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    module.main(*parse_arguments(arguments, module.__file__))
    (result,) = results
    # Without its cold start, the policy never declines: the check names what the cold start is there for.
    expected = {"always_earned", "never_earned"} if name == "harmless" else set()
    # And a stand-in of a few letters always ends its answers.
    found = {finding.name for finding in result.findings if not finding.what.startswith("finished pays 1")}
    assert found & {*result.names} == expected, result.findings
    assert result.learns
    assert len(result.measured.components) > 2


# What is wrong is named


def contains(letter):
    def reward(completions, **kwargs):
        return [float(letter in text_of(completion)) for completion in completions]

    return reward


def constant(value):
    return lambda completions, **kwargs: [value] * len(completions)


def exact(completions, reference, **kwargs):
    return [float(text_of(one) == other) for one, other in zip(completions, reference, strict=True)]


def exact_score(completions, score, **kwargs):
    return [float(text_of(one) == str(other)) for one, other in zip(completions, score, strict=True)]


def parrot(prompts, completions, **kwargs):
    vowel = likes_vowels(completions)
    return [2.0 * (prompt == text) + value for prompt, text, value in zip(prompts, completions, vowel, strict=True)]


def none_for_empty(completions, reference, **kwargs):
    values = likes_vowels(completions)
    return [value if one else None for value, one in zip(values, reference, strict=True)]


def emptied(share):
    rows = vowels()
    column = [None if i < share * len(rows) else value for i, value in enumerate(rows["reference"])]
    return rows.remove_columns("reference").add_column("reference", column)


SICK = {
    "the budget cuts nearly all answers, and what is asked for is never said": (
        "cut",
        {"reward": exact, "max_completion_length": 2, "model_strength": 0.05},
    ),
    "cut answers are taken out of the loss": (
        "cut",
        {"max_completion_length": 2, "model_strength": 0.05, "mask_truncated_completions": True},
    ),
    "never earned": ("never_earned", {"reward": contains("no such text")}),
    "too hard": ("never_earned", {"reward": exact}),
    "always earned": ("always_earned", {"reward": constant(1.0)}),
    "a component is constant": ("always_earned", {"reward": [likes_vowels, constant(0.5)], "level": "look"}),
    "no reward applies": ("no_reward", {"reward": lambda completions, **kwargs: [None] * len(completions)}),
    "the reference column is empty": ("empty_reference", {"reward": none_for_empty, "dataset": emptied(1.0)}),
    "half of the references are empty": ("empty_reference", {"dataset": emptied(0.5), "level": "look"}),
    "the reference column is missing": (
        "fails",
        {"reward": exact, "dataset": vowels().remove_columns("reference")},
    ),
    "the reward reads another column": ("never_earned", {"reward": exact_score}),
    "repeating the question is paid more than answers": ("pays_unwanted", {"reward": parrot}),
    "all answers are equal": ("equal_answers", {"top_k": 1}),
    "one prompt is repeated": (
        "one_prompt",
        {"dataset": Dataset.from_dict({"prompt": ["say a"] * 9, "reference": ["a"] * 9}), "level": "look"},
    ),
    "the learning rate is zero": ("no_learning_rate", {"learning_rate": 0.0}),
    "the learning rate is lost in rounding": ("nothing_moves", {"learning_rate": 1e-30}),
}


@pytest.mark.parametrize("case", SICK)
def test_sicknesses_are_named(ending, tmp_path, case):
    name, given = SICK[case][0], dict(SICK[case][1])
    level, strength = given.pop("level", "stop"), given.pop("model_strength", None)
    model = ending if strength is None else save_ending_model(tmp_path / "model", strength=strength)
    result = check_of(model, tmp_path / "run", **given)
    assert levels_of(result).get(name) == level, result.findings
    assert result.learns == (level != "stop")


def test_a_frozen_adapter_is_named(ending, tmp_path):
    for what, name in ((("lora_A", "lora_B"), "nothing_trained"), (("lora_B",), "no_gradient")):
        trainer = trainer_of(ending, vowels(), tmp_path, reward_funcs=likes_vowels, peft_config=LORA)
        for parameter, value in trainer.model.named_parameters():
            if any(part in parameter for part in what):
                value.requires_grad_(False)
        result = check_run(trainer, num_prompts=4, show=False)
        assert {name, "frozen_adapter"} <= levels_of(result).keys(), result.findings
        assert not result.learns


def test_an_adapter_that_is_not_in_the_loss_is_named(ending, tmp_path):
    trainer = trainer_of(ending, vowels(), tmp_path, reward_funcs=likes_vowels, peft_config=LORA)
    trainer.model.base_model.disable_adapter_layers()
    for parameter, value in trainer.model.named_parameters():
        value.requires_grad_("lora" in parameter)
    result = check_run(trainer, num_prompts=4, show=False)
    assert {"no_gradient", "adapter_at_zero"} <= levels_of(result).keys(), result.findings


def test_a_template_that_never_ends_a_turn_is_named(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "\n")
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = vowels().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    result = check_of(str(tmp_path / "model"), tmp_path / "run", dataset=rows, num_prompts=4)
    found = {finding.name: finding for finding in result.findings}
    assert "'nothing'" in found["no_end_of_turn"].what
    assert not result.learns


def test_a_group_of_one_is_named():
    setting = Setting(budget=4, group_size=1, learning_rate=1e-3)
    assert [finding.name for finding in findings_of(Measured(setting))] == ["group_of_one"]


def test_a_gradient_that_is_not_finite_is_named():
    setting = Setting(budget=4, group_size=2, learning_rate=1e-3)
    update = Update([Reach("head", NAN, 1, 1, False)], 1e-3, False, 0.1)
    assert [finding.name for finding in findings_of(Measured(setting, update=update))] == ["not_finite"]


def test_flat_groups_are_a_reason_for_options(check):
    result = check(reward=contains("a"), num_prompts=24, num_generations=2)
    hints = {finding.name: finding for finding in result.findings if finding.level == "hint"}
    assert "dynamic_sampling_rounds=1" in hints["flat_groups"].remedy
    assert not {"flat_groups"} & set(result.names)


def test_a_reward_that_fails_on_an_empty_answer_is_named(check):
    def guarded(completions, **kwargs):
        if all(text == "" for text in completions):
            raise IndexError("string index out of range")
        return likes_vowels(completions)

    result = check(reward=guarded)
    assert levels_of(result).get("reward_fails") == "look"
    assert "nothing at all" in next(f.what for f in result.findings if f.name == "reward_fails")


# The rest


def test_parts_of_a_composite_reward_are_told_apart(check):
    reward = 1.0 * as_reward(likes_vowels) - 0.001 * Length()
    measured = check(reward=reward).measured
    assert [part.name for part in measured.components] == ["total", "length", "likes_vowels"]
    (empty,) = [paid for paid in measured.paid if paid.kind == "empty"]
    assert (empty.values["likes_vowels"], empty.values["length"]) == (0.0, 1.0)
    assert empty.mean == pytest.approx(-0.001)


def test_a_stream_is_checked(ending, tmp_path):
    stream = vowels().to_iterable_dataset()
    result = check_of(ending, tmp_path, dataset=stream, num_prompts=4)
    assert result.learns
    assert result.measured.plan.steps_per_epoch is None


def test_prompts_and_a_reward_are_taken_as_recipes_take_them(ending, tmp_path, capsys):
    data = vowels().train_test_split(test_size=6, seed=0)
    args = args_of(tmp_path, max_completion_length=24)
    result = check_run(dict(data), likes_vowels, args, ModelConfig(model_name_or_path=ending), num_prompts=4)
    assert result.learns, result.findings
    assert "Informative groups" in capsys.readouterr().out


@pytest.fixture
def flags_of(ending, tmp_path, monkeypatch):
    """Flags of the command, with the YAML file of a tiny run."""
    vowels().to_json(tmp_path / "data" / "train.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(*flags, **options):
        run = {
            "model_name_or_path": ending,
            "dataset_name": str(tmp_path / "data"),
            "output_dir": str(tmp_path / "run"),
        }
        options = {**config_kwargs(tmp_path / "run", max_completion_length=24), **run, **options}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
        return ["--config", str(tmp_path / "run.yaml"), "--check_prompts", "6", *flags]

    return write


def test_the_command_takes_the_yaml_of_a_run(flags_of, tmp_path, capsys):
    flags = flags_of(reward_funcs=["checked_run.likes_vowels", "0.001 * Length()"])
    assert command.run(flags) == 0
    printed = capsys.readouterr().out
    assert "Nothing is wrong with this run" in printed
    assert f"Page: {tmp_path / 'run' / 'check.html'}" in printed.replace("\n", "")
    assert command.run([*flags, "--learning_rate", "0.0", "--check_output", str(tmp_path / "other.html")]) == 1
    assert "no_learning_rate" in capsys.readouterr().out
    assert (tmp_path / "other.html").exists()
    assert not list((tmp_path / "run").glob("*.safetensors"))  # nothing was trained or saved


def test_the_command_answers_wrong_flags_in_one_line(flags_of, capsys):
    reward = {"reward_funcs": ["checked_run.likes_vowels"]}
    for flags, options, said in (
        (["--chek_prompts", "3"], reward, "did you mean --check_prompts?"),
        ([], {}, "no reward is set"),
        (["--check_answers", "1"], reward, "pass at least 2"),
        ([], {**reward, "num_generations": 1}, "requires at least 2 generations"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            command.run(flags_of(*flags, **options))
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("trl-grpo-ext check: error: ")
        assert said in line


def test_the_console_launches_the_check(flags_of, tmp_path):
    flags = flags_of("--learning_rate", "0", reward_funcs=["checked_run.likes_vowels"])
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH + os.pathsep + str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-m", "trl_grpo_ext", "check", *flags, "--num_processes", "1", "--cpu"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    assert "no_learning_rate" in result.stdout


def test_wrong_arguments_say_what_to_do(ending, tmp_path):
    for given, said in (
        ({"num_prompts": 0}, "pass at least 1"),
        ({"num_answers": 1}, "pass at least 2"),
        ({"reference": "gold"}, "reference_column='gold' is no column: use one of 'prompt'"),
    ):
        with pytest.raises(ValueError, match=said):
            check_of(ending, tmp_path, **given)
    with pytest.raises(ValueError, match="training_args and model_args"):
        check_run({"train": vowels()}, likes_vowels)


def test_text_of_others_is_shown_and_not_obeyed(ending, tmp_path, capsys):
    rows = Dataset.from_dict({"prompt": ["</pre><script>x</script>[bold]\x1b[2J"] * 4, "reference": ["a"] * 4})
    result = check_of(ending, tmp_path, dataset=rows, num_prompts=2)
    page = render(result.measured, result.findings)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    print_page(result.measured, result.findings)
    assert "\x1b[2J" not in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_its_window(check, tmp_path, width):
    reward = [
        likes_vowels,
        as_reward(constant(1.0)).named("a_reward_whose_name_is_longer_than_a_narrow_window_is_wide"),
    ]
    result = check(reward=reward, output=tmp_path, num_prompts=2)
    with Page(width=width) as page:
        page.open(result.page)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("getComputedStyle(document.querySelector('.card')).borderLeftWidth") == "4px"
        assert page.named("Log.entryAdded") == []


def test_references_are_found_in_many_forms():
    assert reference_column([{"prompt": "", "answer": "", "reference": ""}]) == "reference"
    assert reference_column([{"prompt": ""}]) is None
    assert [as_text(value) for value in ("a", 3, None, " ", ["x", "y"], [{"content": "z"}], [])] == [
        *("a", "3", None, None, "x", "z", None)
    ]
    assert duration(0.0214) == "0.021 s"
    assert math.isnan(NAN)


def test_two_ranks_agree(ending, tmp_path):
    first, second = launch(ending, tmp_path / "out", two_ranks, num_prompts=6)
    assert first.pop("page") is None
    assert second.pop("page") is None
    assert first == second
    assert len(first["answers"]) >= 24
    assert not [finding for finding in first["findings"] if finding[0] == "stop"]


def test_two_ranks_agree_where_a_reward_fails_on_one(ending, tmp_path):
    first, second = launch(ending, tmp_path / "out", two_ranks_one_fails)
    assert first == second
    assert "process 1 is down" in first[0][2]
    assert first[0][1] == "fails"


def two_ranks_one_fails(model_path, out):
    import os

    def reward(completions, **kwargs):
        if os.environ["RANK"] == "1":
            raise RuntimeError("process 1 is down")
        return likes_vowels(completions)

    result = check_of(model_path, out, reward=reward, per_device_train_batch_size=4, num_prompts=4)
    return [(finding.level, finding.name, finding.what) for finding in result.findings]
