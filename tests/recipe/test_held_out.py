"""The held-out pass: as the rollout of the training answers, scored by what TRL takes as rewards."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from kit import ROOT, config_kwargs, count_vowels
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import ModelConfig

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, HeldOutCallback, MultiTurnCallback
from trl_grpo_ext.hooks.records import Answer, RolloutSequence
from trl_grpo_ext.observe.held_out import HeldOut, evaluate_held_out
from trl_grpo_ext.recipe import make_trainer, parse_arguments, train_and_compare
from trl_grpo_ext.recipe.evaluation import print_comparison
from trl_grpo_ext.rewards import Length, as_reward, of_plan

TREE = {"rollout": "hierarchical", "num_plans": 2, "num_implementations": 2, "num_generations": 2}
TREE |= {"per_device_train_batch_size": 6, "plan_template": "plan {prompt}", "implementation_template": "do"}
TALK = {"rollout": "multi_turn", "history": "independent", "turn_columns": ["reference"]}


def user(text):
    return {"role": "user", "content": text}


def talks(count=8):
    """Of one, two and three turns."""
    rows = [{"prompt": [user(f"say {'abcdefgh'[i]}")], "turns": ["and b?", "and c?"][: i % 3]} for i in range(count)]
    return Dataset.from_list([{**row, "reference": list("xyz")[: len(row["turns"]) + 1]} for row in rows])


def questions(count=8):
    return Dataset.from_list(
        [{"prompt": [user(f"say {'abcdefgh'[i]}")], "reference": "abcdefgh"[i]} for i in range(count)]
    )


def trainer_of(model_path, out, dataset, reward=count_vowels, callbacks=(), eval_dataset=None, **options):
    args = AdaptiveGRPOConfig(**config_kwargs(out, **options))
    return AdaptiveGRPOTrainer(model_path, reward, args, dataset, eval_dataset, callbacks=list(callbacks))


def greedy_answers(model_path, out, prompts):
    """Of a model to prompts by themselves, from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=6, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].size(1) :], skip_special_tokens=True))
    return answers


class Seen:
    """A reward that notes its calls."""

    __name__ = "seen"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return [float(len(completion[0]["content"])) for completion in completions]


def test_conversations_are_held_greedily_turn_by_turn(model_path, tmp_path):
    seen, dataset = Seen(), talks()
    trainer = trainer_of(model_path, tmp_path, dataset, **TALK)
    held_out = evaluate_held_out(trainer, dataset, as_reward(seen) - 0.5 * Length(), batch_size=3)
    assert held_out.keys == [(i, turn) for i in range(8) for turn in range(1, i % 3 + 2)]
    histories = []
    for place, (i, turn) in enumerate(held_out.keys):
        said = ["", "and b?", "and c?"][turn - 1] or f"say {'abcdefgh'[i]}"
        assert held_out.questions[place] == said
        before = histories[-1] + [{"role": "assistant", "content": held_out.answers[place - 1]}] if turn > 1 else []
        histories.append([*before, user(said)])
    # Up to what tokenising an answer anew changes, each answer is that of the model to the history by itself.
    alone = greedy_answers(model_path, tmp_path, histories)
    first = [place for place, (_, turn) in enumerate(held_out.keys) if turn == 1]
    assert [held_out.answers[place] for place in first] == [alone[place] for place in first]
    assert sum(a == b for a, b in zip(held_out.answers, alone, strict=True)) >= len(alone) - 1
    (call,) = seen.calls
    assert call["prompts"] == histories
    assert call["turn"] == [turn for _, turn in held_out.keys]
    assert call["last_turn"] == [turn == i % 3 + 1 for i, turn in held_out.keys]
    assert call["reference"] == ["xyz"[turn - 1] for _, turn in held_out.keys]
    for own, length, total in zip(*(held_out.scores[name] for name in ("seen", "length", "total")), strict=True):
        assert total == pytest.approx(own - 0.5 * length)


def test_plans_are_made_and_followed_greedily(model_path, tmp_path):
    seen, dataset = Seen(), questions()
    trainer = trainer_of(model_path, tmp_path, dataset, **TREE)
    reward = as_reward(seen) + of_plan(as_reward(seen, "plan"))
    held_out = evaluate_held_out(trainer, dataset, reward)
    assert held_out.keys == [(i, 1) for i in range(8)]
    assert held_out.questions == [f"say {letter}" for letter in "abcdefgh"]
    plans = greedy_answers(model_path, tmp_path, [[user(f"plan {question}")] for question in held_out.questions])
    call = seen.calls[0]
    assert call["plan"] == plans
    assert call["reference"] == list("abcdefgh")
    for question, plan, prompt in zip(held_out.questions, plans, call["prompts"], strict=True):
        assert prompt == [user(f"plan {question}"), {"role": "assistant", "content": plan}, user("do")]
    assert held_out.scores["plan_of_plan"] == [len(plan) for plan in plans]
    sums = zip(held_out.scores["seen"], held_out.scores["plan_of_plan"], held_out.scores["total"], strict=True)
    assert all(total == own + plan for own, plan, total in sums)


