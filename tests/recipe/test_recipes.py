"""The recipes as a user starts them, on the real SmolLM2, only shorter; and the pieces that they print with."""

import asyncio
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from kit import config_kwargs
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, HeldOutCallback
from trl_grpo_ext.host.sources import resolve_model
from trl_grpo_ext.observe.held_out import HeldOut, evaluate_held_out
from trl_grpo_ext.observe.report import read_run
from trl_grpo_ext.recipe import cold_start
from trl_grpo_ext.recipe.datasets import load_prompts
from trl_grpo_ext.recipe.evaluation import print_comparison
from trl_grpo_ext.recipe.script import parse_arguments
from trl_grpo_ext.rewards import Length, Relevance, as_reward, linear

ROOT = Path(__file__).parents[2]


def launch_helpful(output_dir, *flags):
    """What `accelerate launch recipes/helpful.py` prints, and the record of the run."""
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", str(ROOT / "recipes" / "helpful.py")]
    # The model comes from the package index or the cache, never from a hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, *flags, "--output_dir", str(output_dir)],
        env=environment, capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    record = (output_dir / "monitor" / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in record]


@pytest.mark.training
def test_helpful_runs_as_the_readme_says(tmp_path):
    """Only shorter; all of it is the next test, which `make flagship` runs by itself."""
    result, record = launch_helpful(tmp_path, "--max_steps", "5", "--max_test_prompts", "8")
    for expected in (
        "Model:",
        "Prompts: 192 to train on, 8 held out",
        "helpfulness",
        "harmlessness",
        "length",
        "finished",
        "total",
        "repeat the question",
        "alarms open at the end: none",
        "Without them: --compare_with_stock true",
    ):
        assert expected in result.stdout
    assert "step 5/5 · reward" in result.stderr + result.stdout
    assert f"report of the run to {tmp_path / 'report.html'}" in result.stdout
    assert (tmp_path / "report.html").stat().st_size > 30_000
    assert len([entry for entry in record if "eval_reward" in entry and "eval_rewards/helpfulness/mean" in entry]) == 2
    assert (tmp_path / "report_figures" / "reward.png").exists()
    # Five steps are enough for `truncated` and `dead_reward`, not for those that compare with the start.
    assert read_run(tmp_path).open_alarms == []
    # The adapter names its base on the hub, so that it loads on a machine that has one.
    config = PeftConfig.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(resolve_model(config.base_model_name_or_path).path)
    model = PeftModel.from_pretrained(base, tmp_path)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.training
@pytest.mark.flagship
def test_what_the_reward_names_moves_and_no_alarm_is_open(tmp_path):
    result, record = launch_helpful(tmp_path)
    assert "Prompts: 192 to train on, 48 held out" in result.stdout
    assert "alarms open at the end: none" in result.stdout
    assert read_run(tmp_path).open_alarms == []
    assert "step 53/54 · reward" in result.stderr + result.stdout  # of two updates on a batch, the first logs it
    # At least 80 % of the sampled answers end by themselves.
    cut = [entry["completions/clipped_ratio"] for entry in record if "completions/clipped_ratio" in entry]
    assert mean(cut[-10:]) <= 0.2
    # What holds on every seed and every machine; parts gain more on some than on others (docs/measured/recipes.md).
    before, after = (
        {
            "total": entry["eval_reward"],
            "harmlessness": entry["eval_rewards/harmlessness/mean"],
            "finished": entry["eval_rewards/finished/mean"],
            "length": entry["eval_completions/mean_length"],
        }
        for entry in record
        if "eval_reward" in entry
    )
    assert after["finished"] >= 0.8 > before["finished"]
    assert after["harmlessness"] > before["harmlessness"]
    assert after["length"] < before["length"]
    repeated = re.search(r"│ repeat the question +│.*│ +(-?[\d.]+) │\n", result.stdout)
    assert repeated is not None
    assert after["total"] > max(before["total"], float(repeated[1])) + 0.1


CPU = ["--bf16", "false", "--use_cpu", "true"]


def recipe(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module(name)


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(
    "name", ["helpful", "harmless", "arithmetic", "reasoning", "multi_turn", "hierarchical", "two_tasks"]
)
def test_configs_parse(name, monkeypatch):
    module = recipe(name, monkeypatch)
    (arguments,) = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == name and value.__name__.endswith("Arguments")
    ]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *CPU, "--seed", "3"])
    script_args, args, model_args = parse_arguments(arguments, module.__file__)
    assert isinstance(script_args, arguments)
    assert (args.output_dir, args.seed, model_args.use_peft) == (f"runs/{name}", 3, True)


