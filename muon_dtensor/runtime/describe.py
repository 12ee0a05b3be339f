"""Tensors to values: what a planner may know of a parameter.

The sole reader of torch's private classes, so one file follows torch's releases. Plans nothing.
"""

import gc
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.profiler import record_function

from muon_dtensor.errors import RefusalError, shortened
from muon_dtensor.layout import Layout, Matrix, MeshSpec, ParamSpec
from muon_dtensor.matrices import flattened
from muon_dtensor.patterns import Declaration
from muon_dtensor.planning.normuon_state import moment_cuts


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` is `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def this_rank() -> int:
    """The global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many ranks the default process group has; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def default_store() -> Any:
    """The key-value store by which the ranks of the default process group found each other."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """A default process group of so many ranks, of which this process is rank 0 and the only one.

    Its collectives return at once and move nothing. Raises RuntimeError if there is a default
    process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("there is a process group already; plan before it is made")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def patience_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a rank waits for the others of a gloo group: the timeout of the default group.

    Groups of a DeviceMesh's dims have torch's 30 minutes, whatever init_process_group was told.
    None where the backend sees to it: NCCL's watchdog does.
    """
    if not dist.get_backend(group) == dist.get_backend() == "gloo":
        return None
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    # torch has public ways to set a timeout (2.15), and none to read it; torchcomms may wrap gloo
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout


def device_type_of(group: dist.ProcessGroup) -> str:
    """Where the tensors of a process group live: "cuda" if NCCL moves them, else "cpu"."""
    has_nccl = "nccl" in str(dist.get_backend_config(group))
    return "cuda" if has_nccl and torch.cuda.is_available() else "cpu"


def describe_mesh(mesh: DeviceMesh) -> MeshSpec:
    """A DeviceMesh as values; unnamed dims are called dim0, dim1, ..."""
    names = mesh.mesh_dim_names or tuple(f"dim{index}" for index in range(mesh.ndim))
    return MeshSpec(tuple(names), tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()))


def describe_layout(tensor: DTensor, mesh: MeshSpec) -> Layout:
    """Shape and cuts of a DTensor. Raises RefusalError for placements that tell no shards."""
    placements = tensor.placements
    for name, placement in zip(mesh.dim_names, placements, strict=True):
        if isinstance(placement, Partial):
            whole = [Replicate() if p is placement else p for p in placements]
            raise RefusalError(
                f"A Partial parameter has no value yet on mesh dim '{name}'.",
                f"Reduce it first: param.redistribute(placements={whole}).",
            )
    cuts = tuple(
        tuple(mesh.dim_names[index] for index in _cut_order(placements, mesh.shape, tensor_dim))
        for tensor_dim in range(tensor.ndim)
    )
    return Layout(mesh, tuple(tensor.shape), cuts)


def _cut_order(
    placements: tuple[Placement, ...], mesh_shape: tuple[int, ...], tensor_dim: int
) -> tuple[int, ...]:
    """Mesh dims that cut one tensor dim, outermost cut first.

    A Shard was cut before all mesh dims to its right; a _StridedShard(split_factor=k) after
    those of them, from the outermost on, whose sizes multiply to k.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, _StridedShard):
            factor = placement.split_factor
        elif isinstance(placement, Shard):
            factor = 1
        elif isinstance(placement, Replicate):
            continue
        else:
            raise RefusalError(
                f"The placement {placement} is not known.",
                "Use Shard and Replicate, or what parallelize_module and fully_shard make of them.",
            )
        if placement.dim != tensor_dim:
            continue
        for place in range(len(order) + 1):
            if prod(mesh_shape[other] for other in order[:place]) == factor:
                order.insert(place, mesh_dim)
                break
        else:
            raise RefusalError(
                f"The placements {placements} tell no order of cuts on tensor dim {tensor_dim}.",
                "Shard with parallelize_module first and fully_shard second.",
            )
    return tuple(order)


