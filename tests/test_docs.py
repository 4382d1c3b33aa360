"""The docs keep up with the code: blocks parse and import, YAML is accepted, names are documented, links resolve."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
import trl
import yaml
from kit import config_kwargs, count_vowels, text_of
from transformers import TrainerCallback
from trl import GRPOConfig, ModelConfig, TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, RolloutBatch
from trl_grpo_ext.host.seams import check_seams
from trl_grpo_ext.recipe.script import DataArguments

ROOT = Path(__file__).parent.parent
DOCS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES = {**DOCS, "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
TEXT = "\n".join(DOCS.values())


def blocks(language: str) -> list:
    """Fenced blocks of all pages, those in tabs included."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
    found = []
    for page, text in PAGES.items():
        for match in pattern.finditer(text):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(textwrap.dedent(match[2]), id=f"{page}:{line}"))
    return found


def test_there_is_something_to_check():
    assert len(blocks("python")) > 20
    assert len(blocks("yaml")) > 3


# Code


@pytest.mark.parametrize("code", blocks("python"))
def test_python_parses_and_its_imports_resolve(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("code", blocks("python"))
def test_options_in_python_exist(code):
    known = set(AdaptiveGRPOConfig.__dataclass_fields__)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "AdaptiveGRPOConfig":
            assert {keyword.arg for keyword in node.keywords} <= known


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_reaches_the_configuration(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    parser = TrlParser((AdaptiveGRPOConfig, ModelConfig))
    flags = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    args, model_args = parser.parse_args_and_config(flags)
    for key, value in yaml.safe_load(text).items():
        if key != "output_dir":
            assert getattr(args if hasattr(args, key) else model_args, key) == value


def test_every_option_is_on_its_page_with_its_default():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCS["docs/options.md"], flags=re.MULTILINE))
    own = {f.name: f for f in dataclasses.fields(AdaptiveGRPOConfig) if f.name not in GRPOConfig.__dataclass_fields__}
    assert list(table) == list(own)
    for name, stated in table.items():
        field = own[name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if default is None:
            assert not stated.startswith("`"), name  # nothing, or how it is derived
        else:
            assert yaml.safe_load(stated.strip("`")) == default, name


def defined_in_docs() -> dict[str, type]:
    """The callbacks that the pages define."""
    namespace: dict = {}
    for param in blocks("python"):
        if re.search(r"^class \w+\(GRPOCallback\)", param.values[0], flags=re.MULTILINE):
            exec(param.values[0], namespace)
    return {name: cls for name, cls in namespace.items() if isinstance(cls, type) and cls.__module__ == "builtins"}


def test_callbacks_of_the_docs_train_and_keep_their_state(model_path, dataset, tmp_path):
    classes = defined_in_docs()
    assert {"IgnoreLong", "ReplaceEasy", "RunningScale"} <= classes.keys()
    del classes["Copycat"]  # whose rows cannot be replaced one by one
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=count_vowels,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_completion_length=12, max_steps=2)),
        train_dataset=dataset,
        callbacks=[cls() for cls in classes.values()],
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["reward_scale"] >= 1
    assert 0 <= logged["too_long"] <= 1
    for callback in trainer.grpo_callbacks:
        before = {key: value.clone() for key, value in callback.state_dict().items()}
        callback.load_state_dict(before)
        assert all(torch.equal(value, before[key]) for key, value in callback.state_dict().items())


def test_the_rollout_of_the_docs_answers_in_place_of_the_model(model_path, conversational, tmp_path):
    trainer = AdaptiveGRPOTrainer(
        model=model_path,
        reward_funcs=count_vowels,
        args=AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_steps=1)),
        train_dataset=conversational,
        callbacks=[defined_in_docs()["Copycat"]()],
    )
    trainer.train()
    assert {text_of(completion)[:4] for completion in trainer._logs["completion"]} == {"say "}


def test_the_way_to_test_a_callback_works():
    namespace: dict = dict(defined_in_docs())
    (code,) = [param.values[0] for param in blocks("python") if "IgnoreLong().on_advantages" in param.values[0]]
    exec(code, namespace)
    assert namespace["advantages"].tolist() == [-1.0, 0.0, 0.0, -0.5, 1.0]


def test_the_error_of_an_unsupported_trl_is_the_one_shown(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "0.19.0")
    (shown,) = re.findall(r"```text\n(trl-grpo-ext wraps .*?)\n```", DOCS["docs/compatibility.md"])
    with pytest.raises(ImportError) as error:
        check_seams(type("Old", (), {}))
    assert str(error.value) == shown


# Names


def test_every_option_is_documented():
    ours = AdaptiveGRPOConfig.__dataclass_fields__.keys() - GRPOConfig.__dataclass_fields__.keys()
    assert len(ours) > 10
    assert [name for name in sorted(ours) if name not in TEXT] == []


def test_every_metric_is_documented():
    names = set()
    for path in sorted((ROOT / "trl_grpo_ext").glob("*.py")):
        names |= set(re.findall(r"""metrics\[f?"([^"]+)"\]""", path.read_text(encoding="utf-8")))
    names.discard("too_long")  # of an example
    assert {"rollouts/total", "reward_clip/{name}/frac", "curriculum/position", "group_size/max"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in TEXT] == []


def test_every_hook_and_field_is_documented():
    page = DOCS["docs/callbacks.md"]
    own = [name for name in vars(GRPOCallback) if not hasattr(TrainerCallback, name)]
    hooks = [name for name in own if name.startswith("on_") or name.endswith("state_dict")]
    fields = [field.name for field in dataclasses.fields(RolloutBatch)]
    assert len(hooks) == 12
    assert [name for name in [*hooks, *fields] if f"| `{name}` |" not in page] == []
    for hook in hooks:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{hook}` |")]
        for parameter in inspect.signature(getattr(GRPOCallback, hook)).parameters:
            if parameter not in ("self", "args", "state", "control", "kwargs", "state_dict"):
                assert f"`{parameter}`" in row


def test_every_option_of_the_recipes_is_documented():
    names = {field.name for field in dataclasses.fields(DataArguments)}
    for recipe in ("helpful", "harmless", "arithmetic", "reasoning", "multi_turn"):
        source = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8"))
        (arguments,) = [node for node in source.body if isinstance(node, ast.ClassDef)]
        names |= {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 12
    assert [name for name in names if f"`--{name}`" not in DOCS["docs/recipes.md"]] == []


# Links


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_navigation_has_every_page():
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = []
    while entries:
        (entry,) = entries.pop().values()
        if isinstance(entry, str):
            pages.append(f"docs/{entry}")
        else:
            entries += entry
    assert sorted(pages) == sorted(DOCS)
