"""Tiny vision-language models: what touches no image works, rows are replaced with theirs, the rest says why not."""

import pytest
import torch
from kit import has_answer, have_same_weights, trainer_of, weights_of
from tiny_vlm import llava, picture, questions, qwen2_vl
from trl import GRPOTrainer

from trl_grpo_ext import CriticBaseline

MODELS = pytest.mark.parametrize("make", [llava, qwen2_vl], ids=lambda make: make.__name__)


def letters(completions, answer, **kwargs):
    """The share of letters, which random completions differ in; nothing for the first half of the alphabet."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isalpha() for c in text) if a > "g" else 0.0 for text, a in zip(texts, answer, strict=True)]


@pytest.fixture
def train(tmp_path):
    def of(make, data=None, callbacks=(), **given):
        model, processor = make()
        data = questions() if data is None else data
        given["processing_class"] = processor
        trainer = trainer_of(model, data, tmp_path, [letters, has_answer], callbacks, **given)
        trainer.seen = []
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: trainer.seen.append(inputs) or compute(model, inputs)
        start = weights_of(trainer)
        trainer.train()
        assert any((weight != start[name]).any() for name, weight in weights_of(trainer).items())
        return trainer

    return of


def assert_images_are_those_of_the_prompts(trainer):
    """Each row's image, among those of its micro-batch, is the one whose number its prompt names."""
    images = trainer.processing_class.image_processor
    for inputs in trainer.seen:
        assert inputs["num_images"] == [1] * len(inputs["prompt_ids"])
        grids = inputs.get("image_grid_thw")
        sizes = [1] * len(inputs["prompt_ids"]) if grids is None else grids.prod(-1).tolist()
        texts = trainer.processing_class.tokenizer.batch_decode(inputs["prompt_ids"])
        for text, values in zip(texts, inputs["pixel_values"].split(sizes), strict=True):
            letter = text.split("say ")[1][0]
            expected = images(images=[picture(ord(letter) - 97)], return_tensors="pt")["pixel_values"]
            assert torch.allclose(values, expected, atol=1e-6)


@MODELS
def test_switched_off_it_is_stock(make, train):
    stock, ours = train(make, cls=GRPOTrainer), train(make)
    assert have_same_weights(stock, ours)


@MODELS
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": "variance", "curriculum": "online", "reward_clip_range": [-1, 5], "monitor": True},
        {"group_size": "threshold", "curriculum": "staged", "difficulty_column": "difficulty"},
        {"min_group_size": 2, "max_group_size": 6, "group_size": "variance", "num_iterations": 2},
    ],
    ids=["variance", "threshold", "iterations"],
)
def test_what_touches_no_image(make, options, train):
    trainer = train(make, **options)
    assert_images_are_those_of_the_prompts(trainer)
    assert len(trainer.seen) == 3


@MODELS
def test_dynamic_sampling_replaces_rows_with_their_images(make, train):
    trainer = train(make, dynamic_sampling_rounds=2, log_completions=True)
    assert_images_are_those_of_the_prompts(trainer)
    discarded = [row["dynamic_sampling/discarded"] for row in trainer.state.log_history if "reward" in row]
    assert sum(discarded) > 0


@MODELS
def test_savings_fall_back_and_say_why(make, train, caplog):
    stock = train(make, cls=GRPOTrainer)
    ours = train(make, share_prompts=True, skip_zero_advantage=True)
    assert have_same_weights(stock, ours)
    said = [record.message for record in caplog.records if "TRL's own forward pass" in record.message]
    assert len(said) == 1
    assert "because the batch holds" in said[0]
    assert "pixel_values" in said[0]


def test_a_vision_language_model_on_text_alone(train, caplog):
    """Rows without images have their flat rows left out; prompts are not shared, and the reason is said."""
    data = questions().remove_columns("images")
    train(llava, data=data, share_prompts=True, skip_zero_advantage=True)
    assert "it takes images or sound besides text" in caplog.text


@MODELS
def test_rows_of_which_some_have_no_image(make, train):
    data = questions(images=lambda number: number % 2)
    with pytest.raises(TypeError, match="NoneType"):  # of which nobody would know why
        train(make, data, cls=GRPOTrainer)
    with pytest.raises(ValueError, match=r"has no image, and others have some.*give every row of the dataset an image"):
        train(make, data=data)


def test_what_reads_text_alone_is_refused(train):
    with pytest.raises(ValueError, match="use a text model"):
        train(llava, callbacks=[CriticBaseline()])
