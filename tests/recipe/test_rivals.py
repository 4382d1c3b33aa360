"""What a run is held against: the question repeated, stock TRL, and a line about what the features did."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from kit import config_kwargs, trainer_of

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import HarmlessnessArguments, parse_arguments
from trl_grpo_ext.recipe.rivals import print_rivals, repeat_question, rows_of_step, stock_args, what_features_did
from trl_grpo_ext.rewards import Harmlessness, Length, RewardModel, as_reward
from trl_grpo_ext.trainer.features import callbacks_of

ROOT = Path(__file__).parents[2]
CPU = ["--bf16", "false", "--use_cpu", "true"]


def letters(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_the_question_repeated_is_scored_as_an_answer(model_path, conversational, tmp_path):
    reward = as_reward(letters) - 0.5 * Length()
    trainer = trainer_of(model_path, conversational, tmp_path, reward)
    parrot = repeat_question(trainer, conversational.select(range(3)), reward)
    assert parrot.answers == parrot.questions == ["say a", "say b", "say c"]
    assert parrot.scores["letters"] == [5.0] * 3
    ids = [len(trainer.processing_class(text)["input_ids"]) for text in parrot.answers]
    assert parrot.scores["length"] == [count + 1.0 for count in ids]  # and the end of the turn
    assert parrot.scores["total"] == [5.0 - 0.5 * (count + 1) for count in ids]


@pytest.mark.parametrize(
    ("options", "answers", "steps"),
    [
        ({}, 32.0, 4),
        ({"num_iterations": 4}, 32.0, 4),  # each batch once
        ({"gradient_accumulation_steps": 2}, 32.0, 2),
        ({"steps_per_generation": 2}, 32.0, 4),  # two steps on a batch of 16
    ],
)
def test_stock_trl_samples_as_many_answers(options, answers, steps, tmp_path):
    ours = AdaptiveGRPOConfig(
        **{
            **config_kwargs(tmp_path),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "group_size": "variance",
            "max_steps": 99,
            "scale_rewards": "batch",
            **options,
        }
    )
    theirs = stock_args(ours, [{"rollouts/total": 8.0}, {"rollouts/total": answers}], learning_rate=0.25)
    assert not callbacks_of(theirs)  # nothing of ours is on, which is bit for bit TRL
    assert (theirs.max_steps, theirs.num_iterations, theirs.scale_rewards) == (steps, 1, "group")
    assert (theirs.learning_rate, theirs.num_generations, theirs.seed) == (0.25, 4, ours.seed)
    assert theirs.max_steps * rows_of_step(theirs) == answers
    assert ours.max_steps == 99
    assert theirs.output_dir == str(tmp_path / "stock")


def test_the_line_says_what_the_logs_say(tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, curriculum="staged", difficulty_column="d", monitor=True))
    logs = [
        {"eval_reward": 0.5},
        {"rollouts/total": 8.0, "group_size/min": 4.0, "group_size/max": 4.0, "curriculum/position": 0.0},
        {
            "rollouts/total": 16.0,
            "group_size/min": 2.0,
            "group_size/max": 6.0,
            "curriculum/position": 1.0,
            "reward_clip/frac": 0.25,
            "reuse/skipped": 0.5,
            "baseline/explained_variance": 0.4,
            "rollouts/informative": 0.75,
            "alarms/truncated": 1.0,
        },
        {"reuse/skipped": 0.0},  # a further update on the same batch
    ]
    assert what_features_did(args, logs) == (
        "Features: 16 answers, groups of 2 to 6, the staged curriculum went from 0% to 100% of the difficulty, 25% of "
        "the rewards clipped, 75% of 2 updates made, the guess foresaw 40% of what prompts earn, 75% of the answers "
        "taught something, alarms open at the end: truncated"
    )
    assert what_features_did(args, logs[:1]) == "Features: no answer was sampled"


def test_the_line_about_guesses_and_tasks(tmp_path):
    tasks = {"task_column": "task", "task_advantages": True, "baseline": "batch", "scale_rewards": "batch"}
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, **tasks))
    logs = [
        {"rollouts/total": 8.0 * step, "baseline/explained_variance": value}
        for step, value in enumerate([0.3, -40.0, 0.2])
    ]
    assert "the guess foresaw 20% of what prompts earn, each task on a scale of its own" in what_features_did(
        args, logs
    )
    assert "the guess foresaw nothing of what prompts earn" in what_features_did(args, logs[1:2])


def test_the_line_about_a_tree_tells_plans_from_answers(tmp_path):
    tree = {"rollout": "hierarchical", "num_plans": 4, "num_implementations": 2}
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, **tree))
    told = what_features_did(args, [{"rollouts/total": 24.0}])
    assert told == "Features: 24 answers and plans, 4 plans a question with 2 answers each"


def test_a_row_for_each_policy(capsys):
    from trl_grpo_ext.recipe.evaluation import HeldOut

    print_rivals({"parrot": HeldOut(["q"], ["q"], {"total": [0.5], "length": [12.0]})})
    assert re.search(r"│ parrot +│ +0\.500 │ +12\.0 │", capsys.readouterr().out)


def test_who_judges_harmlessness():
    assert HarmlessnessArguments().harmlessness() == Harmlessness()
    assert HarmlessnessArguments("org/m").harmlessness() == RewardModel("org/m").named("harmlessness")
    assert HarmlessnessArguments("org/m", "toxic").harmlessness() == Harmlessness("org/m", "toxic")
    with pytest.raises(ValueError, match="harmful_label='toxic' is a label of no model: pass harmlessness_model"):
        HarmlessnessArguments(None, "toxic").harmlessness()


@pytest.mark.training
def test_the_flagship_beside_stock_trl(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    helpful = importlib.import_module("helpful")
    flags = [*CPU, "--max_steps", "2", "--max_completion_length", "4", "--per_device_train_batch_size", "8"]
    flags += ["--model_name_or_path", model_path, "--output_dir", str(tmp_path), "--max_test_prompts", "4"]
    flags += ["--disable_tqdm", "true", "--compare_with_stock", "true", "--reward_clip_quantiles", "0.1", "0.9"]
    monkeypatch.setattr(sys, "argv", ["helpful.py", *flags])
    helpful.main(*parse_arguments(helpful.HelpfulArguments, helpful.__file__))
    printed = capsys.readouterr().out
    for policy in ("repeat the question", "stock TRL", "before", "after"):
        assert re.search(rf"│ {policy} +│ +-?\d", printed)
    assert re.search(r"Features: \d+ answers, groups of ", printed)
    assert (tmp_path / "adapter_model.safetensors").exists()