def _is_flat(value: object) -> bool:
    """Whether this is a flat parameter of FSDP1, which marks them and gives them no class."""
    return type(value) is nn.Parameter and "_is_flat_param" in value.__dict__


class FlatSlices:
    """Which tensors are slices of FSDP1's flat parameters, and of which whole tensors.

    FSDP1 (`FullyShardedDataParallel`) marks the parameters it has flattened, and keeps their
    shapes in the flat parameter alone, which no parameter leads to. So all objects are searched
    for flat parameters, once, if any parameter is marked: 0.1 s.
    """

    def __init__(
        self,
        shapes: dict[int, tuple[int, ...]],
        starts: dict[int, int | None],
        refused: dict[int, RefusalError],
    ) -> None:
        self._shapes, self._starts, self._refused = shapes, starts, refused

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "FlatSlices":
        """Of those among the tensors that FSDP1 has flattened."""
        shapes: dict[int, tuple[int, ...]] = {}
        starts: dict[int, int | None] = {}
        refused: dict[int, RefusalError] = {}
        wanted: set[int] = set()
        for tensor in tensors:
            if _is_flat(tensor):
                refused[id(tensor)] = RefusalError(
                    "It is a flat parameter of FSDP1, which mixes many parameters in one.",
                    "Construct FullyShardedDataParallel with use_orig_params=True.",
                )
            elif hasattr(tensor, "_fsdp_flattened"):
                wanted.add(id(tensor))
        flats = filter(_is_flat, gc.get_objects()) if wanted else ()
        for flat in flats:
            originals = zip(
                *(flat._params or (), flat._shapes, flat._param_extensions),
                flat._shard_param_infos,
                strict=False,
            )
            for param, shape, extension, info in originals:
                starts[id(param)] = info.intra_param_start_idx
                if id(param) in wanted and extension is not None:
                    refused[id(param)] = RefusalError(
                        "It is a DTensor that FSDP1 has flattened.",
                        "Use fully_shard (FSDP2) together with tensor parallelism.",
                    )
                elif id(param) in wanted:
                    shapes[id(param)] = tuple(shape)
        for index in wanted - shapes.keys() - refused.keys():
            refused[index] = RefusalError(
                "FSDP1 has flattened it, and its flat parameter is not to be found.",
                "Construct the optimizer before gc.freeze(), or use fully_shard (FSDP2).",
            )
        return cls(shapes, starts, refused)

    def shape_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of the whole tensor; None for a tensor that is no slice."""
        return self._shapes.get(id(tensor))

    def start_of(self, tensor: Tensor) -> int | None:
        """Where this rank's slice begins in the whole tensor; None if it has none of it."""
        return self._starts.get(id(tensor))

    def refusal_of(self, tensor: Tensor) -> RefusalError | None:
        """Why this tensor cannot be described; None if it can."""
        return self._refused.get(id(tensor))


