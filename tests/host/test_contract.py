"""What the package relies on in TRL and transformers: a failure here says which seam moved."""

import inspect
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from kit import count_vowels, has_answer, trainer_of
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler, get_config_model_id, nanstd

from trl_grpo_ext.host.seams import (
    HELPERS,
    OPEN_SEAMS,
    SEAMS,
    check_seams,
    logged_since_log,
    loss_since_log,
    restore_logged,
    restore_loss,
)
from trl_grpo_ext.host.state import check_logged


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# Signatures


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (GRPOTrainer, "_prepare_inputs", ["self", "generation_batch"]),
        (GRPOTrainer, "_save_checkpoint", ["self", "model", "trial"]),
        (GRPOTrainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (GRPOTrainer, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        (Trainer, "save_model", ["self", "output_dir", "_internal_call"]),
        (Trainer, "_save_optimizer_and_scheduler", ["self", "output_dir"]),
        (Trainer, "_save_scaler", ["self", "output_dir"]),
        (Trainer, "_save_rng_state", ["self", "output_dir"]),
        (Trainer, "_load_rng_state", ["self", "checkpoint"]),
        (Trainer, "add_callback", ["self", "callback"]),
        (Trainer, "_get_output_dir", ["self", "trial"]),
        (Trainer, "_remove_unused_columns", ["self", "dataset", "description"]),
        (vllm_generation.VLLMGeneration, "generate", ["self", "prompts", "images", "num_generations", "profiler"]),
    ],
)
def test_signature_of_each_seam(owner, name, expected):
    assert parameters(getattr(owner, name)) == expected


def doctored(name: str, method) -> type:
    """TRL's trainer as a later release might have it."""
    return type("GRPOTrainer", (GRPOTrainer,), {name: method})


@pytest.mark.parametrize("name", [*SEAMS, *OPEN_SEAMS])
def test_a_trl_that_moved_a_seam_is_refused_with_its_name(name):
    check_seams(doctored("something_else", None))
    for moved in (None, lambda self, something, **kwargs: None):
        with pytest.raises(ImportError, match=rf'wraps GRPOTrainer\.{name}\(.*lacks: pip install "trl>=.*,<.*"'):
            check_seams(doctored(name, moved))


def test_a_trl_without_a_helper_is_refused_with_its_name(monkeypatch):
    monkeypatch.setitem(HELPERS, "trl.trainer.utils", ["nanstd", "of_another_release"])
    with pytest.raises(ImportError, match=rf"wraps trl.trainer.utils.of_another_release, which TRL {trl.__version__}"):
        check_seams(GRPOTrainer)


def test_importing_on_a_doctored_trl_gives_one_clear_error():
    code = (
        "import trl\n"
        "trl.GRPOTrainer._calculate_rewards = lambda self, rollouts: None\n"
        "from trl_grpo_ext import AdaptiveGRPOTrainer\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: trl-grpo-ext wraps GRPOTrainer._calculate_rewards(" in result.stderr.splitlines()[-1]


def test_arguments_are_passed_on_as_trl_passes_them():
    """What follows the pinned parameters: ours must reach TRL's by name."""
    method = getattr(GRPOTrainer, "_full_logits_logps", GRPOTrainer._get_per_token_logps_and_entropies)  # TRL 1.14's
    assert parameters(method)[:8] == OPEN_SEAMS["_get_per_token_logps_and_entropies"][0]


def test_signature_of_the_constructor():
    first = ["self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset"]
    assert parameters(GRPOTrainer.__init__)[:6] == first
    assert "callbacks" in parameters(GRPOTrainer.__init__)


def test_signatures_of_the_helpers():
    repeat = ["self", "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert parameters(RepeatSampler.__init__) == repeat
    assert parameters(nanstd) == ["tensor", "dim", "keepdim"]
    assert parameters(get_config_model_id) == ["config"]
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"


# Behaviour of the helpers


def test_repeat_sampler_walks_a_seeded_permutation_in_whole_batches():
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5)).tolist()
    repeated = [i for batch in (order[:3], order[3:6]) for _ in range(2) for i in batch for _ in range(4)]
    assert list(RepeatSampler(range(7), 4, batch_size=3, repeat_count=2, shuffle=True, seed=5)) == repeated
    assert list(RepeatSampler(range(4), 1, batch_size=2, shuffle=False)) == [0, 1, 2, 3]


