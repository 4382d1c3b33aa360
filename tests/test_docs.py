"""The docs keep up with the code: blocks parse and import, YAML is accepted, names are documented, links resolve."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
import yaml
from chromium import BROWSER, Page
from kit import config_kwargs, count_vowels, text_of
from transformers import TrainerCallback
from trl import GRPOConfig

import trl_grpo_ext
from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, RolloutBatch
from trl_grpo_ext.hooks import HookedTrainer
from trl_grpo_ext.hooks.conflicts import FACTS
from trl_grpo_ext.host.seams import OPEN_SEAMS, SEAMS, check_seams
from trl_grpo_ext.recipe import grpo
from trl_grpo_ext.recipe.layouts import LAYOUTS
from trl_grpo_ext.recipe.script import DataArguments

ROOT = Path(__file__).parent.parent
DOCS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))}
GUIDES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
PAGES = {**DOCS, **GUIDES}
TEXT = "\n".join(DOCS.values())
SOURCES = sorted((ROOT / "trl_grpo_ext").rglob("*.py"))


def module_at(path: Path):
    """A module of the docs folder, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = module_at(ROOT / "docs" / "tables.py")


def lines_outside_code(text: str) -> list[tuple[int, str]]:
    """Lines with their numbers, without those of fenced blocks."""
    blanked = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return list(enumerate(blanked.splitlines(), start=1))


def cells(line: str) -> list[str]:
    """Cells of a line of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


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
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= known


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_reaches_the_configuration(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    flags = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    parsed = grpo.make_parser().parse(flags)
    for key, value in yaml.safe_load(text).items():
        if key != "output_dir":
            assert [getattr(part, key) for part in parsed if hasattr(part, key)] == [value]


@pytest.mark.parametrize("page", tables.TABLES)
def test_tables_are_those_of_the_code(page):
    name, make = tables.TABLES[page]
    text = DOCS[f"docs/{page}"]
    assert tables.with_table(text, name, make()) == text, "run: python docs/tables.py"


def test_every_option_is_on_its_page_with_its_default_and_help():
    rows = [cells(line) for _, line in lines_outside_code(DOCS["docs/options.md"]) if line.startswith("| `")]
    own = {f.name: f for f in dataclasses.fields(AdaptiveGRPOConfig) if f.name not in GRPOConfig.__dataclass_fields__}
    assert [row[0].strip("`") for row in rows] == list(own)
    for (_, stated, text), field in zip(rows, own.values(), strict=True):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert (None if stated == "unset" else yaml.safe_load(stated.strip("`"))) == default, field.name
        assert text.replace("&lt;", "<").replace("\\|", "|") == field.metadata["help"], field.name


def test_what_cannot_be_combined_is_what_callbacks_declare():
    text = DOCS["docs/compatibility.md"].split("## What callbacks refuse")[1].split("## ")[0]
    rows = [cells(line) for line in text.splitlines() if line.startswith("| `")]
    stated = {callback.strip("`"): [other.strip("`") for other in others.split(", ")] for callback, others in rows}
    assert stated == tables.conflicts()
    assert {"CriticBaseline", "MultiTurnCallback(history='shared')", "HierarchicalCallback"} <= stated.keys()
    for others in stated.values():
        for other in others:
            is_class = any(cls.__name__ == other for cls in tables.callback_classes())
            assert other in FACTS or hasattr(GRPOCallback, other) or is_class, other


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
    (code,) = [param.values[0] for param in blocks("python") if "IgnoreLong().on_advantages(args" in param.values[0]]
    exec(code, namespace)
    assert namespace["advantages"].tolist() == [-1.0, 0.0, 0.0, -0.5, 1.0]


def test_the_error_of_an_unsupported_trl_is_the_one_shown(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "0.19.0")
    (shown,) = re.findall(r"```text\n(trl-grpo-ext wraps .*?)\n```", DOCS["docs/compatibility.md"])
    with pytest.raises(ImportError) as error:
        check_seams(type("Old", (), {}))
    assert str(error.value) == shown


# Names


def logged_in(source: str) -> set[str]:
    """
    Names of the metrics that a module logs, with `{}` for what is filled in.

    Read are `metrics["name"] = ...` and calls of `log_metric` and of a `_log` that takes a dict of metrics.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and "metrics" in ast.unparse(target.value):
                    found.append(target.slice)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("log_metric", "_log") and node.args:
                found += node.args[0].keys if isinstance(node.args[0], ast.Dict) else node.args[:1]
        for name in found:
            if isinstance(name, ast.Constant):
                names.add(name.value)
            elif isinstance(name, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in name.values]
                names.add("".join(parts))
    return names