PRESETS = {  # num_generations, completions of a step on eight GPUs, max_steps
    "small": (4, 64, 1000),
    "large": (2, 128, 1000),
    "plenty": (8, 128, 1000),
    "deepseek_v2": (4, 256, 10_000),
    "vllm_colocate": (4, 64, 1000),
    "vllm_server": (4, 64, 1000),
}


def test_presets_say_what_the_method_says(monkeypatch):
    arguments = recipe("helpful", monkeypatch).HelpfulArguments
    found = sorted((ROOT / "recipes" / "configs" / "presets").glob("*.yaml"))
    found = [path for path in found if not path.stem.startswith("efficient")]  # tests/trainer/test_efficient.py
    assert [path.stem for path in found] == sorted(PRESETS)
    for path in found:
        parser = TrlParser((arguments, AdaptiveGRPOConfig, ModelConfig))
        _, args, model_args = parser.parse_args_and_config(["--config", str(path), *CPU])
        size = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert (args.num_generations, size, args.max_steps) == PRESETS[path.stem]
        assert (args.beta, args.epsilon, args.learning_rate, args.scale_rewards) == (0.05, 0.2, 1e-6, "batch")
        assert (args.use_vllm, args.use_vllm and args.vllm_mode) == {
            "vllm_server": (True, "server"),
            "vllm_colocate": (True, "colocate"),
        }.get(path.stem, (False, False))
        assert model_args.model_name_or_path
        launcher = re.findall(r"accelerate/(\w+)\.yaml", path.read_text())
        assert launcher
        assert all((ROOT / "recipes/configs/accelerate" / f"{name}.yaml").exists() for name in launcher)


def test_accelerate_reads_its_configurations():
    folder = ROOT / "recipes" / "configs" / "accelerate"
    found = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert {name: (config.distributed_type.value, config.num_processes) for name, config in found.items()} == {
        "single": ("NO", 1),
        "ddp": ("MULTI_GPU", 8),
        "fsdp2": ("FSDP", 8),
        "deepspeed_zero2": ("DEEPSPEED", 8),
        "deepspeed_zero3": ("DEEPSPEED", 8),
    }
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [found[f"deepspeed_zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]


TINY = [*CPU, "--max_steps", "2", "--max_completion_length", "4", "--per_device_train_batch_size", "8"]
TINY += ["--num_generations", "4", "--disable_tqdm", "true"]


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [
        ("arithmetic", [], ["correct", "finished", "length"]),
        (
            "harmless",
            ["--max_test_prompts", "6", "--cold_start_steps", "0"],
            ["relevance", "declined", "answered", "harmlessness", "length"],
        ),
        ("reasoning", ["--train_size", "4", "--test_size", "1"], ["score", "right", "finished"]),
        ("two_tasks", [], ["correct_of_math", "length_of_math", "relevance_of_chat", "length_of_chat"]),
        (
            "hierarchical",
            ["--max_test_prompts", "3", "--per_device_train_batch_size", "12", "--num_generations", "2"],
            ["relevance", "harmlessness", "length", "length_of_plan"],
        ),
        (
            "multi_turn",
            ["--max_test_prompts", "3", "--per_device_train_batch_size", "12"],
            ["relevance", "harmlessness_at_end", "length"],
        ),
    ],
)
def test_recipes_run(name, flags, parts, model_path, tmp_path, monkeypatch, capsys):
    module = recipe(name, monkeypatch)
    flags = [*TINY, "--model_name_or_path", model_path, "--output_dir", str(tmp_path), *flags]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    arguments = getattr(module, f"{name.title().replace('_', '')}Arguments")
    module.main(*parse_arguments(arguments, module.__file__))
    printed = capsys.readouterr().out
    assert all(re.search(rf"│ {part} +│ +-?\d", printed) for part in [*parts, "total"])
    assert f"report of the run to {tmp_path / 'report.html'}" in printed
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_flagship_has_as_many_requests_as_questions(monkeypatch, tmp_path):
    helpful = recipe("helpful", monkeypatch)
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, task_column="kind"))
    splits = helpful.load(helpful.HelpfulArguments(system_prompt="Be brief."), (), args)
    assert {split: Counter(rows["kind"]) for split, rows in splits.items()} == {
        "train": {"question": 96, "request": 96},
        "test": {"question": 24, "request": 24},
    }
    assert all(row["prompt"][0] == {"role": "system", "content": "Be brief."} for row in splits["train"])
    assert all(row["reference"] for split in splits.values() for row in split)
    assert not {str(p) for p in splits["test"]["prompt"]} & {str(p) for p in splits["train"]["prompt"]}
    assert args.task_column == "kind"
    few = helpful.load(helpful.HelpfulArguments(max_test_prompts=6), (), args)
    assert Counter(few["test"]["kind"]) == {"question": 3, "request": 3}


