"""Fixtures: a model small enough to train in a second, and the data that go with it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for a second thread to help
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, settings
from kit import args_of, make_letters, make_model, make_tokenizer, trainer_of

# Rooms have a conftest of their own, and as modules with doctests these would be several of one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
# How fast an example runs says something about the machine only.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


def pytest_collection_modifyitems(items):
    """What asks for the tiny model trains it, or starts a process that does."""
    for item in items:
        if "model_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.training)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def dataset() -> Dataset:
    return make_letters()


@pytest.fixture
def conversational(dataset) -> Dataset:
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


@pytest.fixture
def config(tmp_path):
    return lambda **options: args_of(tmp_path / "run", **options)


@pytest.fixture
def make_trainer(model_path, dataset, tmp_path):
    """`trainer_of` the tiny model and the letters, in a folder of this test: `make_trainer("name", **given)`."""

    def make(out="run", **given):
        return trainer_of(**{"model": model_path, "dataset": dataset, "out": tmp_path / out, **given})

    return make


@pytest.fixture
def trained(make_trainer):
    """The same, trained."""

    def train(*out, **given):
        trainer = make_trainer(*out, **given)
        trainer.train()
        return trainer

    return train