class Describer:
    """Describes parameters, equal meshes and layouts as one and the same object."""

    def __init__(self, plain_mesh: DeviceMesh | None = None) -> None:
        """`plain_mesh`: where tensors that are no DTensors lie; None: on each rank alone."""
        self.device_meshes: dict[MeshSpec, DeviceMesh] = {}
        self._meshes: dict[DeviceMesh, MeshSpec] = {}
        alone = MeshSpec((), (), (this_rank(),))
        self.plain_mesh = alone if plain_mesh is None else self.mesh(plain_mesh)
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._known_matrices: dict[object, tuple[Matrix, ...]] = {}
        self._misplaced: dict[object, bool] = {}
        self._shard_shapes: dict[object, tuple[int, ...]] = {}
        self._sub_meshes: dict[MeshSpec, tuple[str, ...] | None] = {}

    def mesh(self, mesh: DeviceMesh) -> MeshSpec:
        """`describe_mesh`, remembered, so that `device_meshes` leads back."""
        spec = self._meshes.get(mesh)
        if spec is None:
            spec = describe_mesh(mesh)
            known = next((old for old in self.device_meshes if old == spec), None)
            spec = known if known is not None else spec
            self._meshes[mesh] = spec
            self.device_meshes.setdefault(spec, mesh)
        return spec

    def home(self, tensor: Tensor) -> MeshSpec:
        """The mesh a parameter lives on; without dims where that is this rank alone.

        A DTensor on a sub-mesh of the mesh of plain tensors lives on all of that, replicated over
        its other dims: tensor parallelism under DDP or context parallelism.
        """
        if not isinstance(tensor, DTensor):
            return self.plain_mesh
        mesh = self.mesh(tensor.device_mesh)
        return mesh if self._names_on_plain(mesh) is None else self.plain_mesh

    def _names_on_plain(self, mesh: MeshSpec) -> tuple[str, ...] | None:
        if mesh not in self._sub_meshes:
            self._sub_meshes[mesh] = mesh.names_on(self.plain_mesh, this_rank())
        return self._sub_meshes[mesh]

    def layout(self, tensor: DTensor) -> Layout:
        """The layout of a DTensor. Raises RefusalError where it has none."""
        mesh = self.mesh(tensor.device_mesh)
        layout = describe_layout(tensor, mesh)
        if names := self._names_on_plain(mesh):
            called = dict(zip(mesh.dim_names, names, strict=True))
            cuts = tuple(tuple(called[name] for name in dims) for dims in layout.cuts)
            layout = Layout(self.plain_mesh, layout.shape, cuts)
        return self.shared(layout)

    def shared(self, layout: Layout) -> Layout:
        """An equal layout, one object for all parameters that have it."""
        key = (layout.mesh, layout.shape, layout.cuts, layout.bounds)
        return self._layouts.setdefault(key, layout)

    def expected_shape(self, tensor: DTensor) -> tuple[int, ...] | None:
        """The local shape that global shape and placements give this rank; None for Partial."""
        mesh = self.mesh(tensor.device_mesh)
        try:
            layout = describe_layout(tensor, mesh)
        except RefusalError:
            return None
        if not mesh.holds(this_rank()):
            return None
        key = (mesh, layout.shape, layout.cuts)
        if key not in self._shard_shapes:
            self._shard_shapes[key] = layout.region(mesh.position_of(this_rank())).shape
        return self._shard_shapes[key]

    def is_misplaced(self, tensor: DTensor) -> bool:
        """Whether torch says of some rank's shard that it lies where it does not.

        Asked of its own arithmetic of offsets, which distributed checkpoints rely on, at every
        coordinate along the mesh dims that cut a tensor dim more than once.
        """
        mesh = self.mesh(tensor.device_mesh)
        layout = describe_layout(tensor, mesh)
        key = (layout.mesh.shape, layout.shape, layout.cuts)
        if key not in self._misplaced:
            self._misplaced[key] = any(
                _is_misplaced(layout, tensor, tensor_dim, dims)
                for tensor_dim, dims in enumerate(layout.cuts)
                if len(dims) > 1
            )
        return self._misplaced[key]

    def _matrices(
        self, declaration: Declaration, shape: tuple[int, ...], flat: tuple[int, ...] | None
    ) -> tuple[Matrix, ...]:
        key = (declaration, shape, flat)
        if key not in self._known_matrices:
            whole = shape if flat is None else flat
            matrices = declaration.matrices(whole)
            if flat is not None:
                matrices = tuple(flattened(matrix, flat) for matrix in matrices)
            self._known_matrices[key] = matrices
        return self._known_matrices[key]

    def param(
        self,
        fqn: str,
        tensor: Tensor,
        layout: Layout,
        declaration: Declaration,
        *,
        flat_shape: tuple[int, ...] | None,
        num_iterations: int,
        wire_dtype: torch.dtype,
        has_moments: bool = False,
    ) -> ParamSpec:
        """One parameter of Muon. Raises RefusalError if it cannot be one.

        Args:
            layout: of the tensor.
            flat_shape: the global shape of a tensor that is stored flat.
            has_moments: NorMuon's, which only a DTensor can hold a part of.
        """
        if not isinstance(tensor, DTensor) and not layout.cut_dims:
            _must_be_annotated_whole(tensor, declaration)
        matrices = self._matrices(declaration, layout.shape, flat_shape)
        moments: tuple[str, ...] | None = None
        if has_moments:
            own = isinstance(tensor, DTensor) and self.mesh(tensor.device_mesh) == layout.mesh
            moments = moment_cuts(layout, matrices) if own else ()
        return ParamSpec(
            fqn,
            layout,
            dtype_name(tensor.dtype),
            matrices,
            num_iterations,
            dtype_name(wire_dtype),
            moments,
        )


