"""Fixtures: a model small enough to train in a second, and the data that go with it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for a second thread to help
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, settings
from kit import config_kwargs, make_model, make_tokenizer

from trl_grpo_ext import AdaptiveGRPOConfig

# How fast an example runs says something about the machine only.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def dataset() -> Dataset:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Dataset.from_dict(
        {
            "prompt": [f"say {a}" for a in letters],
            "answer": list(letters),
            "difficulty": [("easy", "medium", "hard")[i % 3] for i in range(26)],
            "score": [float(i) for i in range(26)],
        }
    )


@pytest.fixture
def conversational(dataset) -> Dataset:
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


@pytest.fixture
def config(tmp_path):
    def make(**overrides) -> AdaptiveGRPOConfig:
        return AdaptiveGRPOConfig(**config_kwargs(tmp_path / "run", **overrides))

    return make
