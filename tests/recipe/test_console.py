"""The console: its commands, `grpo` against `trl grpo`, launching, and the recipes that come with the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from kit import ROOT, make_letters
from safetensors.torch import load_file
from trl.scripts import grpo as stock

import trl_grpo_ext
from trl_grpo_ext import __main__ as console
from trl_grpo_ext.recipe import grpo, launch, shipped
from trl_grpo_ext.rewards import Length, Relevance, Reward
from trl_grpo_ext.rewards.parsing import import_reward

# In the shape of TRL's own examples, for a tiny model.
YAML = """
# Model and data
model_name_or_path: {model}
dataset_name: {data}
dataset_test_split: validation

# Training
learning_rate: 1.0e-2
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 6
max_steps: 3
logging_steps: 1
save_strategy: 'no'
eval_strategy: steps
eval_steps: 3
per_device_eval_batch_size: 8
seed: 7
bf16: false
use_cpu: true
gradient_checkpointing: false
report_to: none
disable_tqdm: true
"""


def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture
def yaml_of(model_path, tmp_path, monkeypatch):
    """Writes the YAML, with more options, and gives its path."""
    rows = make_letters()
    for split, part in (("train", range(18)), ("validation", range(18, 26))):
        rows.select(part).to_json(tmp_path / "data" / f"{split}.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name="grpo", **options):
        options = {"output_dir": str(tmp_path / name), "reward_funcs": ["test_console.vowels"], **options}
        text = YAML.format(model=model_path, data=tmp_path / "data") + yaml.safe_dump(options)
        (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{name}.yaml")

    return write


def losses(folder: Path) -> list[dict]:
    state = json.loads((folder / "trainer_state.json").read_text())
    slow = ("time", "runtime", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(slow)} for row in state["log_history"]]


# Commands


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]])
def test_each_command_has_a_line(flags, capsys):
    assert console.main(flags) == 0
    printed = capsys.readouterr().out
    for name, (target, text) in console.COMMANDS.items():
        assert f"  {name} " in printed
        assert text in printed
        module, function = target.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert max(map(len, printed.splitlines())) <= 120


def test_versions(capsys):
    assert console.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"trl-grpo-ext {trl_grpo_ext.__version__} (trl {trl.__version__}, transformers ")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("gpro", "did you mean grpo?"), ("recipes", "did you mean recipe?"), ("x", "use one of grpo, ")],
)
def test_a_wrong_command_is_one_line(name, remedy, capsys):
    assert console.main([name]) == 2
    assert capsys.readouterr().err.startswith(f"trl-grpo-ext: error: {name!r} is no command: {remedy}")


def test_a_command_gets_the_flags_after_it(monkeypatch):
    given = []
    monkeypatch.setitem(console.COMMANDS, "mine", ("test_console:take", "for this test"))
    monkeypatch.setattr(sys.modules[__name__], "take", lambda flags: given.append(flags) or 3, raising=False)
    assert console.main(["mine", "--a", "b"]) == 3
    assert given == [["--a", "b"]]


def test_the_version_needs_neither_torch_nor_trl():
    code = "import sys; from trl_grpo_ext.__main__ import main; main(['--version']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"torch", "trl", "transformers"} & set(result.stdout.splitlines()[1].split()) == set()


def test_a_wrong_flag_of_the_report_is_one_line(capsys):
    assert console.main(["report", "runs/a", "--outptu", "b"]) == 2
    assert capsys.readouterr().err == "trl-grpo-ext report: --outptu is not expected: did you mean --output?\n"
    assert console.main(["report", "runs/nothing/here"]) == 2
    assert capsys.readouterr().err.startswith("trl-grpo-ext report: ")


# `grpo` against `trl grpo`


def test_with_nothing_of_ours_training_is_that_of_trl(yaml_of, tmp_path):
    parser = stock.make_parser(prog="trl grpo")
    stock.main(*parser.parse_args_and_config(["--config", yaml_of("theirs")], fail_with_unknown_args=False))
    assert grpo.run(["--config", yaml_of("ours")]) == 0
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in theirs)
    assert trl.GRPOTrainer.__module__.startswith("trl.")  # the script's is ours no longer than it runs


def test_logs_are_those_of_trl(yaml_of, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    stock.main(*stock.make_parser().parse_args_and_config(["--config", yaml_of("theirs", **saved)]))
    grpo.run(["--config", yaml_of("ours", **saved)])
    theirs, ours = (losses(tmp_path / name / "checkpoint-3") for name in ("theirs", "ours"))
    assert any("eval_reward" in row for row in theirs)
    assert theirs == ours


def test_options_and_rewards_of_ours_in_one_file(yaml_of, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(grpo, "ScriptTrainer", spy(made))
    path = yaml_of(
        group_size="variance",
        reward_clip_quantiles=[0.1, 0.9],
        reward_funcs=[
            "test_console.vowels",
            "1.0 * Length() - 0.5 * test_console.vowels",
            "get_soft_overlong_punishment",
        ],
        reward_weights=[1.0, 2.0, 0.0],
        use_peft=True,
        lora_target_modules="all-linear",
        num_processes=1,
    )
    grpo.run(["--config", path, "--max_steps", "2"])
    (trainer,) = made
    assert trainer.args.group_size == "variance"
    assert trainer.state.global_step == 2
    assert trainer.reward_func_names == ["vowels", "length-vowels", "soft_overlong_punishment_reward"]
    assert isinstance(trainer.reward_funcs[1], Reward)
    assert not isinstance(trainer.reward_funcs[0], Reward)  # TRL's script has imported it
    assert (tmp_path / "grpo" / "adapter_model.safetensors").exists()


def spy(made):
    class Spy(grpo.ScriptTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    return Spy


def test_a_mixture_of_datasets_and_one_reward_as_text(yaml_of, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(grpo, "ScriptTrainer", spy(made))
    file = str(tmp_path / "data" / "train.jsonl")
    mixture = {"datasets": [{"path": "json", "data_files": file, "split": "train[:4]", "columns": ["prompt"]}] * 2}
    path = yaml_of(**mixture, dataset_name=None, test_split_size=0.25, eval_strategy="no", reward_funcs="Length()")
    text = Path(path).read_text().replace(f"dataset_name: {tmp_path / 'data'}\n", "")
    Path(path).write_text(text.replace("eval_strategy: steps\n", ""))
    grpo.run(["--config", path, "--max_steps=1"])
    (trainer,) = made
    assert (len(trainer.train_dataset), trainer.reward_funcs) == (6, [Length()])


def test_what_trl_does_around_the_trainer_stays(yaml_of, monkeypatch):
    """Quantisation, the eval split, a reward model's name and the upload go through TRL's script to our trainer."""
    seen = {}

    class Noted(grpo.ScriptTrainer):
        hub_model_id = "me/mine"

        def __init__(self, **kwargs):
            seen.update(kwargs)
            super().__init__(**{**kwargs, "quantization_config": None, "reward_funcs": kwargs["reward_funcs"][1:]})

        def init_hf_repo(self, token=None):
            pass

        def push_to_hub(self, *args, **kwargs):
            seen["pushed"] = kwargs

    monkeypatch.setattr(grpo, "ScriptTrainer", Noted)
    monkeypatch.setattr(trl, "get_quantization_config", lambda model_args: ("quantised", model_args.load_in_4bit))
    path = yaml_of(reward_model_name_or_path="org/scorer", load_in_4bit=True, push_to_hub=True, hub_model_id="me/mine")
    grpo.run(["--config", path, "--max_steps", "1", "--attn_implementation", "sdpa", "--reward_funcs", "Length()"])
    assert seen["reward_funcs"] == ["org/scorer", Length()]
    assert seen["quantization_config"] == ("quantised", True)
    assert (len(seen["train_dataset"]), len(seen["eval_dataset"])) == (18, 8)
    assert seen["args"].model_init_kwargs["attn_implementation"] == "sdpa"
    assert seen["pushed"]["dataset_name"].endswith("data")


def test_resuming_is_what_the_options_say(yaml_of, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    grpo.run(["--config", yaml_of("whole", **saving)])
    os.rename(tmp_path / "whole" / "checkpoint-2", tmp_path / "checkpoint-2")
    grpo.run(["--config", yaml_of("resumed", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("options", "flags", "problem"),
    [
        ({}, ["--lerning_rate", "1"], "--lerning_rate is no option: did you mean --learning_rate?"),
        ({}, ["--num_proceses", "2"], "--num_proceses is no option: did you mean --num_processes?"),
        ({"lerning_rate": 1}, [], "grpo.yaml sets 'lerning_rate', which is no option: did you mean learning_rate?"),
        ({}, ["--resume_from_checkpoint", "last"], "resume_from_checkpoint='last' is no folder"),
        ({}, ["--reward_funcs", "Lenght()"], "there is no reward 'Lenght': did you mean Length?"),
        (
            {},
            ["--reward_funcs", "acuracy_reward"],
            "there is no reward 'acuracy_reward': did you mean accuracy_reward?",
        ),
        ({"reward_funcs": None}, [], "no reward is set: name one with --reward_funcs"),
        ({"model_name_or_path": None}, [], "model_name_or_path is not set"),
        ({"dataset_name": None}, [], "no dataset is set: name one with --dataset_name"),
        ({"group_size": "single", "baseline": "leave_one_out"}, [], "group"),
    ],
)
@pytest.mark.parametrize("way", ["run", "main"])
def test_what_is_wrong_is_said_before_a_process_starts(way, options, flags, problem, yaml_of, capsys, monkeypatch):
    monkeypatch.setattr(launch, "launch_command", None)
    for variable in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    path = yaml_of()
    config = {**yaml.safe_load(Path(path).read_text()), **options}
    Path(path).write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(SystemExit, match=r"^2$"):
        getattr(grpo, way)(["--config", path, *flags])
    error = capsys.readouterr().err
    assert problem in error
    assert error.startswith("trl-grpo-ext grpo: error: ")
    assert error.count("\n") == 1


def test_rewards_of_the_docs_are_read():
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    table = page.split("### Rewards as text")[1].split("\n\n")[2].replace("my_rewards.polite", "kit.count_vowels")
    texts = [text for line in table.splitlines()[2:] for text in re.findall(r"`([^`]+)`", line.split("|")[2])]
    assert len(texts) == 7
    rewards = grpo.rewards_of(SimpleNamespace(reward_funcs=texts), import_reward)
    assert rewards[:3] == texts[:3] == ["accuracy_reward", "think_format_reward", "kit.count_vowels"]
    assert rewards[3:5] == [Length(), Relevance("reference")]
    assert [leaf.name for leaf in rewards[5].leaves()] == ["accuracy_reward", "length"]
    assert rewards[6].name == "repetition_penalty_reward"


def test_one_name_twice_needs_another_name():
    texts = ["kit.count_vowels + test_console.vowels", "vowels + 1"]
    for text, problem in zip(texts, ["", "there is no reward 'vowels'"], strict=True):
        arguments = SimpleNamespace(reward_funcs=[text])
        if problem:
            with pytest.raises(ValueError, match=problem):
                grpo.rewards_of(arguments, import_reward)
        else:
            assert len(grpo.rewards_of(arguments, import_reward)[0].leaves()) == 2
    same = SimpleNamespace(reward_funcs=["test_console.vowels + kit.count_vowels.named('vowels')"])
    with pytest.raises(ValueError, match=r"two different rewards are called 'vowels': .*\.named\("):
        grpo.rewards_of(same, import_reward)


def test_a_reward_that_cannot_be_imported_is_one_line(yaml_of, capsys):
    for name, problem in (("nowhere.f", "No module named 'nowhere'"), ("test_console.f", "has no attribute 'f'")):
        with pytest.raises(SystemExit, match=r"^2$"):
            grpo.run(["--config", yaml_of(reward_funcs=[name])])
        assert f"{name}: " in (error := capsys.readouterr().err)
        assert problem in error


def test_a_flag_of_the_launcher_comes_too_late_for_a_script_that_runs(yaml_of, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        grpo.run(["--config", yaml_of(), "--num_processes", "2"])
    assert "--num_processes is for the launcher: write it before -m" in capsys.readouterr().err


# What is private of TRL


def test_the_script_of_trl_is_as_it_is_used():
    assert {"GRPOTrainer", "get_dataset", "get_peft_config"} <= set(stock.main.__code__.co_names)  # when it is called
    assert not hasattr(stock, "GRPOTrainer")
    assert list(stock.main.__code__.co_varnames[:4]) == ["script_args", "training_args", "model_args", "dataset_args"]
    assert set(grpo.NAMES) <= {*stock.main.__code__.co_names, *dir(trl.rewards)}
    text = stock.GRPOScriptArguments.__dataclass_fields__["reward_funcs"].metadata["help"]
    assert all(f"`{name}`" in text for name in grpo.NAMES)
    assert set(dir(trl.rewards)) >= set(grpo.NAMES)
    assert grpo.make_parser().parse_args_and_config.__func__ is trl.TrlParser.parse_args_and_config


def test_a_script_that_takes_its_trainer_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(stock, "main", lambda *args: None)
    with pytest.raises(ImportError, match="cannot pass its trainer to the GRPO script of TRL"), grpo.trainer_of_ours():
        pass


def test_every_flag_of_trl_is_one_of_ours():
    ours, theirs = (
        {name: kind for name, action in parser._option_string_actions.items() for kind in [(action.type, action.nargs)]}
        for parser in (grpo.make_parser(), stock.make_parser())
    )
    assert set(theirs) <= set(ours)
    assert {
        name for name in theirs if str(theirs[name]) != str(ours[name]) and "function" not in str(ours[name])
    } == set()


# Launching


@pytest.fixture
def launched(monkeypatch):
    """What would be started."""
    given = []
    for variable in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(launch, "launch_command", given.append)
    return given


def test_flags_of_the_launcher_go_to_the_launcher(yaml_of, launched):
    path = yaml_of(multi_gpu=True, main_process_port=29512, no_python=False)
    flags = ["--num_processes", "2", "--config", path, "--max_steps", "2", "--accelerate_config=zero2", "--gpu_ids=0,1"]
    assert grpo.main(flags) == 0
    (args,) = launched
    assert (args.num_processes, args.multi_gpu, args.main_process_port, args.gpu_ids) == (2, True, 29512, "0,1")
    assert not args.no_python
    assert args.config_file.endswith("zero2.yaml")
    assert (args.module, args.training_script) == (True, "trl_grpo_ext.recipe.grpo")
    assert args.training_script_args == ["--config", path, "--max_steps", "2"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--num_processes", "many"], "argument --num_processes/--num-processes: invalid int value: 'many'"),
        (["--accelerate_config", "zero9"], "Accelerate config zero9 is neither a file nor a valid config"),
    ],
)
def test_a_wrong_flag_of_the_launcher_is_one_line(flags, problem, yaml_of, launched, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        grpo.main(["--config", yaml_of(), *flags])
    assert capsys.readouterr().err.startswith(f"trl-grpo-ext grpo: error: {problem}")
    assert launched == []


def test_the_status_of_the_script_is_that_of_the_command(yaml_of, launched, monkeypatch):
    def fail(args):
        raise subprocess.CalledProcessError(7, "python")

    monkeypatch.setattr(launch, "launch_command", fail)
    assert grpo.main(["--config", yaml_of()]) == 7


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"])
def test_what_is_launched_does_not_launch(variable, monkeypatch):
    monkeypatch.setenv(variable, "0")
    monkeypatch.setattr(grpo, "run", lambda flags: flags)
    assert grpo.main(["--a"]) == ["--a"]


def test_two_processes_from_one_command(yaml_of, tmp_path):
    """`python -m trl_grpo_ext grpo --num_processes 2` and `accelerate launch -m trl_grpo_ext grpo` train the same."""
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, **kwargs):\n    return [float(sum(c in 'aeiou' for c in x)) for x in completions]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    reward = {"reward_funcs": ["mine.vowels"], "eval_strategy": "no"}
    one = [sys.executable, "-m", "trl_grpo_ext", "grpo", *launcher, "--config", yaml_of("one", **reward)]
    other = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "trl_grpo_ext", "grpo"]
    other += ["--config", yaml_of("other", **reward)]
    for command in (one, other):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert result.stdout.count("Training completed") == 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "other")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


# Recipes


def test_recipes_are_listed_with_what_they_do(capsys):
    assert shipped.main([]) == 0
    printed = capsys.readouterr().out
    assert "  helpful " in printed
    assert set(shipped.recipes()) == {path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml")}
    assert shipped.folder() == ROOT / "recipes"


def test_a_wheel_has_them_inside(monkeypatch, tmp_path):
    inside = tmp_path / "site" / "trl_grpo_ext"
    (inside / "recipes" / "configs").mkdir(parents=True)
    (tmp_path / "site" / "recipes").mkdir()  # of another package
    monkeypatch.setattr(shipped, "__file__", str(inside / "recipe" / "shipped.py"))
    assert shipped.folder() == inside / "recipes"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["helpfull"], "trl-grpo-ext recipe: error: 'helpfull' is no recipe: did you mean helpful?"),
        (["helpful", "--max_step", "x"], "trl-grpo-ext recipe helpful: error: argument --max_steps"),
        (["helpful", "--lenght_weight", "1"], "trl-grpo-ext recipe helpful: error: --lenght_weight is no option: did"),
        (
            ["helpful", "--dataset_name", "./no", "--use_cpu", "true", "--bf16", "false"],
            "trl-grpo-ext recipe helpful: error: There is no file or folder",
        ),
        (
            ["helpful", "--dataset_name", "helpfull", "--use_cpu", "true", "--bf16", "false"],
            "trl-grpo-ext recipe helpful: error: There is no file or",
        ),
        (["helpful", "--copy_to"], "trl-grpo-ext recipe helpful: error: --copy_to takes one folder and nothing else"),
        (["helpful", "--copy_to", "a", "--b"], "trl-grpo-ext recipe helpful: error: --copy_to takes one folder"),
    ],
)
def test_a_wrong_recipe_is_one_line(flags, problem, launched, capsys):
    try:
        assert shipped.main(flags) == 2
    except SystemExit as ended:
        assert ended.code == 2  # noqa: PT017
    error = capsys.readouterr().err
    assert error.startswith(problem)
    assert error.count("\n") == 1
    assert launched == []


@pytest.mark.parametrize("name", ["helpful", "harmless", "arithmetic", "multi_turn", "hierarchical"])
def test_a_recipe_is_launched_by_its_path(name, launched):
    flags = ["--max_steps", "2", "--use_cpu", "true", "--bf16", "false"]
    assert shipped.main([name, "--num_processes=1", *flags]) == 0
    (args,) = launched
    assert (args.num_processes, args.training_script) == (1, str(ROOT / "recipes" / f"{name}.py"))
    assert args.training_script_args == flags


def test_a_recipe_whose_packages_are_missing_says_what_to_install(launched, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "math_verify.parser", raising=False)
    assert shipped.main(["arithmetic"]) == 2
    assert 'pip install "trl-grpo-ext[recipes]"' in capsys.readouterr().err


def test_a_launched_recipe_runs_here(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    given = []
    monkeypatch.setattr(shipped.runpy, "run_path", lambda path, run_name: given.append((Path(path).name, *sys.argv)))
    monkeypatch.setattr(sys, "argv", ["trl-grpo-ext", "recipe", "helpful", "--max_steps", "2"])
    assert shipped.main(["helpful", "--max_steps", "2"]) == 0
    assert given == [("helpful.py", str(ROOT / "recipes" / "helpful.py"), "--max_steps", "2")]


@pytest.mark.parametrize("form", ["--copy_to {}", "--copy_to={}"])
def test_a_copy_is_the_recipe_with_its_configuration(form, tmp_path, capsys):
    flags = ["multi_turn", *form.format(tmp_path / "mine").split()]
    assert shipped.main(flags) == 0
    for file in ("multi_turn.py", "configs/multi_turn.yaml"):
        assert (tmp_path / "mine" / file).read_bytes() == (ROOT / "recipes" / file).read_bytes()
    assert shipped.main(flags) == 2
    assert "exists: name another folder" in capsys.readouterr().err