def _is_misplaced(
    layout: Layout, tensor: DTensor, tensor_dim: int, mesh_dims: tuple[str, ...]
) -> bool:
    mesh = layout.mesh
    for index in range(mesh.num_ranks_along(mesh_dims)):
        position = mesh.offset_of(index, mesh_dims)
        coordinate = [mesh.index_along(position, (name,)) for name in mesh.dim_names]
        sizes, offsets = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, coordinate, tensor.placements
        )
        region = layout.region(position)
        start, stop = region.start[tensor_dim], region.stop[tensor_dim]
        size, offset = sizes[tensor_dim], offsets[tensor_dim]
        if size != stop - start or (size and offset != start):
            return True
    return False


def can_place_shards() -> bool:
    """Whether a tensor may tell torch's distributed checkpoints where it lies (torch 2.14)."""
    import torch.distributed.checkpoint as dcp  # half a second that few need

    return hasattr(dcp, "CheckpointableTensor")


def misplaced_shards(names: Sequence[str]) -> str:
    """What to say of parameters that torch's distributed checkpoints would misplace."""
    remedy = (
        "Save and load inside muon_dtensor.checkpointable(state_dict)"
        if can_place_shards()
        else "Save a full state dict, get_optimizer_state_dict(..., "
        "options=StateDictOptions(full_state_dict=True)), and load it with "
        "muon_dtensor.load_full_state_dict; use torch 2.14 and muon_dtensor.checkpointable"
    )
    return (
        f"torch.distributed.checkpoint takes shards of {len(names)} tensors for others "
        f"({shortened(names)}): two mesh dims cut a tensor dim that they do not divide. "
        f"{remedy}; or choose sizes that divide."
    )


def _must_be_annotated_whole(tensor: Tensor, declaration: Declaration) -> None:
    """Raise RefusalError for a plain tensor that `spmd_types` annotates as a part of a matrix.

    torchtitan's backend of that name annotates plain tensors with how they are cut, and fully_shard
    makes DTensors of them (torch 2.15). Those that nobody shards further stay plain. Whole matrices
    of a batch, such as experts cut on tensor dim 0, are whole.
    """
    spmd = sys.modules.get("spmd_types")
    if spmd is None or not spmd.has_local_type(tensor):
        return
    types = spmd.get_local_type(tensor)
    differing = {axis for axis, kind in types.items() if axis.size() > 1 and kind is spmd.V}
    spec = spmd.get_partition_spec(tensor) or ()
    num_batch_dims = max(0, tensor.ndim - 2) if declaration == Declaration() else 0
    for entry in spec[:num_batch_dims]:
        differing -= set(entry if isinstance(entry, tuple) else (entry,))
    if differing:
        raise RefusalError(
            f"spmd_types says that ranks hold different parts of it: {types}, {spec or 'V'}.",
            "Shard it with fully_shard or parallelize_module, which make DTensors, or say which "
            "tensor dim is cut: create_processgroup_config(tp_pg=..., tp_shard_dim={name: dim}).",
        )


def placed(tensor: Tensor) -> str:
    """Shape, placements and mesh of a tensor in words."""
    where = ""
    if isinstance(tensor, DTensor):
        placements = ", ".join(map(repr, tensor.placements))
        where = f" ({placements}) on {describe_mesh(tensor.device_mesh)}"
    return f"{list(tensor.shape)}{where}"


