"""What is published: the contents of wheel and sdist, the cost of an import, and a reference of every public name."""

import ast
import email
import email.message
import importlib
import importlib.util
import os
import re
import site as site_packages
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import trl_grpo_ext

ROOT = Path(__file__).parent.parent
PUBLIC = ["trl_grpo_ext", "trl_grpo_ext.rewards", "trl_grpo_ext.observe.report", "trl_grpo_ext.rollouts"]


# Wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Both, from hatchling alone: nothing is downloaded."""
    pytest.importorskip("hatchling", reason="pip install hatchling")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=ROOT, check=True, capture_output=True
    )
    return {path.suffix: path for path in out.iterdir()}


def files_in(folder: str) -> set[str]:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_else(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
    ours = files_in("trl_grpo_ext")
    recipes = {name for name in files_in("recipes") if not name.startswith(("recipes/studies/", "recipes/runs/"))}
    assert {name for name in names if ".dist-info/" not in name} == ours | {f"trl_grpo_ext/{name}" for name in recipes}
    assert {"recipes/helpful.py", "recipes/configs/helpful.yaml", "recipes/configs/accelerate/ddp.yaml"} <= recipes
    assert {"trl_grpo_ext/py.typed", "trl_grpo_ext/recipe/data/helpful.jsonl"} <= ours
    assert "trl_grpo_ext/recipe/data/multi_turn.jsonl" in ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_can_be_tested_and_holds_no_runs(built):
    with tarfile.open(built[".gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "trl_grpo_ext/py.typed"} <= names
    assert {"tests/conftest.py", "recipes/helpful.py", "recipes/configs/helpful.yaml", "docs/index.md"} <= names
    assert [
        name for name in names if re.search(r"(^|/)(runs|__pycache__|\.venv|dist|site)/|\.safetensors$", name)
    ] == []


def test_the_metadata_says_what_the_code_says(built):
    metadata = metadata_of(built)
    assert metadata["Version"] == trl_grpo_ext.__version__
    assert f"## {metadata['Version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    needs = " ".join(metadata.get_all("Requires-Dist"))
    supported = importlib.import_module("trl_grpo_ext.host.seams").SUPPORTED_TRL
    assert sorted(re.search(r"trl([<>=.,\d]+)", needs)[1].split(",")) == sorted(supported.split(","))


def metadata_of(built) -> email.message.Message:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_an_index_page_shows_links_that_work_there(built):
    metadata = metadata_of(built)
    urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL"))
    assert urls.keys() >= {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {
        name: MarkdownIt("commonmark").enable("table").render(text)
        for name, text in {"here": readme, "there": metadata.get_payload(decode=True).decode()}.items()
    }
    links = {name: re.findall(r'(?:href|src)="([^"]+)"', page) for name, page in pages.items()}
    assert len(links["there"]) > 20
    for here, there in zip(links["here"], links["there"], strict=True):
        kind = "raw" if here.endswith((".svg", ".png")) else "blob"
        assert there == (here if here.startswith(("http", "#")) else f"{urls['Source']}/{kind}/main/{here}")
    code = [re.findall(r"<pre>.*?</pre>", page, flags=re.DOTALL) for page in pages.values()]
    assert code[0] == code[1] != []


def test_the_address_of_the_project_is_set_in_one_place(built):
    source = dict(entry.split(", ", 1) for entry in metadata_of(built).get_all("Project-URL"))["Source"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == source
    assert citation["version"] == trl_grpo_ext.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what its schema demands
    named = [path for path in [*ROOT.glob("*.*"), *ROOT.glob("docs/**/*.md")] if path.is_file()]
    holding = {path.name for path in named if source in path.read_text(encoding="utf-8")}
    assert holding == {"pyproject.toml", "CITATION.cff"}


def test_links_of_code_stay_as_they_are():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "[a](docs/a.md#b) ![c](d.svg) [e](https://f) [g](#h)\n```python\nx[0](y)\n```\n[i](j)\n"
    assert module.with_full_addresses(text, "https://a") == (
        "[a](https://a/blob/main/docs/a.md#b) ![c](https://a/raw/main/d.svg) [e](https://f) [g](#h)\n"
        "```python\nx[0](y)\n```\n[i](https://a/blob/main/j)\n"
    )


def test_the_readme_works_where_only_the_readme_is_shown():
    """An index shows it without the repository: what it links to must be there under a full address, or be in docs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in relative if not (ROOT / link.partition("#")[0]).exists()] == []


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The `bin` folder of an environment with the wheel, and with what it needs from here: nothing is downloaded."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[".whl"])], check=True, capture_output=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(
        "\n".join(site_packages.getsitepackages())
    )  # after the wheel, and no editable install
    return root / "bin"


def in_wheel(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = {**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(installed / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_an_installed_wheel_has_its_commands_and_recipes(installed, tmp_path):
    version = in_wheel(installed, tmp_path, "trl-grpo-ext", "--version")
    assert version.stdout.startswith(f"trl-grpo-ext {trl_grpo_ext.__version__} (trl "), version.stderr
    assert in_wheel(installed, tmp_path, "trl-grpo-report", "--help").returncode == 0
    listed = in_wheel(installed, tmp_path, "trl-grpo-ext", "recipe").stdout
    assert "  helpful " in listed
    assert f"They are in {installed.parent}/lib/" in listed
    wrong = in_wheel(installed, tmp_path, "python", "-m", "trl_grpo_ext.recipes.helpful", "--lerning_rate", "1")
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("error: --lerning_rate is no option: did you mean --learning_rate?\n")


def test_an_installed_recipe_trains(installed, model_path, tmp_path):
    flags = ["--model_name_or_path", model_path, "--max_steps", "1", "--max_completion_length", "4"]
    flags += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--output_dir", str(tmp_path / "run")]
    result = in_wheel(installed, tmp_path, "trl-grpo-ext", "recipe", "arithmetic", *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "report of the run to" in result.stdout
    assert (tmp_path / "run" / "report.html").exists()


# Imports


def imported(statement: str) -> set[str]:
    """The modules that a statement brings in, in a process that may not open a socket."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('a socket')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"{statement}\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


MODELS = {"transformers", "trl", "datasets", "accelerate", "sentence_transformers", "sklearn"}
NEEDS_LITTLE = {
    "trl_grpo_ext": {"torch", "numpy"},
    "trl_grpo_ext.rewards": {"torch", "numpy"},
    "trl_grpo_ext.observe.report": set(),
}


@pytest.mark.parametrize("module", NEEDS_LITTLE)
def test_what_scores_and_reads_brings_no_model_and_no_download(module):
    assert imported(f"import {module}") & (MODELS | NEEDS_LITTLE[module]) == set()


def test_importing_the_trainer_downloads_nothing():
    assert "trl.trainer.grpo_trainer" in imported("from trl_grpo_ext import AdaptiveGRPOTrainer")


def test_public_names_are_importable_and_listed_once():
    for module in map(importlib.import_module, PUBLIC):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        trl_grpo_ext.Nothing  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse((ROOT / "trl_grpo_ext" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    stated = {node.module: [alias.name for alias in node.names] for node in block.body}
    assert stated == trl_grpo_ext._MODULES
    assert sorted(name for names in stated.values() for name in names) == trl_grpo_ext.__all__


# Reference


def test_every_public_name_is_in_the_reference():
    pages = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("api.md", "rewards.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE))
    for name in PUBLIC:
        module = importlib.import_module(name)
        if name not in shown:  # which shows all of `__all__`
            assert [m for m in module.__all__ if not any(entry.endswith(f".{m}") for entry in shown)] == [], name
