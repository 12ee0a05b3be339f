"""Training runs that form islands: DiLoCo over torchft, and compressed gradients of replicas."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

from muon_dtensor import Muon
from muon_dtensor.islands import DiLoCo, TorchFT, sync_gradients
from muon_dtensor.train.job import IslandsSection


class Membership:
    """The membership of this job, one island, in a run of several; see `islands.DiLoCo`.

    A collective of the ranks of this island; it waits until other islands have joined, at the end
    of the first `sync_every` steps.

    Args:
        section: of the config.
        optimizer: of this island.

    Raises ValueError if torchft is not installed.
    """

    def __init__(self, section: IslandsSection, optimizer: Muon) -> None:
        try:
            import torchft
        except ImportError as error:
            raise ValueError(
                "islands needs torchft: pip install 'muon_dtensor[torchft]'"
            ) from error
        if not dist.is_initialized():  # torchft's Manager needs the store of a job
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
            os.environ["MASTER_PORT"] = str(store.port)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        timeout = timedelta(seconds=section.timeout_seconds)
        group = torchft.ProcessGroupGloo(timeout=timeout)
        self._manager = torchft.Manager(
            pg=group,
            load_state_dict=None,
            state_dict=None,
            min_replica_size=1,
            use_async_quorum=False,
            timeout=timeout,
            quorum_timeout=2 * timeout,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            store_addr=os.environ["MASTER_ADDR"],
            store_port=int(os.environ["MASTER_PORT"]),
            lighthouse_addr=section.lighthouse,
            replica_id=f"island{section.index}",
        )
        self.outer = DiLoCo(
            optimizer,
            TorchFT(self._manager, group, section.count, min_islands=section.min_islands),
            sync_every=section.sync_every,
            lr=section.lr,
            momentum=section.momentum,
            wire=section.wire,
        )

    def state(self) -> dict[str, Any]:
        """Return the outer state for a checkpoint; what wires lost (error feedback) is not kept."""
        state = self.outer.state_dict()
        return {"base": state["base"], "velocity": state["velocity"]} | {
            "counters": state["counters"],
            "in_flight": {},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the outer state to the result of `state`."""
        self.outer.load_state_dict(state)

    def leave(self) -> None:
        """Stop taking part in rounds; the other islands go on."""
        self._manager.shutdown(wait=False)


class _Meshes:
    """The meshes that transformers asks for when it shards a model."""

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def get_mesh(self, dims: Any) -> Any:
        """Return the mesh of FSDP, the only one."""
        return self._mesh


def compress_gradients(model: Any, sizes: Mapping[str, int], wire: str) -> nn.Module:
    """Return a model with FSDP2 inside each replica, and gradients on a wire between replicas.

    Args:
        model: of transformers, not sharded.
        sizes: of the mesh dims; `dp_replicate` and `dp_shard` are used.
        wire: see `islands.sync_gradients`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (sizes["dp_replicate"], sizes["dp_shard"])
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    model.config.distributed_config = DistributedConfig(fsdp_size=sizes["dp_shard"])
    plan = dict(model.fsdp_plan)
    layers = {
        name: style
        for pattern, style in plan.items()
        for name, _ in model.named_modules()
        if _matches(name, pattern)
    }
    result: nn.Module = apply_fully_sharded_data_parallelism(
        model.to(device), _Meshes(mesh["dp_shard"]), layers, {}
    )
    model._is_distributed_loading_by_transformers = True
    sync_gradients(result, mesh["dp_replicate"], wire=wire)
    return result


def _matches(name: str, pattern: str) -> bool:
    """Return whether a module's name fits a pattern of transformers' plans: * is a number."""
    words, parts = name.split("."), pattern.split(".")
    return len(words) == len(parts) and all(
        part == word or (part == "*" and word.isdecimal())
        for word, part in zip(words, parts, strict=True)
    )
