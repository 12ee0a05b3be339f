"""Describes DTensors and their meshes as layouts."""

import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from muon_dtensor.errors import RefusalError, shortened
from muon_dtensor.layout import Layout, Matrix, MeshSpec
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.layout.matrices import flattened
from muon_dtensor.planning.normuon_state import moment_cuts
from muon_dtensor.planning.plan import ParamSpec
from muon_dtensor.runtime.torch_private import (
    StridedShard,
    dtype_name,
    local_shape_and_offset,
    this_rank,
)


def describe_mesh(mesh: DeviceMesh) -> MeshSpec:
    """Return a DeviceMesh as values; unnamed dims are called dim0, dim1, ..."""
    names = mesh.mesh_dim_names or tuple(f"dim{index}" for index in range(mesh.ndim))
    return MeshSpec(tuple(names), tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()))


def describe_layout(tensor: DTensor, mesh: MeshSpec) -> Layout:
    """Return shape and cuts of a DTensor. Raises RefusalError for placements without cuts."""
    placements = tensor.placements
    for name, placement in zip(mesh.dim_names, placements, strict=True):
        if isinstance(placement, Partial):
            reduced = [Replicate() if p is placement else p for p in placements]
            raise RefusalError(
                f"A Partial parameter has no value yet on mesh dim '{name}'.",
                f"Reduce it first: param.redistribute(placements={reduced}).",
            )
    cuts = tuple(
        tuple(mesh.dim_names[index] for index in _cut_order(placements, mesh.shape, tensor_dim))
        for tensor_dim in range(tensor.ndim)
    )
    return Layout(mesh, tuple(tensor.shape), cuts)


