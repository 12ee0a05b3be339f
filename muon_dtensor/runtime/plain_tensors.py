"""Layouts of tensors that are not DTensors: replicated or cut on the mesh of a config.

Ranks exchange the sizes of their shards once.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from muon_dtensor.errors import PlanMismatchError, RefusalError
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.from_shards import flat_layout_from_shards, layout_from_shards
from muon_dtensor.layout.matrices import TO_ADAMW
from muon_dtensor.runtime.collectives import gather_from_mesh
from muon_dtensor.runtime.dtensors import LayoutCache
from muon_dtensor.runtime.fsdp1 import FlatSlices
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import this_rank

TensorDim = int | None | Mapping[str, int | None] | Sequence[int | None]
"""The tensor dim that a process group cuts: one for all parameters, by name, or per parameter.

None for a parameter: it is replicated. None for all parameters: not specified.
"""


@dataclass(frozen=True)
class PlainLayoutRule:
    """How plain tensors are cut. `cuts`: mesh dims and the tensor dims they cut, outermost first.

    All other mesh dims replicate them; a mesh dim of one rank cuts nothing. The only mesh dim in
    `cuts` cuts slices of FSDP1's flat parameters, whatever its tensor dim.
    """

    mesh: DeviceMesh
    cuts: tuple[tuple[str, TensorDim], ...] = ()

    @property
    def nontrivial_cuts(self) -> tuple[tuple[str, TensorDim], ...]:
        """The cuts over more than one rank."""
        sizes = dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=False))
        return tuple((name, dims) for name, dims in self.cuts if sizes[name] > 1)

    def cuts_of(self, name: str, index: int, ndim: int) -> tuple[tuple[str, ...], ...]:
        """Return the mesh dims that cut each tensor dim of a parameter. Raises RefusalError."""
        return _cuts({n: _choose(dims, n, name, index) for n, dims in self.nontrivial_cuts}, ndim)

    def cuts_of_unnamed(self, ndim: int) -> tuple[tuple[str, ...], ...]:
        """Return `cuts_of` a tensor without name. Raises RefusalError for a rule by parameter."""
        for mesh_dim, dims in self.nontrivial_cuts:
            if isinstance(dims, (Mapping, Sequence)):
                raise RefusalError(
                    f"{_keyword(mesh_dim)} was given for each parameter, and a tensor that is "
                    "passed to gather_fn or redistribute_fn has no name.",
                    "Create a config with one tensor dim, that of this tensor.",
                )
        return self.cuts_of("", 0, ndim)

    def is_for_all(self) -> bool:
        """Whether some cut has one tensor dim for all plain tensors."""
        return any(not isinstance(dims, (Mapping, Sequence)) for _, dims in self.nontrivial_cuts)


def _cuts(chosen: Mapping[str, int | None], ndim: int) -> tuple[tuple[str, ...], ...]:
    cuts: list[list[str]] = [[] for _ in range(ndim)]
    for mesh_dim, tensor_dim in chosen.items():
        if tensor_dim is None:
            continue
        if not -ndim <= tensor_dim < ndim:
            raise RefusalError(
                f"It has {ndim} tensor dims, and '{mesh_dim}' cuts dim {tensor_dim} by the config.",
                f"Give {_keyword(mesh_dim)} by name: {{name: dim, or None if replicated}}.",
            )
        cuts[tensor_dim].append(mesh_dim)
    return tuple(map(tuple, cuts))


def _keyword(mesh_dim: str) -> str:
    return "tp_shard_dim" if mesh_dim.startswith("tp") else "fsdp_shard_dim"


def _choose(tensor_dims: TensorDim, mesh_dim: str, name: str, index: int) -> int | None:
    match tensor_dims:
        case None:
            raise RefusalError(
                f"The config does not say which tensor dim the process group '{mesh_dim}' cuts.",
                f"Give {_keyword(mesh_dim)}, a tensor dim or {{name: dim}}.",
            )
        case int():
            return tensor_dims
        case Mapping() if name in tensor_dims:
            return tensor_dims[name]
        case Mapping():
            raise RefusalError(
                f"Tensor dims were given for {', '.join(tensor_dims) or 'no parameter'}.",
                f"Name it too: {{'{name}': dim, or None if replicated}}.",
            )
    if index >= len(tensor_dims):
        raise RefusalError(
            f"It is parameter {index}, and tensor dims were given for {len(tensor_dims)}.",
            "Give one for each parameter, in the order of the optimizer.",
        )
    return tensor_dims[index]


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a rank sends to the others about one parameter.

    For a slice of a flat parameter, `full_shape` and `start` are its parameter's shape and the
    offset of the slice in it.
    """

    name: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...] | None
    start: int | None


