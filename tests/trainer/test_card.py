"""The model card says what was trained, on what, with which result, and names nothing of this machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from datasets import Dataset
from kit import args_of, count_vowels, has_answer, trainer_of
from peft import LoraConfig

from trl_grpo_ext import AdaptiveGRPOConfig, HeldOutCallback
from trl_grpo_ext.observe.held_out import HeldOut
from trl_grpo_ext.recipe.script import set_base_model
from trl_grpo_ext.rewards import Length, as_reward
from trl_grpo_ext.trainer import card

PACKAGE = Path(card.__file__).resolve().parents[1]


def held_out_of(scores: list[float]) -> HeldOut:
    asked = [f"question {number}" for number in range(len(scores))]
    return HeldOut(questions=asked, answers=["x"] * len(scores), scores={"total": scores})


def test_results_have_their_noise():
    before, after = held_out_of([0.0] * 25), held_out_of([1.0] * 20 + [0.0] * 5)
    table = card.held_out_section(before, after).splitlines()
    # The standard error of 25 gains, a fifth of them 0: sqrt(25 / 24 * 0.8 * 0.2 / 25).
    assert table[-1] == "| total | 0 | 0.8 | +0.8 ± 0.163 |"
    assert card.held_out_section(held_out_of([0.0] * 3), held_out_of([1.0] * 3)).endswith("(too few prompts to tell) |")
    assert card.held_out_section(before, None) == ""


def test_options_are_those_that_differ_and_say_something_of_the_model():
    text = card.options_section(args_of("/somewhere/else", curriculum="online", beta=0.1, hub_token="hf_secret"))
    for line in ('curriculum: "online"', "beta: 0.1", "learning_rate: 0.01", "max_completion_length: 6"):
        assert line in text
    for word in ("somewhere", "secret", "report_to", "use_cpu", "group_size", "logging"):
        assert word not in text


def test_options_that_nobody_set_are_not_listed():
    untouched = AdaptiveGRPOConfig(output_dir="x", bf16=False, use_cpu=True)
    assert card.options_section(untouched) == ""
    text = card.options_section(args_of("x", gradient_accumulation_steps=2))
    assert "gradient_accumulation_steps: 2" in text
    for name in ("debug", "generation_batch_size", "steps_per_generation", "bf16"):
        assert f"\n{name}:" not in text


def test_rewards_are_read_as_their_source():
    rewards = [as_reward(count_vowels) - 0.01 * Length(), has_answer]
    text = card.reward_section(rewards, ["first", "has_answer"], [1.0, 0.5])
    assert "1 * as_reward(count_vowels) - 0.01 * Length()\n0.5 * has_answer" in text
    assert card.reward_section(rewards[1:], ["has_answer"], [1.0]) == "```python\nhas_answer\n```"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["recipes/helpful.py", "--max_steps", "3"], "accelerate launch recipes/helpful.py --max_steps 3"),
        (["/opt/other/train.py", "--hub_token", "hf_abc"], "accelerate launch train.py --hub_token '…'"),
        ([str(PACKAGE / "recipe" / "grpo.py"), "--config", "x.yaml"], "trl-grpo-ext grpo --config x.yaml"),
        ([str(PACKAGE / "__main__.py"), "recipe", "helpful"], "trl-grpo-ext recipe helpful"),
        ([str(PACKAGE / "recipes" / "helpful.py"), "--seed", "1"], "trl-grpo-ext recipe helpful --seed 1"),
        (["-c", "x"], ""),
        ([""], ""),
    ],
)
def test_the_command_names_no_folder_of_this_machine_and_no_secret(arguments, shown):
    assert card.command_section(arguments) == (f"```bash\n{shown}\n```" if shown else "")


def test_a_shipped_recipe_that_is_started_elsewhere_is_named_by_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = card.command_section([str(PACKAGE.parent / "recipes" / "helpful.py"), "--seed", "1"])
    assert text == "```bash\ntrl-grpo-ext recipe helpful --seed 1\n```"


def test_an_adapter_is_told_by_the_flags_that_make_it():
    text = card.adapter_section(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"]))
    for line in ("lora_r: 2", "lora_alpha: 4", "lora_dropout: 0.0", 'lora_target_modules: ["k_proj", "q_proj"]'):
        assert line in text
    assert card.adapter_section(None) == ""


def test_the_quick_start_asks_as_the_training_did():
    asked = 'question = "old"\noutput = generator([{"role": "user", "content": question}])'
    rows = Dataset.from_list(
        [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]}]
    )
    text = card.completed(asked, {}, "m", "Why?", None, card.system_of(rows))
    found: list = []
    exec(text, {"generator": found.extend})
    assert found == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for other in (None, {"a": rows}, Dataset.from_list([{"prompt": "Why?"}])):
        assert card.system_of(other) is None


def test_the_front_matter_names_a_hub_id_and_no_folder(tmp_path):
    there = (
        f"---\nbase_model: {tmp_path}\nlibrary_name: peft\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\n\nText"
    )
    assert card.without_folders(there) == "---\nlibrary_name: peft\ntags:\n- lora\n---\n\nText"
    on_the_hub = there.replace(str(tmp_path), "org/base")
    assert card.without_folders(on_the_hub) == on_the_hub
    assert card.without_folders("No front matter") == "No front matter"


def test_a_local_base_model_has_no_address():
    text = card.completed("This is [None](https://huggingface.co/None).", {}, "m", None, None)
    assert text.startswith("This is a model in a local folder.")


def test_quotes_in_a_question_stay_python():
    asked = 'Say "hi" \\ to\nme'
    text = card.completed('question = "old"\n### Framework versions\n', {}, "m", asked, None)
    found: dict = {}
    exec(text.splitlines()[0], found)
    assert found["question"] == asked


@pytest.fixture
def untrained(model_path, dataset, tmp_path):
    return trainer_of(
        model_path, dataset, tmp_path / "run", as_reward(has_answer) - 0.01 * Length(), [HeldOutCallback()],
        eval_dataset=dataset.select(range(5)), peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip


@pytest.fixture
def trained(untrained):
    untrained.train()
    set_base_model(untrained, "org/base")
    return untrained


def test_a_card_before_any_evaluation_leaves_the_results_out(untrained, tmp_path, monkeypatch):
    # A dataset may draw random numbers for a row, and these would be those of the training.
    monkeypatch.setattr(card, "system_of", lambda rows: pytest.fail("a row was read"))
    untrained.create_model_card(model_name="mine")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "### Reward" in text
    assert "### Held-out results" not in text


def test_what_is_saved_of_a_local_base_model_names_no_folder_in_its_card(untrained, model_path, tmp_path):
    untrained.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    front = text.split("---")[1]
    assert str(model_path) not in front
    assert "lora" in front
    # The adapter does: it could not be loaded otherwise.
    named = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(model_path)


@pytest.mark.training
def test_the_card_of_a_run(trained, tmp_path):
    trained.save_model()
    trained.create_model_card(model_name="mine")
    text = (tmp_path / "run" / "README.md").read_text()
    loaded = huggingface_hub.ModelCard(text)
    assert loaded.data.base_model == "org/base"
    assert "fine-tuned version of [org/base]" in text
    assert "as_reward(has_answer) - 0.01 * Length()" in text
    assert "| has_answer | " in text
    assert "Answers to 5 held-out prompts" in text
    assert f"![Reward over completions]({card.PICTURE})" in text
    assert (tmp_path / "run" / card.PICTURE).stat().st_size > 5000
    # What TRL's template must go on to hold.
    assert 'question = "say a"' in text
    assert "lora_r: 2" in text
    assert 'model="run"' in text
    assert "max_new_tokens=6" in text
    assert text.index("### Reward") < text.index("### Framework versions") < text.index("@software{vonwerra2020trl")
    assert str(tmp_path) not in text
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    # Written again, it does not grow.
    trained.create_model_card(model_name="mine")
    assert (tmp_path / "run" / "README.md").read_text() == text


@pytest.mark.training
def test_what_is_pushed_holds_the_card_and_no_checkpoint(trained, tmp_path, monkeypatch):
    pushed = {}

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(self, **kwargs):
        pushed.update(kwargs, card=(tmp_path / "run" / "README.md").read_text())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    trained.push_to_hub()
    assert pushed["repo_id"] == "somebody/run"
    assert "checkpoint-*" in pushed["ignore_patterns"]
    assert 'model="somebody/run"' in pushed["card"]
    assert "### Held-out results" in pushed["card"]
