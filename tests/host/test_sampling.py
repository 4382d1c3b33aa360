"""Sampling at another temperature for a while: what each backend is told, and what is left afterwards."""

import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from trl_grpo_ext.host.sampling import evaluating, own_random_numbers, temperature_set


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 5))
def test_random_numbers_of_ones_own(outer, inner, count):
    random.seed(outer), np.random.seed(outer % 2**32), torch.manual_seed(outer)
    expected = [drawn() for _ in range(3)]
    random.seed(outer), np.random.seed(outer % 2**32), torch.manual_seed(outer)
    got = [drawn()]
    seen = []
    for _ in range(2):
        with own_random_numbers(inner):
            seen.append([drawn() for _ in range(count)])
        got.append(drawn())
    assert got == expected
    assert seen[0] == seen[1]


def test_random_numbers_come_back_after_an_error():
    before = torch.get_rng_state(), random.getstate()

    def fail():
        with own_random_numbers(0):
            drawn()
            raise OSError("judge")

    with pytest.raises(OSError, match="judge"):
        fail()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def stand_in(use_vllm):
    config = GenerationConfig(do_sample=True, temperature=0.9, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.3)
    model = torch.nn.Linear(1, 1)
    return SimpleNamespace(
        use_vllm=use_vllm, model=model, generation_config=config, vllm_generation=SimpleNamespace(temperature=0.9)
    )


@pytest.mark.parametrize("temperature", [0.0, 0.5, None])
def test_each_backend_is_told(temperature):
    for use_vllm in (False, True):
        trainer = stand_in(use_vllm)
        before = trainer.generation_config
        with temperature_set(trainer, temperature):
            told, engine = trainer.generation_config, trainer.vllm_generation.temperature
            assert engine == (temperature if use_vllm and temperature is not None else 0.9)
            if use_vllm or temperature is None:
                assert told is before
            else:
                assert told.do_sample == (temperature > 0)
                assert told.repetition_penalty == 1.3
                assert (told.top_p, told.top_k) == ((None, None) if temperature == 0 else (0.8, 7))
                assert told.temperature == (temperature or None)
        assert trainer.generation_config is before
        assert trainer.vllm_generation.temperature == 0.9
        assert (before.do_sample, before.temperature) == (True, 0.9)


def test_the_model_is_in_evaluation_meanwhile():
    trainer = stand_in(use_vllm=False)
    for mode in (True, False):
        trainer.model.train(mode)
        with evaluating(trainer, 0.0, seed=3):
            assert not trainer.model.training
        assert trainer.model.training == mode


def test_what_is_read_of_trl_and_transformers():
    expected = ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]
    assert list(inspect.signature(Trainer.evaluate).parameters) == expected
    assert "self.temperature" in inspect.getsource(VLLMGeneration.generate)
    assert "generation_config=self.generation_config" in inspect.getsource(GRPOTrainer._generate_single_turn)