@pytest.mark.parametrize(("column", "left"), [("kind", None), ("difficulty", "difficulty")])
def test_the_flagship_takes_prompts_of_one_kind(column, left, monkeypatch, tmp_path):
    helpful = recipe("helpful", monkeypatch)
    tasks = {"task_column": column, "task_advantages": True, "baseline": "batch", "scale_rewards": "batch"}
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, **tasks))
    prompts = helpful.load(helpful.HelpfulArguments(dataset_name="helpful"), ("reference",), args)
    assert len(prompts["train"]) == 192
    assert (args.task_column, args.task_advantages) == (left, left is not None)


def test_the_recipe_of_the_docs_runs_in_an_empty_folder(model_path, tmp_path):
    page = (ROOT / "docs" / "write_a_recipe.md").read_text(encoding="utf-8")
    (tmp_path / "configs").mkdir()
    for file, code in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, flags=re.DOTALL):
        (tmp_path / file).write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, "make_questions.py"], cwd=tmp_path, check=True)
    command = re.search(r"accelerate launch (capitals\.py .*--max_steps 2.*)", page)[1].split()
    flags = ["--model_name_or_path", model_path, *CPU]
    result = subprocess.run(
        [sys.executable, *command, *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for expected in ("Prompts: 25 to train on, 25 held out", "right", "brief", "total"):
        assert expected in result.stdout
    # The page shows what is printed today, and both of its rewards move by more than their noise.
    shown = re.search(r"```text\n(Held-out prompts.*?)```", page, flags=re.DOTALL)[1]
    title, _, heading = (line.split() for line in shown.splitlines()[:3])
    printed = [line.split() for line in result.stdout.splitlines()]
    assert title in printed
    assert heading in printed
    for name in ("right", "brief"):
        (row,) = [line.strip("│").split("│") for line in shown.splitlines() if f"│ {name} " in line]
        assert [cell.strip() for cell in row][-1] == "yes"
    assert (tmp_path / "runs" / "capitals" / "report.html").exists()


# Rewards and data of the recipes


def test_sums_are_distinct_and_right(monkeypatch):
    arithmetic = recipe("arithmetic", monkeypatch)
    sums = arithmetic.make_sums()
    assert {split: rows.to_list() for split, rows in arithmetic.make_sums().items()} == {
        split: rows.to_list() for split, rows in sums.items()
    }
    rows = [row for split in sums.values() for row in split]
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(texts)) == len(texts) == 162
    for text, row in zip(texts, rows, strict=True):
        assert sum(map(int, re.findall(r"\d+", text))) == int(row["reference"])
    for split in sums.values():
        assert set(split["difficulty"]) == {"easy", "medium", "hard"}


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("12", "12", 1.0),
        ("7 + 5 = 12", "12", 1.0),
        ("The answer is 12.", "12", 1.0),
        ("$\\boxed{12}$", "12", 1.0),
        ("12.0", "12", 1.0),
        ("13", "12", 0.0),
        ("7 + 5", "12", 0.0),  # `math-verify` alone says that this is right
        ("10 + 2", "12", 0.0),
        ("twelve", "12", 0.0),
        ("", "12", 0.0),
        ("1/2", "1/2", 1.0),
        ("1/2", "0.5", 0.0),  # a number has to be worked out
        ("x + 1", "1 + x", 1.0),
        ("12", "no number", None),
    ],
)
def test_correct(text, reference, expected, monkeypatch):
    assert recipe("arithmetic", monkeypatch).correct(answers(text), [reference]) == [expected]


def test_declining(monkeypatch):
    harmless = recipe("harmless", monkeypatch)
    for text in (
        "I'm sorry, but I can't assist with that.",
        "I cannot help you hurt anyone.",
        "I\u2019m unable to provide this.",
        "Sorry. I won't write that.",
        "I am not able to do this.",
    ):
        assert harmless.declines(text)
    for text in (
        "You can't miss it.",
        "Use a wide aperture.",
        "I can help with that.",
        "",
        "x" * 200 + " I can't help.",
    ):
        assert not harmless.declines(text)
    for row in (row for split in load_prompts("harmless").values() for row in split):
        assert harmless.declines(row["reference"]) == row["harmful"]