def test_a_simulated_user_ends_conversations_where_it_wants(model_path, tmp_path):
    def curious(history):
        return None if "say a" in history[0]["content"] else "Why?"

    dataset = questions(2)
    callback = MultiTurnCallback(history="independent", user=curious, max_turns=3)
    trainer = trainer_of(model_path, tmp_path, dataset, callbacks=[callback])
    held_out = evaluate_held_out(trainer, dataset, count_vowels)
    assert held_out.keys == [(0, 1), (1, 1), (1, 2), (1, 3)]
    assert held_out.questions == ["say a", "say b", "Why?", "Why?"]


class Parrot(GRPOCallback):
    """A rollout of one's own: repeats the prompt, and scores every second answer."""

    def on_generate(self, rows, **kwargs):
        tokenizer = self.trainer.tokenizer
        texts = [row["prompt"][-1]["content"] for row in rows]
        ids = self.trainer.tokenize([row["prompt"] for row in rows])
        answers = [
            Answer(row["prompt"], tokenizer(text)["input_ids"], text, is_last=True, is_scored=number % 2 == 0)
            for number, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]
        return [RolloutSequence(own, [answer]) for own, answer in zip(ids, answers, strict=True)]

    def on_setup(self, trainer, **kwargs):
        self.trainer = trainer


def test_a_rollout_of_ones_own_is_followed(model_path, tmp_path):
    trainer = trainer_of(model_path, tmp_path, questions(), callbacks=[Parrot()])
    held_out = evaluate_held_out(trainer, questions(), count_vowels)
    assert held_out.answers == ["say a", "say c", "say e", "say g"]
    assert held_out.keys == [(i, 1) for i in (0, 2, 4, 6)]
    assert held_out.scores["count_vowels"] == [2, 1, 2, 1]
    none = evaluate_held_out(trainer, questions(2).select([1, 1]), count_vowels, batch_size=2)
    assert none.scores["total"] == [1.0]


@pytest.mark.parametrize("options", [TALK, TREE])
def test_looking_leaves_the_training_as_it_was(model_path, tmp_path, options):
    dataset = talks() if options is TALK else questions()
    weights = []
    for looks in (False, True):
        callbacks = [HeldOutCallback()] if looks else []
        trainer = trainer_of(
            model_path,
            tmp_path / str(looks),
            dataset,
            callbacks=callbacks,
            eval_dataset=dataset,
            max_steps=2,
            **options,
        )
        if looks:
            before = torch.get_rng_state()
            evaluate_held_out(trainer, dataset, count_vowels)
            assert torch.equal(torch.get_rng_state(), before)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
        assert [entry for entry in trainer.state.log_history if "multi_turn/turns" in entry] or options is TREE
    assert torch.equal(*weights)


def test_turns_are_logged_and_printed_apart(model_path, tmp_path, capsys):
    dataset = talks()
    reward, callback = as_reward(count_vowels) - 0.1 * Length(), HeldOutCallback()
    given = {"callbacks": [callback], "eval_dataset": dataset, "max_steps": 1}
    trainer_of(model_path, tmp_path, dataset, reward, **given, **TALK).train()
    trainer = callback.trainer
    first, *_, last = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    for entry, result in ((first, callback.before), (last, callback.after)):
        for name in ("count_vowels", "length"):
            assert entry[f"eval_rewards/{name}/mean"] == pytest.approx(result.mean(name))
            for turn in (1, 2, 3):
                own = result.of_turn(turn)
                assert entry[f"eval_rewards/{name}/turn_{turn}/mean"] == pytest.approx(own.mean(name))
                assert own.mean(name) == pytest.approx(result.mean(name, turn))
    print_comparison(callback.before, callback.after)
    printed = capsys.readouterr().out
    assert [f"turn {turn} ({count}, greedy" in printed for turn, count in ((1, 8), (2, 5), (3, 2), (4, 0))] == [
        True,
        True,
        True,
        False,
    ]


def test_answers_that_one_of_two_passes_lacks_are_not_shown(capsys):
    before = HeldOut(["q0", "q1"], ["old 0", "old 1"], {"total": [1.0, 2.0]}, rows=[0, 1], turns=[1, 1])
    after = HeldOut(["q1"], ["new 1"], {"total": [4.0]}, rows=[1], turns=[1])
    print_comparison(before, after)
    printed = capsys.readouterr().out
    assert "old 1" in printed
    assert "new 1" in printed
    assert "old 0" not in printed
    assert "+2.500" in printed  # of the means: 1.5 and 4


# What TRL takes as rewards


