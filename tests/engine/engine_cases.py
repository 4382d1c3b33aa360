"""
The features with the real vLLM, and what is asked of every batch that it samples.

Two questions, both answered by the policy itself, row by row and without anything of this package in between:

- *Log-probabilities*: are those that vLLM gave for its tokens the policy's own, in the same context?
- *Greedy*: with `top_k=1`, is each token the policy's most likely one in its context?

A negative control asks the same with every row behind another row's prompt: then many tokens must be wrong. If it finds
as few, the questions see nothing.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gloo_transfer import use_gloo
from kit import args_of, config_kwargs, make_tokenizer, text_of
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from trl_grpo_ext.config import EFFICIENT, EFFICIENT_LONG_PROMPTS
from trl_grpo_ext.host.engine import engine_for_cpu, one_engine
from trl_grpo_ext.recipe.tiny import tiny_model

CLOSE = 2e-3  # nats: what float32 in two implementations may differ by
FAR = 0.5  # nats: what another context changes


def make_model(path: Path) -> str:
    """A tiny model whose heads are as wide as vLLM's kernels for CPUs need them, and whose tokens depend on context."""
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2}
    tiny_model(tokenizer, **shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# Data and rewards


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def texts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"Item {i}: " + "x" * (i % 5) for i in range(64)]})


def chats() -> Dataset:
    return Dataset.from_dict({"prompt": [user(f"Name item {i}." + "!" * (i % 4)) for i in range(64)]})


def conversations() -> Dataset:
    return chats().add_column("turns", [[f"And {i}?"] * (i % 3) for i in range(64)])


def vowels(completions: list[Any], **kwargs: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text_of(c)) / max(1, len(text_of(c))) for c in completions]