@dataclass(frozen=True, slots=True)
class _PlainLayout:
    """The layout of one tensor.

    `flat`: the full shape, if it is stored flat. `by_common_rule`: whether the layout follows a
    rule for all plain tensors. `sometimes_empty`: whether some rank holds no element of it.
    """

    layout: Layout | RefusalError
    flat: tuple[int, ...] | None = None
    by_common_rule: bool = False
    sometimes_empty: bool = False


class PlainTensors:
    """Layouts of plain tensors, as the config defines them; local to each rank without a config.

    References to tensors are weak, so that a parameter that was replaced (by FSDP2) can be freed.
    """

    def __init__(self, rule: PlainLayoutRule | None) -> None:
        self.rule = rule
        self._layouts: MutableMapping[Tensor, _PlainLayout] = WeakTensorKeyDictionary()
        self._is_mixed = False

    def resolve(
        self, params: Sequence[tuple[str, Tensor]], layout_cache: LayoutCache, *, exchange: bool
    ) -> None:
        """Determine the layouts of new parameters; a collective if the config cuts any.

        Args:
            params: names and tensors of all parameters, also DTensors: a rule may count them.
            layout_cache: describes meshes.
            exchange: whether to take part in the collective even if nothing is new on this rank.

        Raises:
            PlanMismatchError: ranks hold different parameters. On every rank.
            ValueError: the rule has more tensor dims than there are parameters.
        """
        slices = FlatSlices.of([tensor for _, tensor in params])
        self._is_mixed = any(
            isinstance(t, DTensor) or slices.shape_of(t) is not None for _, t in params
        )
        new = [
            (index, name, tensor)
            for index, (name, tensor) in enumerate(params)
            if not isinstance(tensor, DTensor) and tensor not in self._layouts
        ]
        if self.rule is None or not self.rule.nontrivial_cuts:
            for _, _, tensor in new:
                layout = _replicated(tensor, slices, layout_cache)
                self._layouts[tensor] = _PlainLayout(layout)
            return
        for mesh_dim, dims in self.rule.nontrivial_cuts:
            if isinstance(dims, Sequence) and len(dims) > len(params):
                raise ValueError(
                    f"{_keyword(mesh_dim)} has {len(dims)} tensor dims for {len(params)} "
                    "parameters."
                )
        if not (new or exchange):
            return
        mesh, rank = layout_cache.mesh(self.rule.mesh), this_rank()
        local_shards = [
            _Shard(name, tuple(t.shape), slices.shape_of(t), slices.start_of(t))
            for _, name, t in new
        ]
        groups = Groups(layout_cache.device_meshes, rank).along_each_dim(mesh)
        table = gather_from_mesh(local_shards, groups, rank)
        _check_names(mesh, table)
        for number, (index, name, tensor) in enumerate(new):
            shards = {mesh.position_of(other): sent[number] for other, sent in table.items()}
            try:
                if refusal := slices.refusal_of(tensor):
                    raise refusal
                plain = self._from_shards(mesh, tensor, shards, (name, index))
            except RefusalError as error:
                plain = _PlainLayout(error)
            empty = any(0 in shard.shape for shard in shards.values())
            self._layouts[tensor] = replace(plain, sometimes_empty=empty)

    def _from_shards(
        self,
        mesh: MeshSpec,
        tensor: Tensor,
        shards: Mapping[int, _Shard],
        name_and_index: tuple[str, int],
    ) -> _PlainLayout:
        """Return the layout of a tensor by what all ranks sent. Raises RefusalError."""
        assert self.rule is not None
        full_shapes = {shard.full_shape for shard in shards.values()}
        shapes = {position: shard.shape for position, shard in shards.items()}
        if len(full_shapes) > 1:
            raise RefusalError(
                "Ranks hold it as slices of different flat parameters of FSDP1, or only some do.",
                "Wrap the model in the same way on every rank.",
            )
        (full_shape,) = full_shapes
        if full_shape is None:
            cuts = self.rule.cuts_of(*name_and_index, tensor.ndim)
            layout = layout_from_shards(mesh, cuts, shapes)
            return _PlainLayout(layout, by_common_rule=self.rule.is_for_all())
        if all(shape == full_shape for shape in shapes.values()):  # NO_SHARD
            return _PlainLayout(layout_from_shards(mesh, ((),) * len(full_shape), shapes))
        cutting = [mesh_dim for mesh_dim, _ in self.rule.nontrivial_cuts]
        if len(cutting) != 1:
            raise RefusalError(
                "A slice of a flat parameter of FSDP1 is cut over one mesh dim, not over "
                f"{' and '.join(cutting)}.",
                "Use fully_shard (FSDP2) together with tensor parallelism.",
            )
        slices = {position: (shard.start, prod(shard.shape)) for position, shard in shards.items()}
        layout = flat_layout_from_shards(mesh, cutting[0], full_shape, slices)
        return _PlainLayout(layout, flat=full_shape)

    def of(self, tensors: Sequence[Tensor]) -> list[_PlainLayout | None]:
        """Return the layout of each tensor, for `restore` in a copy; None if there is none yet."""
        return [self._layouts.get(tensor) for tensor in tensors]

    def restore(self, tensors: Sequence[Tensor], layouts: Sequence[_PlainLayout | None]) -> None:
        """Set the layouts that `of` returned for the originals of these copies; no collective."""
        pairs = zip(tensors, layouts, strict=True)
        self._layouts.update({tensor: layout for tensor, layout in pairs if layout is not None})

    def layout(self, tensor: Tensor) -> Layout:
        """Return the layout of a tensor after `resolve`. Raises RefusalError if it has none."""
        plain = self._layouts[tensor]
        if isinstance(plain.layout, RefusalError):
            raise plain.layout
        if plain.by_common_rule and self._is_mixed:
            raise RefusalError(
                "It is a plain tensor beside DTensors or slices of FSDP1, so it is probably "
                "replicated; by the process groups of the config all plain tensors are cut.",
                "Give tensor dims by name, tp_shard_dim={name: dim, or None if replicated} (also "
                "fsdp_shard_dim), or use create_devicemesh_config.",
            )
        return plain.layout

    def flat_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the full shape of a tensor that is stored flat; None for any other."""
        plain = self._layouts.get(tensor)
        return None if plain is None else plain.flat

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether ranks hold, or may hold, different parts of it."""
        plain = self._layouts.get(tensor)
        return (
            plain is None or isinstance(plain.layout, RefusalError) or bool(plain.layout.cut_dims)
        )

    def is_sometimes_empty(self, tensor: Tensor) -> bool:
        """Whether some rank may hold no element of it, and so perhaps never a gradient."""
        plain = self._layouts.get(tensor)
        return plain is None or plain.sometimes_empty


