"""
What the tests share: a tiny model and its data, options, trainers, batches by hand, and processes of their own.

Two-process tests name a function: `launch(model_path, out, function, **options)` calls it on every process and gives
what each returned. `python kit.py` is the other end of that.
"""

import contextlib
import http.server
import importlib
import inspect
import io
import json
import os
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback, RolloutBatch
from trl_grpo_ext.hooks.segments import total_rewards
from trl_grpo_ext.host.processes import leave
from trl_grpo_ext.host.state import check_savable
from trl_grpo_ext.recipe.tiny import tiny_model, tiny_tokenizer

NAN = float("nan")
ROOT = Path(__file__).parents[1]
# For scripts in processes of their own: what pytest puts on the path itself.
PYTHONPATH = os.pathsep.join(
    str(ROOT / folder) for folder in (".", "tests", "tests/rollouts", "tests/observe", "recipes/studies")
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|im_start|>", "<|im_end|>", " ", "user", "assistant", "system", "\n", *string.printable.strip()]
    return tiny_tokenizer(words, "<|im_end|>", chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    return tiny_model(tokenizer, seed, hidden_size=32, num_key_value_heads=2, max_position_embeddings=4096)


def make_letters() -> Dataset:
    """A prompt for each letter, with its answer, a level of difficulty and a number."""
    letters = string.ascii_lowercase
    return Dataset.from_dict(
        {
            "prompt": [f"say {a}" for a in letters],
            "answer": list(letters),
            "difficulty": [("easy", "medium", "hard")[i % 3] for i in range(26)],
            "score": [float(i) for i in range(26)],
        }
    )


# Rewards


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def count_vowels(completions, **kwargs) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text_of(c))) for c in completions]


def has_answer(completions, answer, **kwargs) -> list[float]:
    return [float(a in text_of(c)) for c, a in zip(completions, answer, strict=True)]


# Options and trainers


def config_kwargs(output_dir, **overrides) -> dict:
    return {
        "output_dir": str(output_dir),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **overrides,
    }


def args_of(output_dir: Any = "unused", **options: Any) -> AdaptiveGRPOConfig:
    """The configuration of a tiny run."""
    return AdaptiveGRPOConfig(**config_kwargs(output_dir, **options))


def trainer_of(
    model: Any,
    dataset: Any,
    out: Any,
    reward_funcs: Any = has_answer,
    callbacks: Sequence[Any] = (),
    cls: type = AdaptiveGRPOTrainer,
    **given: Any,
) -> Any:
    """
    A tiny trainer, not yet trained.

    What is an option of the configuration goes there; everything else that is `given` goes to the trainer. With a `cls`
    of TRL's, the configuration is TRL's. Evaluation, where it is on, reads the first four rows.
    """
    config = AdaptiveGRPOConfig if issubclass(cls, AdaptiveGRPOTrainer) else GRPOConfig
    options = {name: given.pop(name) for name in [*given] if name in config.__dataclass_fields__}
    if options.get("eval_strategy", "no") != "no" and "eval_dataset" not in given:
        given["eval_dataset"] = dataset.select(range(4))
    args = config(**config_kwargs(out, **options))
    return cls(
        model=model, reward_funcs=reward_funcs, args=args, train_dataset=dataset, callbacks=list(callbacks), **given
    )