@pytest.mark.parametrize(("peft", "rate"), [("true", 1e-3), ("false", 2e-5)])
def test_the_cold_start_has_the_learning_rate_of_what_it_trains(peft, rate, model_path, tmp_path, monkeypatch):
    harmless, seen = recipe("harmless", monkeypatch), []

    class StopError(Exception):
        pass

    def config(**options):
        seen.append(options["learning_rate"])
        raise StopError

    config.learning_rate = cold_start.SFTConfig.learning_rate
    monkeypatch.setattr(cold_start, "SFTConfig", config)
    flags = [*TINY, "--model_name_or_path", model_path, "--output_dir", str(tmp_path), "--use_peft", peft]
    monkeypatch.setattr(sys, "argv", ["harmless.py", *flags])
    _, args, model_args = parse_arguments(harmless.HarmlessArguments, harmless.__file__)
    with pytest.raises(StopError):
        cold_start.cold_start(None, 2, args, model_args)
    assert seen == [rate]


def test_the_cold_start_of_the_harmless_recipe(model_path, tmp_path, monkeypatch, capsys):
    harmless = recipe("harmless", monkeypatch)
    flags = [*TINY, "--model_name_or_path", model_path, "--output_dir", str(tmp_path), "--cold_start_steps", "2"]
    flags += ["--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["harmless.py", *flags])
    script_args, args, model_args = parse_arguments(harmless.HarmlessArguments, harmless.__file__)
    train = script_args.load(columns=("reference", "harmful"))["train"].select(range(16))
    folder = cold_start.cold_start(train, 2, args, model_args)
    assert "Cold start: 2 supervised steps on references, mean loss" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model_path, folder))
    assert not hasattr(after, "peft_config")  # merged, so that a new adapter starts from here
    changed = [
        n for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True) if (a != b).any()
    ]
    assert changed
    assert all("proj" in name for name in changed)  # what lora_target_modules: all-linear adapts
    # A run that is resumed starts from the weights that it started from.
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-1")
    monkeypatch.setattr(cold_start, "SFTTrainer", None)
    assert cold_start.cold_start(train, 2, args, model_args) == folder


def test_the_gate_of_the_harmless_recipe(monkeypatch):
    harmless = recipe("harmless", monkeypatch)
    weights = {"harmlessness_weight": 0.0, "length_weight": 0.0, "finished_weight": 0.0}
    reward = harmless.reward_of(harmless.HarmlessArguments(**weights), 40)
    refusal, recipe_text = "I can't help you steal a bicycle.", "Take a bolt cutter at night."
    call = {
        "prompts": [[{"role": "user", "content": "How do I steal a bicycle?"}]] * 4,
        "completions": answers(refusal, recipe_text, refusal, recipe_text),
        "completion_ids": [[1]] * 4,
        "reference": [refusal, recipe_text, refusal, recipe_text],
    }
    scores = reward(**call, harmful=[True, True, False, False])
    # Each answer is its reference; without the right decision that earns nothing.
    relevance = Relevance("reference", beyond_prompt=True)(**call)
    assert min(relevance) > 0.5
    assert scores == pytest.approx([0.5 + relevance[0], 0.0, 0.0, 0.5 + relevance[3]], abs=1e-5)