@pytest.fixture(scope="module")
def reward_model(model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return str(path)


def short(completions, **kwargs):
    return [-float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize("kind", ["function", "list", "weights", "model", "mixed"])
def test_recipes_take_what_trl_takes(kind, model_path, reward_model, tmp_path, capsys):
    reward, names, weights = {
        "function": (count_vowels, ["count_vowels"], None),
        "list": ([count_vowels, short], ["count_vowels", "short"], None),
        "weights": ([count_vowels, short], ["count_vowels", "short"], [1.0, 0.5]),
        "model": (reward_model, ["judge0"], None),
        "mixed": ([reward_model, as_reward(short)], ["judge0", "short"], None),
    }[kind]
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, max_steps=2, monitor=True, reward_weights=weights))
    prompts = {"train": questions(), "test": questions(3)}
    held_out = train_and_compare(prompts, reward, args, ModelConfig(model_path))
    assert list(held_out.after.scores) == [*names, "total"]
    for i, total in enumerate(held_out.after.scores["total"]):
        parts = [held_out.after.scores[name][i] for name in names]
        assert total == pytest.approx(sum(w * part for w, part in zip(weights or [1.0, 1.0], parts, strict=False)))
    logs = [json.loads(line) for line in (tmp_path / "monitor" / "metrics.jsonl").read_text().splitlines()]
    trained = next(entry for entry in logs if "loss" in entry)
    assert all(f"rewards/{name}/mean" in trained for name in names)
    assert f"Model saved to {tmp_path}" in capsys.readouterr().out


def test_prompts_that_are_text_are_answered_as_text(model_path, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["say a", "say bcd"]})
    trainer = trainer_of(model_path, tmp_path, dataset, num_generations=2, per_device_train_batch_size=2)
    seen = []

    def texts(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    held_out = evaluate_held_out(trainer, dataset, texts)
    assert seen == [(["say a", "say bcd"], held_out.answers)]
    assert held_out.questions == ["say a", "say bcd"]


@pytest.mark.parametrize("name", ["multi_turn", "hierarchical"])
def test_recipes_with_rollouts_say_the_same_on_two_processes(name, model_path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    module = importlib.import_module(name)
    flags = ["--model_name_or_path", model_path, "--bf16", "false", "--use_cpu", "true", "--max_steps", "1"]
    flags += ["--max_completion_length", "4", "--max_test_prompts", "3", "--per_device_train_batch_size", "12"]
    flags += ["--num_generations", "2", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, "--output_dir", str(tmp_path / "1")])
    module.main(*parse_arguments(getattr(module, f"{name.title().replace('_', '')}Arguments"), module.__file__))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", module.__file__]
    command = [*launcher, *flags, "--output_dir", str(tmp_path / "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    evaluated = []
    for out in ("1", "2"):
        lines = (tmp_path / out / "monitor" / "metrics.jsonl").read_text().splitlines()
        first = next(entry for entry in map(json.loads, lines) if "eval_reward" in entry)
        evaluated.append({key: value for key, value in first.items() if key.startswith("eval_rewards/")})
    assert evaluated[0]
    assert evaluated[1] == pytest.approx(evaluated[0], abs=1e-5)


# Prompts of another form


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        (questions(), r"prompts is a Dataset: pass .*dataset.train_test_split\(test_size=48\)"),
        ([{"prompt": "q"}], "prompts is a list: pass"),
        ({"train": questions()}, r"prompts has no 'test', only \['train'\]: .*train_test_split"),
        (
            {"train": DatasetDict(a=questions()), "test": questions()},
            r"prompts\['train'\] holds the splits \['a'\]: pass",
        ),
        ({"train": [{"prompt": "q"}], "test": questions()}, r"is a list: make it datasets.Dataset.from_list\(rows\)"),
        (
            {"train": questions(), "test": questions().to_iterable_dataset()},
            "is a IterableDataset: pass a datasets.Dataset",
        ),
        ({"train": questions(), "test": questions(0)}, r"prompts\['test'\] is empty"),
        ({"train": questions(), "test": None}, "is a NoneType: pass a datasets.Dataset"),
    ],
)
def test_prompts_of_another_form_get_a_remedy(prompts, problem, tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path))
    for start in (make_trainer, train_and_compare):  # before any model is looked for
        with pytest.raises(ValueError, match=problem):
            start(prompts, count_vowels, args, ModelConfig("/no/such/model"))


def test_remedies_help(model_path, tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path))
    halves = questions().train_test_split(test_size=2)
    assert make_trainer(halves, count_vowels, args, ModelConfig(model_path)).train_dataset.num_rows == 6


@pytest.mark.parametrize("reward", [[], [count_vowels, 3], 3, None])
def test_what_is_no_reward_is_refused(reward, tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path))
    with pytest.raises((ValueError, TypeError), match="reward"):
        train_and_compare({"train": questions(), "test": questions()}, reward, args, ModelConfig("/no/such/model"))


def test_weights_are_as_many_as_rewards(tmp_path):
    args = AdaptiveGRPOConfig(**config_kwargs(tmp_path, reward_weights=[1.0]))
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0\] is for another number of rewards: pass 2"):
        make_trainer({"train": questions(), "test": questions()}, [short, short], args, ModelConfig("/no/such"))