def sometimes(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """Nothing for half of the prompts, so that some groups are flat."""
    return [
        float("e" in text_of(c)) if len(str(prompt)) % 2 else 0.0
        for prompt, c in zip(prompts, completions, strict=True)
    ]


# What is asked


@dataclass
class Asked:
    """
    What the policy answered for one batch.

    Args:
        tokens (`int`):
            Tokens that the engine sampled.
        gap (`float`):
            Largest difference between vLLM's log-probability of a token and the policy's, NaN where vLLM gave none.
        not_likeliest (`int`):
            Tokens that are not the policy's most likely ones.
        control_far (`int`), control_not_likeliest (`int`):
            The same behind other rows' prompts: tokens whose log-probability differs by more than 0.5, and tokens that
            are not the most likely ones.
        is_training (`bool`):
            Whether the batch is trained on, and not one of an evaluation.
    """

    tokens: int
    gap: float
    not_likeliest: int
    control_far: int
    control_not_likeliest: int
    is_training: bool


@torch.no_grad()
def ask(trainer: Any, output: dict[str, Any]) -> Asked:
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    ids, sampled = output["completion_ids"], output.get("sampling_per_token_logps")
    known = (output["completion_mask"] * output.get("tool_mask", 1)) > 0
    if sampled is not None:
        known &= sampled.isfinite()

    def answers(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([prompt_mask, output["completion_mask"]], dim=1)
        logits = model(
            input_ids=torch.cat([prompt_ids, ids], dim=1),
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        ).logits[:, prompt_ids.size(1) - 1 : -1]
        logits = logits / trainer.temperature
        chosen = logits.gather(-1, ids[..., None])[..., 0]
        return chosen - logits.logsumexp(-1), (logits.amax(-1) - chosen > 1e-3) & known

    def gaps(logps: torch.Tensor) -> torch.Tensor:
        return torch.full((1,), torch.nan) if sampled is None else (logps - sampled)[known].abs()

    logps, wrong = answers(output["prompt_ids"], output["prompt_mask"])
    # Other rows' prompts: half a batch away, which is another group.
    shift = max(1, len(ids) // 2)
    control, control_wrong = answers(output["prompt_ids"].roll(shift, 0), output["prompt_mask"].roll(shift, 0))
    model.train(was_training)
    return Asked(
        tokens=int(known.sum()),
        gap=max(gaps(logps).tolist(), default=0.0),
        not_likeliest=int(wrong.sum()),
        control_far=int((gaps(control) > FAR).sum()),
        control_not_likeliest=int(control_wrong.sum()),
        is_training=was_training,
    )


class Asking(AdaptiveGRPOTrainer):
    """Asks about every batch when it was sampled, before the policy changes."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.asked: list[Asked] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.asked.append(ask(self, output))
        return output


# The features


@dataclass
class Case:
    """A feature: its options, its data, and what else the trainer is given."""

    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Dataset] = texts
    reward: Callable[..., list[float]] = vowels
    has_adapter: bool = False
    given: Callable[[str], dict[str, Any]] = lambda path: {}


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.
    """
    return a + b


def with_tools(path: str) -> dict[str, Any]:
    """A tool, a template that has a place for it, and a model that calls it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = qwen3_chat_template
    return {"tools": [add], "processing_class": tokenizer, "cls": Calling}


def own_rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A user's `rollout_func`, which asks the engine of the trainer."""
    from vllm import SamplingParams

    ids = trainer.processing_class(text=prompts)["input_ids"]
    greedy = {} if trainer.args.top_k != 1 else {"top_k": 1}
    options = SamplingParams(max_tokens=trainer.args.max_completion_length, logprobs=0, **greedy)
    generation = trainer.vllm_generation
    outputs = generation.llm.generate([{"prompt_token_ids": row} for row in ids], options, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return {
        "prompt_ids": ids,
        "completion_ids": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
    }


class Calling(Asking):
    """Every other answer to a user is a call of the tool, in place of what vLLM sampled, without log-probabilities."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
        ids = self.processing_class(call)["input_ids"]
        for row in range(0, len(prompt_ids), 2):
            if self.processing_class.decode(prompt_ids[row]).count("tool_response") < 2:
                completions[row], logprobs[row] = list(ids), [float("nan")] * len(ids)
        return completions, logprobs


RAGGED = {"group_size": "variance", "curriculum": "online"}
REPLACED = {"dynamic_sampling_rounds": 1}
LEAN = {"share_prompts": True, "skip_zero_advantage": True}
SHARED = {"rollout": "multi_turn", "history": "shared"}
APART = {"rollout": "multi_turn", "history": "independent"}
TREE = {"rollout": "hierarchical", "num_plans": 2, "num_implementations": 3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}

CASES: dict[str, Case] = {
    "nothing": Case(),
    "ragged": Case(RAGGED),
    "ragged, replaced": Case({**RAGGED, **REPLACED}, reward=sometimes),
    "replaced, token_truncate": Case({**REPLACED, "vllm_importance_sampling_mode": "token_truncate"}, reward=sometimes),
    "replaced, no correction": Case({**REPLACED, "vllm_importance_sampling_correction": False}, reward=sometimes),
    "multi_turn, shared": Case(SHARED, conversations),
    "multi_turn, independent": Case(APART, conversations),
    "hierarchical": Case(TREE, chats),
    "shared prompts, skipped rows": Case(LEAN, reward=sometimes),
    "shared prompts, skipped rows, ragged, replaced": Case({**LEAN, **RAGGED, **REPLACED}, reward=sometimes),
    "shared prompts, multi_turn": Case({**LEAN, **SHARED}, conversations),
    "shared prompts, independent": Case({**LEAN, **APART}, conversations),
    "shared prompts, hierarchical": Case({**LEAN, **TREE}, chats),
    "lora, ragged": Case(RAGGED, has_adapter=True),
    "lora, shared prompts, skipped rows": Case(LEAN, reward=sometimes, has_adapter=True),
    "lora, multi_turn": Case(SHARED, conversations, has_adapter=True),
    "beta": Case({**RAGGED, "beta": 0.05, "kl_target": 0.01, "monitor": True}),
    "temperature": Case({**RAGGED, "temperature": 0.7}),
    "evaluation": Case({**RAGGED, **EVALUATED}),
    "evaluation, multi_turn": Case({**SHARED, **EVALUATED}, conversations),
    "evaluation, hierarchical": Case({**TREE, **EVALUATED}, chats),
    "accumulation and iterations": Case({**RAGGED, "num_iterations": 2, "gradient_accumulation_steps": 2}),
    "truncated": Case({**REPLACED, "mask_truncated_completions": True}, reward=sometimes),
    "efficient": Case({**EFFICIENT, "max_steps": 8}),
    "efficient, long prompts": Case({**EFFICIENT_LONG_PROMPTS, "max_steps": 8}),
    "tools": Case({**RAGGED, "max_completion_length": 300}, chats, given=with_tools),
    "rollout_func": Case(RAGGED, given=lambda path: {"rollout_func": own_rollout}),
}

ON_TWO_PROCESSES = [
    "nothing",
    "ragged",
    "ragged, replaced",
    "multi_turn, shared",
    "multi_turn, independent",
    "hierarchical",
    "shared prompts, skipped rows, ragged, replaced",
    "evaluation, multi_turn",
    "lora, ragged",
    "efficient",
]


def options_of(case: Case, is_greedy: bool = False) -> dict[str, Any]:
    """The options of a short run with vLLM in the process of the trainer."""
    return {
        "per_device_train_batch_size": 16,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.02,
        **case.options,
        **({"top_k": 1} if is_greedy else {}),
    }


def train(name: str, path: str, out: Any, is_greedy: bool = False, **options: Any) -> list[Asked]:
    """Train with a feature, and return what was asked and answered on the way."""
    case = CASES[name]
    given = case.given(path)
    cls = given.pop("cls", Asking)
    data = case.data()
    trainer = cls(
        model=path,
        reward_funcs=case.reward,
        args=AdaptiveGRPOConfig(**config_kwargs(out, **{**options_of(case, is_greedy), **options})),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if "eval_strategy" in case.options else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        if case.has_adapter
        else None,
        **given,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    return trainer.asked


def check(name: str, asked: list[Asked], is_greedy: bool) -> None:
    """No token is wrong; behind other prompts, many are."""
    assert asked
    assert {one.is_training for one in asked} == ({True, False} if "evaluation" in name else {True})
    tokens = sum(one.tokens for one in asked)
    assert tokens > 0
    if is_greedy:
        assert sum(one.not_likeliest for one in asked) == 0
        assert sum(one.control_not_likeliest for one in asked) > tokens / 3
    else:
        assert max(one.gap for one in asked) < CLOSE
        assert sum(one.control_far for one in asked) > tokens / 3


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port


def of_server(port: int) -> dict[str, Any]:
    """The options of a trainer whose vLLM is a server; its weights go through a group of its own."""
    options = {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}
    return {**options, "vllm_server_timeout": 60.0, "vllm_group_port": free_port()}


def train_on_a_process(
    path: str, out: str, names: list[str], server: int | None = None
) -> dict[str, list[list[Asked]]]:
    """Called on each process: a list of what was asked for each feature, of the sampled run and of the greedy one."""
    if server is not None:
        use_gloo()
    found: dict[str, list[list[Asked]]] = {}
    with engine_for_cpu(args_of(use_vllm=True)), one_engine():
        for name in names:
            # A conversation of three turns, four times, lies on one process.
            options = {"per_device_train_batch_size": 12 if "multi_turn" in name else 8}
            found[name] = []
            for is_greedy in (False, True):
                # A port for each trainer: the one before may still hold its own.
                options |= {} if server is None else of_server(server)
                found[name].append(train(name, path, f"{out}/{name}", is_greedy, **options))
    return found