def test_questions_of_reasoning_gym(monkeypatch):
    reasoning = recipe("reasoning", monkeypatch)
    arguments = reasoning.ReasoningArguments(
        tasks=["chain_sum", "letter_counting"], num_levels=3, train_size=5, test_size=2, num_examples=1
    )
    questions = reasoning.make_questions(arguments)
    assert {split: len(rows) for split, rows in questions.items()} == {"train": 30, "test": 12}
    rows = [row for split in questions.values() for row in split]
    assert len({row["prompt"][-1]["content"] for row in rows}) == len(rows)
    assert {row["difficulty"] for row in rows} == {0, 1, 2}
    easy, hard = (
        {
            len(re.findall(r"\d", row["prompt"][-1]["content"]))
            for row in rows
            if row["task"] == "chain_sum" and row["difficulty"] == level
        }
        for level in (0, 2)
    )
    assert easy == {2}  # two numbers of one digit
    assert max(hard) > 4
    # One solved question of the task, which is none of the others.
    for task, shown in {"chain_sum": r"\d [+-] \d = -?\d+", "letter_counting": r"\d+"}.items():
        ((question, answer),) = {tuple(m["content"] for m in row["prompt"][:-1]) for row in rows if row["task"] == task}
        assert question not in {row["prompt"][-1]["content"] for row in rows}
        assert re.fullmatch(shown, answer)
    columns = {name: [row[name] for row in rows] for name in ("task", "entry", "reference")}
    right = answers(*(row["reference"] for row in rows))
    tagged = answers(*(f"So: <answer> {row['reference']} </answer>." for row in rows))
    worked = answers(*(f"1 + 1 = {row['reference']}" for row in rows))
    said = answers(*(f"2 more than that is {row['reference']}." for row in rows))
    for solutions in (right, tagged, worked, said):
        assert reasoning.score(solutions, **columns) == [1.0] * len(rows)
    assert reasoning.solved_fully(right, **columns) == [1.0] * len(rows)
    assert max(reasoning.score(answers(*[""] * len(rows)), **columns)) < 1
    assert questions["train"].to_list() == reasoning.make_questions(arguments)["train"].to_list()


def test_an_answer_that_a_verifier_cannot_read_is_wrong(monkeypatch):
    reasoning = recipe("reasoning", monkeypatch)
    arguments = reasoning.ReasoningArguments(tasks=["prime_factorization"], num_levels=1, train_size=1, test_size=1)
    row = reasoning.make_questions(arguments)["test"][0]
    with pytest.raises(ValueError, match="invalid literal"):  # so does reasoning-gym alone
        reasoning.verifier(row["task"])("two", json.loads(row["entry"]))
    columns = {name: [row[name]] * 2 for name in ("task", "entry", "reference")}
    assert reasoning.score(answers("two", row["reference"]), **columns) == [0.0, 1.0]


def test_options_of_the_reasoning_recipe_are_checked(monkeypatch):
    reasoning = recipe("reasoning", monkeypatch)
    with pytest.raises(ValueError, match=r"\['chess'\] are no tasks with levels; reasoning-gym has \["):
        reasoning.ReasoningArguments(tasks=["chess"])
    with pytest.raises(ValueError, match="num_levels=0 leaves nothing"):
        reasoning.ReasoningArguments(num_levels=0)
    with pytest.raises(ValueError, match="num_examples=-1 must be at least 0"):
        reasoning.ReasoningArguments(num_examples=-1)


def test_held_out_answers_are_greedy_and_leave_training_alone(model_path, conversational, tmp_path, capsys):
    def first_letter(completions, **kwargs):
        return [None if i == 0 else float(len(c[0]["content"])) for i, c in enumerate(completions)]

    reward = as_reward(first_letter) - 0.5 * Length()
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path)),
        train_dataset=conversational,
    )
    trainer.model.train()
    once = evaluate_held_out(trainer, conversational, reward, batch_size=7)
    again = evaluate_held_out(trainer, conversational, reward, batch_size=26)
    assert trainer.model.training
    assert once.questions == [f"say {chr(ord('a') + i)}" for i in range(26)]
    assert once.answers == again.answers
    assert once.scores["first_letter"][0] is None
    for letters, length, total in list(
        zip(*(once.scores[k] for k in ("first_letter", "length", "total")), strict=True)
    )[1:]:
        assert total == pytest.approx(letters - 0.5 * length)
    print_comparison(once, again)
    printed = capsys.readouterr().out
    assert "+0.000" in printed
    assert "say a" in printed


def test_held_out_answers_are_those_of_the_policy_in_training(model_path, conversational, tmp_path):
    def anything(completions, **kwargs):
        return [1.0] * len(completions)

    def evaluated(template=None, **options):
        trainer = AdaptiveGRPOTrainer(
            model=model_path,
            reward_funcs=anything,
            args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, **options)),
            train_dataset=conversational,
        )
        tokenizer = trainer.processing_class
        tokenizer.chat_template = template or tokenizer.chat_template
        seen, generate = [], trainer.model.generate
        trainer.model.generate = lambda **kwargs: seen.append(kwargs) or generate(**kwargs)
        held_out = evaluate_held_out(trainer, conversational.select(range(3)), as_reward(anything))
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen[0]["input_ids"]], seen[0], held_out

    shout = "{% for message in messages %}{{ message.content }}{% if loud %}!{% endif %}{% endfor %}"
    quiet, kwargs, held_out = evaluated(shout)
    assert quiet == ["say a", "say b", "say c"]
    assert kwargs["generation_config"].repetition_penalty == 1.0
    loud, kwargs, other = evaluated(shout, chat_template_kwargs={"loud": True}, repetition_penalty=1.5)
    assert loud == ["say a!", "say b!", "say c!"]
    assert kwargs["generation_config"].repetition_penalty == 1.5
    assert held_out.answers != other.answers


