"""Private names of torch, and small helpers over public ones."""

import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.profiler import record_function

StridedShard = _StridedShard
local_shape_and_offset = _compute_local_shape_and_global_offset


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def this_rank() -> int:
    """Return the global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return the number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def default_store() -> Any:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Create a fake default process group of `world_size` ranks, with this process as rank 0.

    Its collectives return immediately and move nothing. Raises RuntimeError if a default process
    group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process group exists already: plan before init_process_group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return how long a rank waits for others in a gloo group: the timeout of the default group.

    Groups of a DeviceMesh's dims have torch's 30 minutes, not the timeout of init_process_group.
    None if the backend enforces its own timeout, as NCCL's watchdog does.
    """
    if not dist.get_backend(group) == dist.get_backend() == "gloo":
        return None
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    # torch has a public way to set a timeout (2.15), none to read it; torchcomms may wrap gloo
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout


def device_type_of(group: dist.ProcessGroup) -> str:
    """Return the device type of a process group's tensors: "cuda" for NCCL, else "cpu"."""
    has_nccl = "nccl" in str(dist.get_backend_config(group))
    return "cuda" if has_nccl and torch.cuda.is_available() else "cpu"


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of this rank as a plain tensor that shares its storage."""
    # the result of to_local without a graph, in a tenth of the time
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


def has_same_spec(a: DTensor, b: DTensor) -> bool:
    """Whether two DTensors have equal mesh, placements and global shape."""
    return a._spec is b._spec or (
        a.device_mesh == b.device_mesh and a.placements == b.placements and a.shape == b.shape
    )


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Disable autocast, reset the default device, and leave inference mode.

    The results and the state of this package do not depend on any of them.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        for device_type in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def warning_level(tensors: Iterable[Tensor] = ()) -> int:
    """Return the log level of a message that all ranks of some tensors emit.

    WARNING on the first of these ranks, INFO on the others. The first rank is the lowest on the
    meshes of the DTensors (so that each pipeline stage logs), and 0 without DTensors.
    """
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    first = min((int(mesh.mesh.min()) for mesh in meshes), default=0)
    return logging.WARNING if this_rank() == first else logging.INFO


@dataclass(frozen=True, slots=True)
class FSDP2Param:
    """One parameter that `fully_shard` manages in this process.

    `sharded`: the DTensor. `unsharded`: the full tensor, which modules hold in its place between
    all-gather and reshard. `shape`: the shape of the full tensor.
    """

    sharded: Tensor
    unsharded: Tensor | None
    shape: tuple[int, ...]


def fsdp2_params() -> list[FSDP2Param]:
    """Return all parameters that `fully_shard` manages in this process."""
    params = []
    for module in (reference() for reference in _module_state_mapping.keyrefs()):
        state = module is not None and _module_state_mapping[module]()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one
            groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group]
        for param in (param for group in groups for param in group.fsdp_params):
            unsharded = getattr(param, "_unsharded_param", None)
            params.append(FSDP2Param(param.sharded_param, unsharded, tuple(param._orig_size)))
    return params


def gathered_params() -> set[int]:
    """Return the ids of full tensors that FSDP2's modules hold between all-gather and reshard."""
    return {id(param.unsharded) for param in fsdp2_params() if param.unsharded is not None}


def is_flat_param(value: object) -> bool:
    """Whether this is a flat parameter of FSDP1, which has a mark and no class of its own."""
    return type(value) is nn.Parameter and "_is_flat_param" in value.__dict__


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 stores this parameter in a flat one."""
    return hasattr(tensor, "_fsdp_flattened")


@dataclass(frozen=True, slots=True)
class FlattenedParam:
    """A parameter that FSDP1 has flattened.

    `shape`: the shape before flattening. `start`: the offset of this rank's slice in the flattened
    parameter; None without a slice.
    """

    param: Tensor
    shape: tuple[int, ...]
    start: int | None
    is_dtensor: bool


def flattened_params() -> Iterator[FlattenedParam]:
    """Yield all parameters that FSDP1 has flattened.

    Only the flat parameter has their shapes, and they do not refer to it. So this searches all
    objects for flat parameters: 0.1 s.
    """
    for flat in filter(is_flat_param, gc.get_objects()):
        originals = zip(
            *(flat._params or (), flat._shapes, flat._param_extensions, flat._shard_param_infos),
            strict=False,
        )
        for param, shape, extension, info in originals:
            start = info.intra_param_start_idx
            yield FlattenedParam(param, tuple(shape), start, extension is not None)


def are_in_modules(params: Iterable[Tensor]) -> bool:
    """Whether some module of this process holds any of these parameters. Searches all objects."""
    ids = {id(param) for param in params}
    modules = (value for value in gc.get_objects() if isinstance(value, nn.Module))
    return any(id(param) in ids for m in modules for param in m.parameters(recurse=False))


class HostCopy:
    """An asynchronous copy of a small tensor to pinned host memory.

    `tolist` waits only for the copy, not for work queued on the device after it.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._event: torch.Event | None = None
        if values.device.type == "cpu" or is_capturing(values.device):
            return
        self._values = torch.empty_like(values, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.Event(values.device.type)
        self._event.record()

    def tolist(self) -> list[Any]:
        """Return the values as nested lists of numbers."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._values.tolist()
        return numbers


def shares_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors use the same memory, or parts of it."""
    return bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


def is_accelerator(device: torch.device) -> bool:
    """Whether kernels of a device run asynchronously to the host."""
    return device.type not in ("cpu", "meta")


def is_offloaded(shard_device: torch.device, mesh_device: torch.device) -> bool:
    """Whether a shard is on the host of a mesh of devices, as by FSDP2's CPUOffloadPolicy."""
    return shard_device.type == "cpu" and is_accelerator(mesh_device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures the work of this thread on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def profiler_range(name: str) -> AbstractContextManager[object]:
    """Return a named range for torch's profiler; a null context if no profiler is running."""
    is_on = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(name) if is_on else nullcontext()


uncompiled = torch._disable_dynamo  # type: ignore[attr-defined]
"""Exclude a function from torch.compile, without importing the compiler."""


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in pinned host memory; a DTensor stays on its mesh."""
    local = local_part(tensor)
    if local.device.type == "cpu":
        return tensor
    pinned = torch.empty_like(local, device="cpu", pin_memory=True)
    pinned.copy_(local)
    return with_shard(tensor, pinned)


def with_shard(tensor: Tensor, shard: Tensor) -> Tensor:
    """Return `tensor` with another shard of the same shape; for a plain tensor the shard.

    The result has the shard's dtype and device, and does not require a gradient. It does not query
    sharding strategies, unlike torch's operators on DTensors, which take up to 2 s for each new
    shape on a mesh of four dims (torch 2.14). Unlike `DTensor.from_local` it does not move the
    shard, which may be on the host of a GPU's mesh (FSDP2's offload policy).
    """
    if not isinstance(tensor, DTensor):
        return shard
    spec = tensor._spec
    meta = spec.tensor_meta
    assert meta is not None, "a DTensor knows its shape"
    if meta.dtype != shard.dtype:
        spec = replace(spec, tensor_meta=type(meta)(meta.shape, meta.stride, shard.dtype))
    return DTensor(shard, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def zeros_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros with a tensor's placements, in its dtype or another one."""
    return with_shard(tensor, torch.zeros_like(local_part(tensor).detach(), dtype=dtype))


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return `tensor.to(device, dtype)` with the same placements; `tensor` if nothing changes."""
    local = local_part(tensor)
    moved = local.to(device=device or local.device, dtype=dtype)
    return tensor if moved is local else with_shard(tensor, moved)