def _replicated(
    tensor: Tensor, slices: FlatSlices, layout_cache: LayoutCache
) -> Layout | RefusalError:
    """Return the layout of a plain tensor that is replicated over its mesh."""
    if refusal := slices.refusal_of(tensor):
        return refusal
    shape = slices.shape_of(tensor)
    if shape is not None and shape != tuple(tensor.shape):
        if len(shape) < 2:
            return RefusalError("Muon needs a matrix; this has one tensor dim.", TO_ADAMW)
        return RefusalError(
            f"It is a slice of a flat parameter of FSDP1; its full shape is {list(shape)}.",
            "Pass distributed_config=create_auto_config(fsdp_process_group=...).",
        )
    return Layout(layout_cache.plain_mesh, tuple(tensor.shape), ((),) * tensor.ndim)


def _check_names(mesh: MeshSpec, table: Mapping[int, Sequence[_Shard]]) -> None:
    """Raise PlanMismatchError unless all ranks have the same parameters in the same order."""
    names_by_rank = {rank: tuple(shard.name for shard in shards) for rank, shards in table.items()}
    first = min(names_by_rank)
    for rank, names in sorted(names_by_rank.items()):
        first_names = names_by_rank[first]
        if names == first_names:
            continue
        extra = [
            ", ".join(name for name in a if name not in b) or "no other"
            for a, b in ((first_names, names), (names, first_names))
        ]
        raise PlanMismatchError(
            f"Ranks of mesh {mesh} pass different plain parameters: rank {first} has "
            f"{len(first_names)} ({extra[0]}), rank {rank} has {len(names)} ({extra[1]}). Pass the "
            "same parameters to the optimizer in the same order on all of them."
        )