class Watched(AdaptiveGRPOTrainer):
    """Remembers what each generation gave to the loss, and what TRL's tables and metrics held then."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.outputs: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append(output)
        self.tables.append({"advantages": list(self._logs["advantages"]), **self._metrics["train"]})
        return output


class Record(GRPOCallback):
    """Keeps every finished batch. Passed as a class, each trainer gets one of its own."""

    def __init__(self) -> None:
        self.batches: list[RolloutBatch] = []

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        self.batches.append(batch)


def batches_of(trainer: AdaptiveGRPOTrainer) -> list[RolloutBatch]:
    """What the [`Record`] of a trainer holds."""
    return next(callback.batches for callback in trainer.grpo_callbacks if isinstance(callback, Record))


def logs_of(trainer: Any) -> list[dict[str, Any]]:
    """The logs of training, without those of evaluations and the summary."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def have_same_weights(one: Any, other: Any) -> bool:
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Interrupt(TrainerCallback):
    """Stops as a kill after the checkpoint would: the learning rate schedule still expects all steps."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def interrupt(make: Callable[[str], Any], step: int) -> tuple[Any, Any, Any]:
    """
    Train three times: without interruption, until `step`, and on from there.

    Args:
        make (`Callable[[str], AdaptiveGRPOTrainer]`):
            Builds a fresh trainer that writes into a folder of this name.
        step (`int`):
            Where the second run saves and stops.

    Returns:
        `tuple`: the three trainers.
    """
    whole = make("whole")
    whole.train()
    cut = make("cut")  # not before, because making a trainer sets the seed
    cut.add_callback(Interrupt(step))
    cut.train()
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-{step}")
    return whole, cut, resumed


# Callbacks and batches by hand


def set_up(callback: Any, args: AdaptiveGRPOConfig | None = None, others: Sequence[Any] = (), **columns: Any) -> Any:
    """The callback, set up by a trainer whose dataset has these columns, beside other callbacks."""
    trainer = SimpleNamespace(train_dataset=Dataset.from_dict(columns), grpo_callbacks=[callback, *others])
    callback.on_setup(args=args or args_of(), state=state_at(0), control=None, trainer=trainer)
    return callback


def state_at(step: int, max_steps: int = 100) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps)


def batch_of(
    rewards: dict[int, Any] | list[Any],
    discarded: dict[int, Any] | list[Any] | None = None,
    weights: Sequence[float] | None = None,
    **fields: Any,
) -> RolloutBatch:
    """
    A batch from the rewards of its groups.

    Args:
        rewards (`dict[int, list]` or `list[list]`):
            For each prompt, or for each group where TRL's sampler chose the prompts, the rewards of its completions:
            one number each, or a list with one for each reward function.
        discarded (*optional*):
            The same of groups that were replaced.
        weights (`Sequence[float]`, *optional*):
            Weights of the reward functions; 1 each by default.
        fields:
            Other fields of the batch.
    """
    prompts = list(rewards) if isinstance(rewards, dict) else None
    groups = list(rewards.values()) if isinstance(rewards, dict) else rewards
    sizes = torch.tensor([len(group) for group in groups])
    per_func = torch.tensor([reward for group in groups for reward in group]).view(int(sizes.sum()), -1)
    names = ["first", "second", "third"][: per_func.size(1)]
    given = {
        "step": 0,
        "group_ids": torch.repeat_interleave(sizes),
        "group_sizes": sizes,
        "prompt_index": None if prompts is None else torch.tensor(prompts),
        "rewards_per_func": per_func,
        "raw_rewards_per_func": per_func,
        "reward_names": names,
        "rewards": total_rewards(per_func, torch.tensor([1.0] * len(names) if weights is None else weights)),
        "discarded": None if discarded is None else batch_of(discarded, weights=weights),
    }
    return RolloutBatch(**{**given, **fields})


def through_a_file(state: dict[str, Any]) -> Any:
    """What a checkpoint makes of a state."""
    check_savable(state)
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# Servers and processes of their own


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[Any]:
    """A server on this machine, at its `url`, whose requests a class answers."""
    handler.log_message = lambda self, *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def launch(
    model_path: str,
    out: Path,
    script: Any,
    processes: int = 2,
    nodes: int = 1,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> list[Any]:
    """
    Run a script, or a function of a module of tests, on several processes (gloo on the CPU).

    Args:
        model_path (`str`):
            First argument.
        out (`Path`):
            Second argument: a folder, made here.
        script (`Callable` or `str`):
            Called as `function(model_path, out, **options)`; or a path, started with `model_path`, `out` and the
            options as JSON, which writes `rank<n>.pt` into `out`.
        processes (`int`, *optional*, defaults to `2`):
            Of each node.
        nodes (`int`, *optional*, defaults to `1`):
            How many launchers share the run, all on this machine.
        options:
            Plain data.

    Returns:
        `list`: what the function returned on each process.
    """
    out.mkdir(exist_ok=True)
    command, path = [str(script)], PYTHONPATH
    if callable(script):
        file = Path(inspect.getfile(script))
        command = [__file__, f"{file.stem}:{script.__name__}"]
        path = os.pathsep.join([path, str(file.parent)])
    command += [model_path, str(out), json.dumps(options)]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | (environment or {})
    with contextlib.ExitStack() as stack:
        running = []
        for node, flags in enumerate(_torchrun(processes, nodes)):
            log = stack.enter_context(open(out / f"node{node}.txt", "w"))
            starts = [sys.executable, *flags, *command]
            running.append(
                subprocess.Popen(starts, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=log)
            )
            stack.callback(running[-1].kill)
        for node, process in enumerate(running):
            assert process.wait(timeout=900) == 0, (out / f"node{node}.txt").read_text()[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(processes * nodes)]


def _torchrun(processes: int, nodes: int) -> list[list[str]]:
    """The flags of each node's launcher; none for a single process."""
    if processes * nodes == 1:
        return [[]]
    flags = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1:
        return [[*flags, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        flags += ["--nnodes", str(nodes), "--master-addr", "localhost", "--master-port", str(probe.getsockname()[1])]
    return [[*flags, "--node-rank", str(node)] for node in range(nodes)]


def _run_one_process(function: str, model_path: str, out: str, options: str) -> None:
    module, _, name = function.partition(":")
    returned = getattr(importlib.import_module(module), name)(model_path, out, **json.loads(options))
    torch.save(returned, f"{out}/rank{os.environ.get('RANK', 0)}.pt")
    leave()


if __name__ == "__main__":
    _run_one_process(*sys.argv[1:])