def test_every_metric_is_documented():
    names = set().union(*(logged_in(path.read_text(encoding="utf-8")) for path in SOURCES))
    expected = {"rollouts/total", "reward_clip/{}/frac", "curriculum/position", "group_size/max", "critic/loss"}
    expected |= {"time/{}", "actions/lr_scale", "multi_turn/turns", "hierarchical/plan_share", "reward_weights/{}"}
    assert expected <= names
    documented = {re.sub(r"\{\w+\}|<\w+>", "{}", name) for name in re.findall(r"`([\w/{}<>]+)`", TEXT)}
    missing = [name for name in sorted(names) if name not in documented]
    assert [name for name in missing if not is_filled_in(name, documented)] == []


def is_filled_in(name: str, documented: set[str]) -> bool:
    """Whether a name such as `time/{}` is documented by each of its values."""
    pattern = re.escape(name).replace(re.escape("{}"), r"[\w{}]+")
    return "{}" in name and any(re.fullmatch(pattern, other) for other in documented)


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


def public_of(cls: type, base: type = object) -> list[str]:
    """Methods and properties that a class adds to another, without private ones."""
    own = {name for name, value in vars(cls).items() if callable(value) or isinstance(value, property)}
    return sorted(name for name in own if not name.startswith("_") and not hasattr(base, name))


def test_what_callbacks_may_ask_is_documented():
    page = DOCS["docs/callbacks.md"]
    for name in public_of(HookedTrainer):
        value = inspect.getattr_static(HookedTrainer, name)
        parameters = [] if isinstance(value, property) else list(inspect.signature(value).parameters)[1:]
        shown = name if isinstance(value, property) else f"{name}({', '.join(parameters)})"
        assert f"| `{shown}` |" in page, shown
    batch = [name for name in public_of(RolloutBatch) if name not in ("select", "append")]
    assert [name for name in batch if f"`{name}" not in page] == []
    assert [fact for fact in FACTS if f"`{fact}`" not in page] == []


def overrides_in_docs() -> list:
    """Every hook that a block of the pages defines."""
    found = []
    for param in blocks("python"):
        for cls in ast.walk(ast.parse(param.values[0])):
            if isinstance(cls, ast.ClassDef) and any(ast.unparse(base) == "GRPOCallback" for base in cls.bases):
                methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
                found += [
                    pytest.param(node, id=f"{param.id}-{node.name}") for node in methods if node.name.startswith("on_")
                ]
    return found


@pytest.mark.parametrize("override", overrides_in_docs())
def test_overrides_name_what_they_read_and_nothing_else(override):
    known = set(inspect.signature(getattr(GRPOCallback, override.name)).parameters)
    named = {argument.arg for argument in override.args.args}
    read = {node.id for node in ast.walk(override) if isinstance(node, ast.Name)}
    assert override.args.kwarg.arg == "kwargs"
    assert named <= known
    assert named - {"self"} <= read


def test_every_seam_is_on_the_page():
    page = DOCS["docs/architecture.md"]
    assert [name for name in (*SEAMS, *OPEN_SEAMS) if f"`{name}`" not in page] == []


def test_the_picture_of_the_readme_is_the_folder():
    picture = re.search(r"```text\ntrl_grpo_ext/\n(.*?)```", PAGES["README.md"], flags=re.DOTALL)[1]
    shown = {line.split()[0].rstrip("/") for line in picture.splitlines()}
    found = {path.name for path in (ROOT / "trl_grpo_ext").iterdir()}
    assert shown == found - {"__init__.py", "__pycache__", "py.typed"}
    rooms = {name for name in shown if "." not in name}
    page = DOCS["docs/architecture.md"]
    assert [room for room in sorted(rooms) if f"| `{room}/` |" not in page] == []
    assert [room for room in sorted(rooms) if f"`{room}`" not in PAGES["CONTRIBUTING.md"]] == []


def test_readme_and_overview_share_one_table():
    def table(page: str) -> list[str]:
        return [line for line in page.split("## Against stock TRL")[1].split("\n## ")[0].splitlines() if line]

    assert table(PAGES["README.md"].replace("](docs/", "](")) == table(DOCS["docs/index.md"])


def test_the_readme_has_claim_and_commands_on_its_first_screen():
    screen = PAGES["README.md"].splitlines()[:25]
    assert any(line.startswith("**") for line in screen[:4])
    for command in (
        'pip install -e ".[recipes]" && accelerate launch recipes/helpful.py',
        'pip install -e ".[test]" && pytest',
    ):
        assert any(line.startswith(command) for line in screen)