def test_held_out_answers_do_not_depend_on_the_side_of_the_padding(model_path, conversational, tmp_path):
    def words(completions, **kwargs):
        return [1.0] * len(completions)

    longer = conversational.select(range(2)).map(
        lambda row, i: {"prompt": [{"role": "user", "content": "a" if i else "say a long a b c d"}]}, with_indices=True
    )
    answers = []
    for side in ("left", "right"):
        trainer = AdaptiveGRPOTrainer(
            model=model_path,
            reward_funcs=words,
            args=AdaptiveGRPOConfig(**config_kwargs(tmp_path)),
            train_dataset=conversational,
        )
        trainer.processing_class.padding_side = side
        answers.append(evaluate_held_out(trainer, longer, as_reward(words)).answers)
    assert answers[0] == answers[1]


def test_held_out_totals_before_and_after_are_of_one_reward_asked_once(model_path, conversational, tmp_path):
    calls, loops = [], []

    async def judge(completions, log_extra, **kwargs):
        log_extra(column="verdict", values=["fine"] * len(completions))
        calls.append(len(completions))
        loops.append(asyncio.get_running_loop())
        return [float(len(calls))] * len(completions)  # another answer each time

    reward, callback = as_reward(judge) - linear(0, 0.5) * Length(), HeldOutCallback()
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_steps=2)),
        train_dataset=conversational,
        eval_dataset=conversational.select(range(4)),
        callbacks=[callback],
    )
    trainer.train()
    assert calls[0] == calls[-1] == 4
    assert len(calls) == 2 + 2  # before, two steps, after
    assert len(set(map(id, loops))) == 1
    for result in (callback.before, callback.after):
        parts = zip(*(result.scores[name] for name in ("judge", "length", "total")), strict=True)
        assert all(total == pytest.approx(judged - 0.5 * length) for judged, length, total in parts)


def test_the_first_column_says_where_a_resumed_run_began(capsys):
    held_out = HeldOut(["q"], ["a"], {"total": [1.0]})
    print_comparison(held_out, held_out, first="at step 50")
    printed = capsys.readouterr().out
    assert printed.count("at step 50") == 2
    assert "before" not in printed


def test_references_are_numbers_too(monkeypatch):
    arithmetic = recipe("arithmetic", monkeypatch)
    assert arithmetic.correct(answers("12", "It is 12.", "13"), [12, 12, 12.0]) == [1.0, 1.0, 0.0]
    assert arithmetic.correct(answers("12"), [None]) == [None]


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        (
            "arithmetic",
            {"reference": "words alone"},
            r"reads none of the references of .*'words alone': write numbers or LaTeX",
        ),
        ("harmless", {"harmful": "yes"}, "'harmful' of .* holds 'yes': write true and false"),
        ("harmless", {"harmful": "false"}, "'harmful' of .* holds 'false': write true and false"),
        ("harmless", {"harmful": None}, "'harmful' of .* holds None: write true and false"),
    ],
)
def test_columns_that_a_reward_cannot_use_are_refused(name, columns, problem, monkeypatch, tmp_path):
    module = recipe(name, monkeypatch)
    rows = [{"prompt": f"q{i}", "reference": "r", **columns} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = getattr(module, f"{name.title()}Arguments")(dataset_name=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=problem):
        module.main(arguments, None, None)


def test_a_configuration_without_a_model_is_refused(monkeypatch, tmp_path, capsys):
    helpful = recipe("helpful", monkeypatch)
    (tmp_path / "mine.yaml").write_text("max_steps: 3\n")
    monkeypatch.setattr(sys, "argv", ["helpful.py", *CPU, "--config", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_arguments(helpful.HelpfulArguments, helpful.__file__)
    assert "model_name_or_path is not set: name a model in the YAML file or with" in capsys.readouterr().err


def test_markup_in_an_answer_is_printed_as_text(capsys):
    held_out = HeldOut(["[bold]q[/bold]"], ["[red]x[/nothing]"], {"total": [1.0]})
    print_comparison(held_out, held_out)
    assert "[red]x[/nothing]" in capsys.readouterr().out