def local_part(tensor: Tensor) -> Tensor:
    """The shard this rank stores, as a plain tensor sharing its storage."""
    # what to_local gives without a graph, at a tenth of its time
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Disable autocast, reset the default device, and leave inference mode.

    What this package computes, and the state it keeps, depend on none of them.
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
    """Log level of a message that all ranks of some tensors emit.

    WARNING on the first of these ranks, INFO on the others. The first rank is the lowest on the
    meshes of the DTensors (so that a pipeline stage is heard), and 0 where there is none.
    """
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    first = min((int(mesh.mesh.min()) for mesh in meshes), default=0)
    return logging.WARNING if this_rank() == first else logging.INFO


@dataclass(frozen=True, slots=True)
class FSDP2Param:
    """One parameter that `fully_shard` manages in this process.

    `sharded` is the DTensor; `unsharded` the whole tensor between all-gather and reshard, which
    modules hold in its place meanwhile; `shape` that of the whole tensor.
    """

    sharded: Tensor
    unsharded: Tensor | None
    shape: tuple[int, ...]


def fsdp2_params() -> list[FSDP2Param]:
    """All parameters that `fully_shard` manages in this process."""
    found = []
    for module in (reference() for reference in _module_state_mapping.keyrefs()):
        state = module is not None and _module_state_mapping[module]()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one
            groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group]
        for param in (param for group in groups for param in group.fsdp_params):
            unsharded = getattr(param, "_unsharded_param", None)
            found.append(FSDP2Param(param.sharded_param, unsharded, tuple(param._orig_size)))
    return found


def gathered_params() -> set[int]:
    """Ids of the whole tensors that FSDP2's modules hold between all-gather and reshard."""
    return {id(param.unsharded) for param in fsdp2_params() if param.unsharded is not None}


def are_in_modules(params: Iterable[Tensor]) -> bool:
    """Whether some module of this process holds any of these parameters. Searches all objects."""
    wanted = {id(param) for param in params}
    modules = (found for found in gc.get_objects() if isinstance(found, nn.Module))
    return any(id(param) in wanted for m in modules for param in m.parameters(recurse=False))


class HostCopy:
    """An asynchronous copy of a small tensor to pinned host memory.

    `tolist` waits for the copy alone, not for what was queued on the device after it.
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
        """The values as nested lists of numbers."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._values.tolist()
        return numbers


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what this thread does on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def range_of(name: str) -> AbstractContextManager[object]:
    """A named range for torch's profiler; nothing, and in no time, where none is running."""
    is_on = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(name) if is_on else nullcontext()


uncompiled = torch._disable_dynamo  # type: ignore[attr-defined]
"""Of a function that torch.compile leaves as it is; decides so without importing the compiler."""


def on_host(tensor: Tensor) -> Tensor:
    """The same values in host memory that a GPU can copy from; a DTensor stays on its mesh."""
    local = local_part(tensor)
    if local.device.type == "cpu":
        return tensor
    pinned = torch.empty_like(local, device="cpu", pin_memory=True)
    pinned.copy_(local)
    return with_shard(tensor, pinned)


def with_shard(tensor: Tensor, shard: Tensor) -> Tensor:
    """Another shard of the same shape in place of this rank's; of a plain tensor the shard itself.

    The result has the shard's dtype and device, and does not require a gradient. Unlike torch's own
    operators on DTensors, which take up to 2 s for each new shape on a mesh of four dims (torch
    2.14), it asks no sharding strategy; and unlike `DTensor.from_local` it leaves a shard where it
    is, also on the host of a GPU's mesh (FSDP2's offload policy).
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
    """Zeros placed as a tensor is, of its dtype or another one."""
    return with_shard(tensor, torch.zeros_like(local_part(tensor).detach(), dtype=dtype))


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """`tensor.to(device, dtype)`, placed as before; the tensor itself if it is so already."""
    local = local_part(tensor)
    moved = local.to(device=device or local.device, dtype=dtype)
    return tensor if moved is local else with_shard(tensor, moved)