def test_the_example_of_the_readme_is_short_and_takes_the_shipped_prompts(monkeypatch):
    (code,) = [
        param.values[0]
        for param in blocks("python")
        if param.id.startswith("README.md") and "load_prompts" in param.values[0]
    ]
    body = ast.parse(code).body
    made, given = [statement for statement in body if isinstance(statement, ast.Assign)], {}
    assert len(body) - len(made) <= 5  # imports, and `trainer.train()`
    assert len(made) <= 6
    monkeypatch.setattr(trl_grpo_ext, "AdaptiveGRPOTrainer", lambda *args, **kwargs: given.update(kwargs, args=args))
    code = code.replace("monitor=True", "monitor=True, use_cpu=True, bf16=False").replace("trainer.train()", "")
    exec(code, {})
    _, reward, args, prompts = given["args"]
    assert args.baseline == "batch"
    assert {"prompt", "reference"} <= set(prompts.column_names)
    assert [leaf.name for leaf in reward.leaves()] == ["relevance", "finished", "length"]


def test_every_option_of_the_recipes_is_documented():
    names = {field.name for field in dataclasses.fields(DataArguments)}
    for recipe in ("helpful", "harmless", "arithmetic", "reasoning", "multi_turn", "hierarchical", "two_tasks"):
        source = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8"))
        (arguments,) = [node for node in source.body if isinstance(node, ast.ClassDef)]
        names |= {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 12
    assert [name for name in names if f"`--{name}`" not in DOCS["docs/recipes.md"]] == []


def test_every_layout_is_documented():
    page = DOCS["docs/recipes.md"]
    for name, layout in LAYOUTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        assert all(f"`{column}`" in cells(row)[1] for column in layout.columns)
    (option,) = [line for line in page.splitlines() if line.startswith("| `--dataset_layout`")]
    assert all(f"`{name}`" in option for name in LAYOUTS)


def test_results_in_the_table_of_recipes_were_measured():
    measured = DOCS["docs/measured/recipes.md"] + DOCS["docs/measured/tasks.md"]
    rows = [cells(line) for line in DOCS["docs/recipes.md"].splitlines() if line.startswith("| [`recipes/")]
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"check"}
    assert {re.search(r"recipes/(\w+)\.py", row[0])[1] for row in rows} == recipes
    for row in rows:
        numbers = re.findall(r"\d\.\d{3}", row[3])
        assert len(numbers) >= 4, row
        assert [number for number in numbers if number not in measured] == [], row


# Form


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_wrapped_and_tables_are_narrow(page):
    lines = lines_outside_code(PAGES[page])
    assert [number for number, line in lines if len(line) > 120 and not line.lstrip().startswith("|")] == []
    assert [number for number, line in lines if line.startswith("|") and len(cells(line)) > 8] == []


@pytest.mark.parametrize("page", sorted(DOCS))
def test_sentences_are_short(page):
    assert [text for text in sentences(DOCS[page]) if len(re.findall(r"\S*\w\S*", text)) > 32] == []


def sentences(text: str) -> list[str]:
    """Sentences of the prose: not of code, tables, headings and comments."""
    lines = [line for _, line in lines_outside_code(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))]
    prose = "\n".join("" if line.lstrip().startswith(("|", "#", "!", "=", ":")) else line for line in lines)
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:- |\d+\. )", prose)
    return [part for block in paragraphs for part in re.split(r"(?<=[.!?:;])\**\s+", " ".join(block.split()))]


def test_files_that_code_names_exist():
    """Docs, studies and tests that a docstring or a page sends the reader to."""
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}
    texts |= {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.glob("recipes/**/*.py")}
    missing = []
    for name, text in {**texts, **PAGES}.items():
        for path in re.findall(r"\b((?:docs|recipes|tests|trl_grpo_ext)/[\w/.-]+\.(?:md|py|yaml|csv))\b", text):
            if not (ROOT / path).exists():
                missing.append((name, path))
    assert missing == []


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


@pytest.mark.training
@pytest.mark.skipif(find_spec("zensical") is None, reason='needs the docs extra: pip install -e ".[docs]"')
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_the_built_site_is_searched_from_the_file_system_and_asks_no_network(tmp_path):
    for name in ("docs", "trl_grpo_ext"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, check=True, timeout=300)
    with Page() as page:
        page.open(tmp_path / "site" / "measured" / "alarms.html")
        page.run("document.querySelector('.md-search__button').click()")
        page.run("new Promise((done) => setTimeout(done, 1000))")
        page.call("Input.insertText", text="curriculum")
        shadows = "[...document.querySelectorAll('*')].map((e) => e.shadowRoot?.textContent ?? '').join('')"
        for _ in range(50):
            if found := re.search(r"\d\d+ results", page.run(shadows)):
                break
            page.run("new Promise((done) => setTimeout(done, 200))")
        assert found
        assert not page.named("Runtime.exceptionThrown")
        requested = {request["request"]["url"].split(":")[0] for request in page.named("Network.requestWillBeSent")}
        assert requested <= {"file", "data", "about", "blob"}
