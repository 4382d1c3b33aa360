"""The notebook runs from its first cell to its last, and shows what a run of it gave."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_shows_what_it_gave(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    text = str([cell.outputs for cell in code])
    assert "after" in text
    assert "Traceback" not in text
    assert not [word for word in ("/root", "/home", "/tmp", "/work") if word in text]


@pytest.mark.training
def test_it_runs(notebook, model_path, tmp_path):
    """With a model made in a moment and two small steps, which is all that differs."""
    for cell in notebook.cells:
        for old, new in {
            "resolve_model(name).path": repr(str(model_path)),
            "max_steps=10": "max_steps=2",
            "per_device_train_batch_size=32": "per_device_train_batch_size=8",
        }.items():
            cell.source = cell.source.replace(old, new)
    assert "max_steps=2" in str(notebook)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert (tmp_path / "runs" / "quickstart" / "adapter_config.json").exists()
    assert (tmp_path / "runs" / "quickstart" / "README.md").exists()
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
