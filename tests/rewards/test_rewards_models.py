"""Models as rewards, against what stock TRL and plain transformers compute for the same tiny model. No hub."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from kit import trainer_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import GRPOTrainer

from trl_grpo_ext.rewards import Harmlessness, RewardError, RewardModel, as_reward
from trl_grpo_ext.rewards.models import _load, classifier_logits, load_classifier

TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
PROMPTS = ["the cat", "a", "dog ran the"]
COMPLETIONS = [" sat", " dog ran a cat sat the dog", ""]
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", "the", "cat", "sat", "a", "dog", "ran"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build(tokenizer, folder, **config):
    """A classifier saved with its tokenizer. Large head, so that scores differ by more than rounding."""
    torch.manual_seed(0)
    shape = {**SHAPE, "pad_token_id": None}  # which is then the tokenizer's
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **shape, **config))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return build(tokenizer, tmp_path_factory.mktemp("models") / "judge", num_labels=1)


def stock_trl(tokenizer, folder, tmp_path, prompts, completions):
    """What TRL's own `_calculate_rewards` gives for the model as a reward function."""
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    data, options = Dataset.from_dict({"prompt": ["a", "the"]}), {"cls": GRPOTrainer, "num_generations": 2}
    trainer = trainer_of(policy, data, tmp_path, folder, processing_class=copy.deepcopy(tokenizer), **options)
    rows = [{"prompt": prompt} for prompt in prompts]
    return trainer._calculate_rewards(rows, prompts, completions, [[0]] * len(prompts))[:, 0].tolist()


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "chat"])
@pytest.mark.training
def test_scores_are_those_of_stock_trl(tokenizer, folder, tmp_path, conversational):
    prompts, completions = PROMPTS, COMPLETIONS
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
        completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    expected = stock_trl(tokenizer, folder, tmp_path, prompts, completions)
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 2, 16):
        values = RewardModel(folder, batch_size=batch_size)(prompts=prompts, completions=completions)
        assert values == pytest.approx(expected, abs=1e-5)


@pytest.mark.training
def test_a_model_object_scores_like_its_folder(tokenizer, folder):
    expected = as_reward(folder)(prompts=PROMPTS, completions=COMPLETIONS)
    model = LlamaForSequenceClassification.from_pretrained(folder).train()  # dropout or not, scoring is in eval mode
    for reward in (as_reward(model), RewardModel(model, tokenizer), RewardModel(model, tokenizer, device="cpu")):
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert as_reward(model).__name__ == "judge"
    assert repr(RewardModel(model)) == "RewardModel(model=<LlamaForSequenceClassification>)"


def test_padding_does_not_change_a_bidirectional_model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    together, alone = (
        RewardModel(model, tokenizer, batch_size=size)(prompts=PROMPTS, completions=COMPLETIONS) for size in (3, 1)
    )
    assert together == pytest.approx(alone, abs=1e-5)


def test_max_length_keeps_the_end(folder):
    (short,) = RewardModel(folder)(prompts=["sat"], completions=[" the dog"])
    (long,) = RewardModel(folder, max_length=3)(prompts=["cat a ran sat"], completions=[" the dog"])
    assert long == pytest.approx(short, abs=1e-5)
    assert RewardModel(folder)(prompts=["cat a ran sat"], completions=[" the dog"]) != pytest.approx([short], abs=1e-3)


def test_pickles_as_its_id_and_loads_once(folder, monkeypatch):
    reward = 2 * RewardModel(folder) + RewardModel(folder, name="again", batch_size=1)
    assert len(pickle.dumps(reward)) < 3000
    same = pickle.loads(pickle.dumps(reward))
    assert same == reward
    _load.cache_clear()
    values = same(prompts=PROMPTS, completions=COMPLETIONS)
    assert _load.cache_info().misses == 1
    single = RewardModel(folder)(prompts=PROMPTS, completions=COMPLETIONS)
    assert values == pytest.approx([3 * value for value in single], abs=1e-5)


def test_names_and_errors(tokenizer):
    assert RewardModel("org/reward-model").__name__ == "reward-model"
    assert repr(RewardModel("org/reward-model")) == "RewardModel(model='org/reward-model')"
    assert as_reward("org/reward-model") == RewardModel("org/reward-model")
    assert as_reward("org/reward-model", name="judge").__name__ == "judge"
    nameless = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, num_labels=1))
    assert RewardModel(nameless, tokenizer).__name__ == "LlamaForSequenceClassification"
    with pytest.raises(ValueError, match="does not say where it was loaded from: pass tokenizer="):
        RewardModel(nameless)
    with pytest.raises(ValueError, match="batch_size=0"):
        RewardModel("org/name", batch_size=0)
    with pytest.raises(ValueError, match="max_length=0"):
        RewardModel("org/name", max_length=0)


@pytest.mark.parametrize("label", ["toxic", 1])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_harmlessness_of_a_classifier(tokenizer, tmp_path, label, problem):
    names = {0: "fine", 1: "toxic", 2: "odd"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    path = build(tokenizer, tmp_path / "classifier", **labels, problem_type=problem)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    texts = ["the cat sat", "dog", "a dog ran a cat"]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        harm = logits.sigmoid()[1] if problem.startswith("multi") else logits.softmax(0)[1]
        expected.append(1.0 - harm.item())
    reward = Harmlessness(path, label)
    assert reward(prompts=[""] * 3, completions=texts) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RewardError, match=r"no label 'rude': choose harmful_label from \['fine', 'odd', 'toxic'\]"):
        Harmlessness(path, "rude")(prompts=[""], completions=["a"])


def test_a_row_without_tokens_is_scored_wherever_it_stands(tokenizer, folder):
    model = load_classifier(folder, num_labels=1)
    nothing, something = classifier_logits(model, tokenizer, [[], [3, 4]], 16)
    something_first, nothing_last = classifier_logits(model, tokenizer, [[3, 4], []], 16)
    assert torch.allclose(nothing, nothing_last, atol=1e-5)
    assert torch.allclose(something, something_first, atol=1e-5)
    assert torch.allclose(classifier_logits(model, tokenizer, [[]], 16)[0], nothing, atol=1e-5)