def test_nanstd_has_bessels_correction_and_skips_nan():
    nan = float("nan")
    assert nanstd(torch.tensor([1.0, nan, 3.0])).item() == pytest.approx(2**0.5)
    assert nanstd(torch.tensor([1.0, nan])).isnan()


# The trainer's state


class Spy(GRPOTrainer):
    """Stock TRL that remembers what goes through the seams."""

    def __init__(self, *args, **kwargs):
        self.rewards, self.outputs, self.modes, self.appended = [], [], [], []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.rewards.append(super()._calculate_rewards(inputs, prompts, completions, completion_ids_list))
        return self.rewards[-1]

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        before = {name: len(values) for name, values in self._metrics[mode].items()}
        output = super()._generate_and_score_completions(inputs)
        self.modes.append(mode)
        self.outputs.append((inputs, output))
        self.appended.append({name: len(v) - before.get(name, 0) for name, v in self._metrics[mode].items()})
        return output


@pytest.fixture(scope="module")
def trainer(model_path, tmp_path_factory):
    """Two generations of two slices each, and an evaluation after the second."""
    data = Dataset.from_dict({"prompt": [f"say {a}" for a in "abcdefgh"], "answer": list("abcdefgh")})
    options = {"steps_per_generation": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    options |= {"reward_weights": [1.0, 0.5], "per_device_eval_batch_size": 4, "per_device_train_batch_size": 4}
    out, rewards = tmp_path_factory.mktemp("run"), [count_vowels, has_answer]
    trainer = trainer_of(model_path, data, out, rewards, cls=Spy, eval_dataset=data.select([0]), **options)
    assert trainer._step == 0
    assert trainer._buffered_inputs is None
    trainer.train()
    return trainer


def test_rows_come_as_dataset_rows_one_per_completion(trainer):
    inputs, _ = trainer.outputs[0]
    assert [row["prompt"] for row in inputs] == [inputs[0]["prompt"]] * 4 + [inputs[4]["prompt"]] * 4
    assert {"prompt", "answer"} <= set(inputs[0])


def test_rewards_cover_all_rows_and_functions(trainer):
    assert isinstance(trainer.rewards[0], Tensor)
    assert trainer.rewards[0].shape == (8, 2)
    assert trainer.reward_func_names == ["count_vowels", "has_answer"]
    assert trainer.reward_weights.tolist() == [1.0, 0.5]


def test_model_training_tells_training_from_evaluation(trainer):
    assert trainer.modes == ["train", "train", "eval"]
    assert set(trainer._metrics) == {"train", "eval"}


def test_one_generation_serves_all_its_steps(trainer):
    assert trainer._step == 4
    assert len(trainer._buffered_inputs) == trainer.args.steps_per_generation == 2
    assert all(len(slice["completion_ids"]) == 4 for slice in trainer._buffered_inputs)


def test_buffered_rollouts_are_used_between_two_generations(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda inputs: pytest.fail("generated"))
    monkeypatch.setattr(trainer, "_step", 5)
    monkeypatch.setattr(trainer, "_buffered_inputs", [{"slice": 0}, {"slice": 1}])
    trainer.model.train()
    assert trainer._prepare_inputs([]) == {"slice": 1}


def test_rollouts_are_a_dict_of_tensors(trainer):
    _, output = trainer.outputs[0]
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
    assert keys <= set(output) <= keys | {"old_per_token_logps", "ref_per_token_logps"}
    assert all(isinstance(value, Tensor) for value in output.values())
    assert output["advantages"].shape == (8,)
    assert output["num_items_in_batch"].ndim == 0
    assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_completions_table_holds_one_generation_batch(trainer):
    logs = trainer._logs
    assert set(logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
    assert set(logs["rewards"]) == {"count_vowels", "has_answer"}
    for column in (logs["prompt"], logs["completion"], logs["advantages"], *logs["rewards"].values()):
        assert isinstance(column, deque)
        assert column.maxlen == trainer.args.generation_batch_size == 8
        assert len(column) == 8
    assert isinstance(logs["extra"]["new"], deque)
    del logs["extra"]["new"]


class Measures(TrainerCallback):
    """What is known of the logs when each step ends."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        logged = logged_since_log(self.trainer, with_table=True)
        self.seen.append({**logged, "loss": loss_since_log(self.trainer), "logged": len(state.log_history)})


def test_what_is_measured_between_two_logs_is_read_and_put_back(make_trainer):
    measures, options = Measures(), {"max_steps": 3, "logging_steps": 2, "beta": 0.1}
    data = Dataset.from_dict({"prompt": ["say a", "say b"], "answer": ["a", "b"]})
    trainer = make_trainer(dataset=data, cls=GRPOTrainer, callbacks=[measures], **options)
    measures.trainer = trainer
    trainer.train()
    first, second, third = measures.seen
    # A log takes the mean of the values since the last log, and forgets them.
    assert {len(values) for name, values in second["metrics"].items() if name != "num_tokens"} == {2}
    assert {len(values) for values in third["metrics"].values()} == {1}
    assert [seen["last_log"] for seen in measures.seen] == [0, 0, 2]
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(sum(second["metrics"]["kl"]) / 2)
    assert log["loss"] == pytest.approx(second["loss"] / 2)
    assert first["loss"] != second["loss"]
    assert {len(values) for values in first["table"].values() if isinstance(values, list)} == {8}
    assert set(first["table"]["rewards"]) == {"has_answer"}
    check_logged({"losses": [first["loss"]], **{k: first[k] for k in ("metrics", "last_log", "table")}})
    metrics = trainer._metrics["train"]
    restore_logged(trainer, first["metrics"], first["table"])
    assert trainer._metrics["train"] is metrics  # others hold it
    again = logged_since_log(trainer, with_table=True)
    assert (again["metrics"], again["table"]) == (first["metrics"], first["table"])
    trainer._tr_loss.zero_()
    restore_loss(trainer, first["loss"], 1)
    assert loss_since_log(trainer) == first["loss"]
    assert logged_since_log(trainer, with_table=False)["last_log"] == 1


def test_each_generation_appends_one_value_per_metric(trainer):
    names = {"reward", "reward_std", "frac_reward_zero_std"}
    names |= {f"rewards/{name}/{stat}" for name in trainer.reward_func_names for stat in ("mean", "std")}
    names |= {f"completions/{stat}_length" for stat in ("mean", "min", "max")}
    for appended in trainer.appended:
        assert {name: appended.get(name) for name in names} == dict.fromkeys(names, 1)


def test_attributes_that_the_package_reads(trainer):
    assert trainer.num_generations == 4
    assert trainer.num_iterations == 1
    assert trainer.shuffle_dataset is trainer.args.shuffle_dataset is True
    assert trainer.scale_rewards == "group"
    assert trainer.multi_objective_aggregation == "sum_then_normalize"
    assert trainer._is_vlm is False
    assert trainer._tokenizer.pad_token_id == 0
    assert trainer.accelerator.num_processes == 1
    assert trainer.accelerator.process_index == 0
    assert trainer.args.generation_batch_size == 8
    assert trainer.args.should_save is True
    assert trainer.args.save_only_model is False
    assert trainer.state.global_step == trainer.state.max_steps == 4
    assert trainer._get_output_dir(None) == trainer.args.output_dir
    assert get_config_model_id(trainer.model.config) == trainer.model.config._name_or_path


def test_callbacks_are_kept_in_order(trainer):
    class First(TrainerCallback):
        pass

    second = TrainerCallback()
    trainer.add_callback(First)
    trainer.add_callback(second)
    assert type(trainer.callback_handler.callbacks[-2]) is First
    assert trainer.callback_handler.callbacks[-1] is second


def test_unused_columns_are_removed_only_on_request(trainer, monkeypatch):
    rows = trainer.train_dataset
    assert trainer.args.remove_unused_columns is False
    assert trainer._remove_unused_columns(rows, description="training").column_names == ["prompt", "answer"]
    monkeypatch.setattr(trainer.args, "remove_unused_columns", True)
    assert trainer._remove_unused_columns(rows, description="training").column_names == ["prompt"]
    assert rows.__getitems__([2, 0]) == [{"prompt": "say c", "answer": "c"}, {"prompt": "say a", "answer": "a"}]


# Why ragged groups ask for one completion per row


def test_rows_stand_alone_when_num_generations_is_one(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "num_generations", 1)
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in (0, 1, 1, 1, 2)]  # sizes 1, 3 and 1, which no view(-1, G) could hold
    output = trainer._generate_and_score_completions(rows)
    assert output["completion_ids"].size(0) == 5
    assert output["advantages"].tolist() == [0.0] * 5
    prompts = trainer._tokenizer.batch_decode(output["prompt_ids"], skip_special_tokens=True)
    assert prompts == [row["prompt"] for row in rows]


class Server:
    """Answers like vLLM's server: `n` completions for each prompt it is sent."""

    def generate(self, prompts, n, **kwargs):
        self.prompts = prompts
        completions = [[*prompt, i] for prompt in prompts for i in range(n)]
        logprobs = [[[0.0]] * len(completion) for completion in completions]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs, "logprob_token_ids": None}


def vllm(prompts, num_generations):
    """Run TRL's own code of vLLM's server mode; returns what the server was asked, and what came back per row."""
    server = Server()
    names = "temperature top_p top_k min_p repetition_penalty max_completion_length logprobs structured_outputs_regex"
    stub = SimpleNamespace(
        mode="server",
        vllm_client=server,
        accelerator=SimpleNamespace(is_main_process=True, process_index=0, num_processes=1),
        generation_kwargs=None,
        **dict.fromkeys(names.split()),
    )
    prompt_ids, completion_ids, *_ = vllm_generation.VLLMGeneration.generate(stub, prompts, None, num_generations)
    return server.prompts, prompt_ids, completion_ids


def test_vllm_server_strides_over_the_prompts(trainer):
    ragged = [[1], [2], [2], [2]]
    # A stride of 4 loses the second prompt: all four rows answer the first.
    asked, prompts, _ = vllm(ragged, num_generations=4)
    assert (asked, prompts) == ([[1]], [[1]] * 4)
    # One completion per row keeps each with its own prompt.
    asked, prompts, completions = vllm(ragged, num_generations=1)
    assert asked == prompts == ragged
    assert [completion[0] for completion in completions] == [1, 2, 2, 2]


def test_generation_asks_for_num_generations_of_the_trainer(trainer, monkeypatch):
    asked = []

    def single_turn(self, prompt_ids, images, multimodal_fields, num_generations=None, has_tool_images=False):
        # Before TRL 1.14.2, this method read it from the trainer.
        asked.append(self.num_generations if num_generations is None else num_generations)
        return [[7, 8] for _ in prompt_ids], None

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_generate_single_turn", single_turn)
    monkeypatch.setattr(trainer, "num_generations", 1)
    trainer.model.train()
    trainer._generate([f"say {a}" for a in "abc"])
    assert asked == [1]