def _cut_order(
    placements: tuple[Placement, ...], mesh_shape: tuple[int, ...], tensor_dim: int
) -> tuple[int, ...]:
    """Return the mesh dims that cut one tensor dim, outermost first.

    A Shard is cut before all mesh dims to its right. A StridedShard(split_factor=k) is cut after
    the outermost of these whose sizes multiply to k.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, StridedShard):
            factor = placement.split_factor
        elif isinstance(placement, Shard):
            factor = 1
        elif isinstance(placement, Replicate):
            continue
        else:
            raise RefusalError(
                f"The placement {placement} is not supported.",
                "Use Shard and Replicate, or the placements of parallelize_module and fully_shard.",
            )
        if placement.dim != tensor_dim:
            continue
        for place in range(len(order) + 1):
            if prod(mesh_shape[other] for other in order[:place]) == factor:
                order.insert(place, mesh_dim)
                break
        else:
            raise RefusalError(
                f"The placements {placements} define no order of cuts on tensor dim {tensor_dim}.",
                "Shard with parallelize_module first and fully_shard second.",
            )
    return tuple(order)


def placements_of(layout: Layout) -> tuple[Placement, ...]:
    """Inverse of `describe_layout`: the placements of a layout without bounds on its own mesh."""
    names, sizes = layout.mesh.dim_names, layout.mesh.sizes
    placements: list[Placement] = [Replicate() for _ in names]
    for tensor_dim, dims in enumerate(layout.cuts):
        for order, name in enumerate(dims):
            index = names.index(name)
            factor = prod(sizes[d] for d in dims[:order] if names.index(d) > index)
            strided = StridedShard(tensor_dim, split_factor=factor)
            placements[index] = Shard(tensor_dim) if factor == 1 else strided
    return tuple(placements)


def from_shard(
    shard: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """Return the row-major DTensor of this global shape with this rank's shard; no collective."""
    tensor: DTensor = DTensor.from_local(
        shard,
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    return tensor


class LayoutCache:
    """Describes parameters and caches the results; equal meshes and layouts are one object."""

    def __init__(self, plain_mesh: DeviceMesh | None = None) -> None:
        """`plain_mesh`: the mesh of tensors that are not DTensors; None: local to each rank."""
        self.device_meshes: dict[MeshSpec, DeviceMesh] = {}
        self._meshes: dict[DeviceMesh, MeshSpec] = {}
        single_rank = MeshSpec((), (), (this_rank(),))
        self.plain_mesh = single_rank if plain_mesh is None else self.mesh(plain_mesh)
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._matrices_by_shape: dict[object, tuple[Matrix, ...]] = {}
        self._misplaced: dict[object, bool] = {}
        self._shard_shapes: dict[object, tuple[int, ...]] = {}
        self._sub_meshes: dict[MeshSpec, tuple[str, ...] | None] = {}

    def mesh(self, mesh: DeviceMesh) -> MeshSpec:
        """Return `describe_mesh` of this mesh, cached; `device_meshes` is the inverse."""
        spec = self._meshes.get(mesh)
        if spec is None:
            spec = describe_mesh(mesh)
            equal = next((old for old in self.device_meshes if old == spec), None)
            spec = equal if equal is not None else spec
            self._meshes[mesh] = spec
            self.device_meshes.setdefault(spec, mesh)
        return spec

    def effective_mesh(self, tensor: Tensor) -> MeshSpec:
        """Return the mesh of a parameter; without dims if it is local to this rank.

        For a DTensor on a sub-mesh of the mesh of plain tensors this is the latter: the DTensor is
        replicated over the other dims (tensor parallelism under DDP or context parallelism).
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
        """Return the layout of a DTensor. Raises RefusalError if it has none."""
        mesh = self.mesh(tensor.device_mesh)
        layout = describe_layout(tensor, mesh)
        if names := self._names_on_plain(mesh):
            renamed = dict(zip(mesh.dim_names, names, strict=True))
            cuts = tuple(tuple(renamed[name] for name in dims) for dims in layout.cuts)
            layout = Layout(self.plain_mesh, layout.shape, cuts)
        return self.shared(layout)

    def shared(self, layout: Layout) -> Layout:
        """Return an equal layout, one object for all parameters that have it."""
        key = (layout.mesh, layout.shape, layout.cuts, layout.bounds)
        return self._layouts.setdefault(key, layout)

    def expected_shape(self, tensor: DTensor) -> tuple[int, ...] | None:
        """Return this rank's local shape by global shape and placements; None for Partial."""
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
        """Whether torch computes a wrong offset or size for the shard of some rank.

        Checks torch's own arithmetic of offsets, which distributed checkpoints rely on, at every
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
        if key not in self._matrices_by_shape:
            global_shape = shape if flat is None else flat
            matrices = declaration.matrices(global_shape)
            if flat is not None:
                matrices = tuple(flattened(matrix, flat) for matrix in matrices)
            self._matrices_by_shape[key] = matrices
        return self._matrices_by_shape[key]

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
        can_distribute: bool = True,
        shards_momentum: bool = False,
        is_offloaded: bool = False,
    ) -> ParamSpec:
        """Return the spec of a parameter of Muon. Raises RefusalError if Muon cannot step it.

        Args:
            layout: of the tensor.
            flat_shape: the global shape of a tensor that is stored flat; None for others.
            has_moments: whether NorMuon steps it. Only a DTensor can hold a part of the moments.
            can_distribute, shards_momentum, is_offloaded: see `ParamSpec`. The momentum of a plain
                tensor that is cut over ranks is not a DTensor, and stays whole.
        """
        if not isinstance(tensor, DTensor) and not layout.cut_dims:
            _check_annotations(tensor, declaration)
        matrices = self._matrices(declaration, layout.shape, flat_shape)
        moments: tuple[str, ...] | None = None
        if has_moments:
            on_layout_mesh = (
                isinstance(tensor, DTensor) and self.mesh(tensor.device_mesh) == layout.mesh
            )
            moments = moment_cuts(layout, matrices) if on_layout_mesh else ()
        return ParamSpec(
            fqn,
            layout,
            dtype_name(tensor.dtype),
            matrices,
            num_iterations,
            dtype_name(wire_dtype),
            moments,
            can_distribute and not has_moments,
            shards_momentum and (isinstance(tensor, DTensor) or not layout.cut_dims),
            is_offloaded,
        )


def _is_misplaced(
    layout: Layout, tensor: DTensor, tensor_dim: int, mesh_dims: tuple[str, ...]
) -> bool:
    mesh = layout.mesh
    for index in range(mesh.num_ranks_along(mesh_dims)):
        position = mesh.offset_of(index, mesh_dims)
        coordinate = [mesh.index_along(position, (name,)) for name in mesh.dim_names]
        sizes, offsets = local_shape_and_offset(
            tensor.shape, mesh.shape, coordinate, tensor.placements
        )
        region = layout.region(position)
        start, stop = region.start[tensor_dim], region.stop[tensor_dim]
        size, offset = sizes[tensor_dim], offsets[tensor_dim]
        if size != stop - start or (size and offset != start):
            return True
    return False


def can_place_shards() -> bool:
    """Whether a tensor can pass its offsets to torch's distributed checkpoints (torch 2.14)."""
    import torch.distributed.checkpoint as dcp  # takes half a second, rarely needed

    return hasattr(dcp, "CheckpointableTensor")


def misplaced_shards(names: Sequence[str]) -> str:
    """Return the message about tensors that torch's distributed checkpoints would misplace."""
    return (
        f"torch.distributed.checkpoint takes shards of {len(names)} weights for others "
        f"({shortened(names)}): two mesh dims cut a tensor dim that they do not divide evenly. "
        "Save and load the model's state dict inside muon_dtensor.checkpointable(state_dict), or "
        "choose sizes that they divide. The optimizer's state is saved correctly."
    )


def placed(tensor: Tensor) -> str:
    """Return shape, placements and mesh of a tensor as text."""
    where = ""
    if isinstance(tensor, DTensor):
        placements = ", ".join(map(repr, tensor.placements))
        where = f" ({placements}) on {describe_mesh(tensor.device_mesh)}"
    return f"{list(tensor.shape)}{where}"


def _check_annotations(tensor: Tensor, declaration: Declaration) -> None:
    """Raise RefusalError for a plain tensor that `spmd_types` annotates as a part of a matrix.

    torchtitan's backend of that name annotates plain tensors with their cuts, and fully_shard
    converts them to DTensors (torch 2.15). Tensors that are not sharded further stay plain. Cuts
    along batch dims, such as experts on tensor dim 0, leave matrices whole.
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
            "Shard it with fully_shard or parallelize_module, which make DTensors, or name the "
            "tensor dim: create_processgroup_config(tp_pg=..., tp_shard_dim={name: dim}).",
        )
