"""Layouts of tensors that are not DTensors: replicated, or cut, on the mesh of a config.

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
"""Which tensor dim a process group cuts: of every parameter, by name, or one per parameter.

None in place of a number: the parameter is replicated. None for all: nobody said.
"""


@dataclass(frozen=True)
class PlainLayoutRule:
    """Where plain tensors lie. `cuts`: mesh dims and the tensor dims they cut, outermost first.

    All other mesh dims replicate them; a mesh dim of one rank cuts nothing. Slices of FSDP1's flat
    parameters are cut by the only mesh dim in `cuts`, whatever its tensor dim.
    """

    mesh: DeviceMesh
    cuts: tuple[tuple[str, TensorDim], ...] = ()

    @property
    def real_cuts(self) -> tuple[tuple[str, TensorDim], ...]:
        """Those over more than one rank."""
        sizes = dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=False))
        return tuple((name, dims) for name, dims in self.cuts if sizes[name] > 1)

    def cuts_of(self, name: str, index: int, ndim: int) -> tuple[tuple[str, ...], ...]:
        """Per tensor dim of one parameter the mesh dims that cut it. Raises RefusalError."""
        return _cuts({n: _choose(dims, n, name, index) for n, dims in self.real_cuts}, ndim)

    def cuts_by_hand(self, ndim: int) -> tuple[tuple[str, ...], ...]:
        """The same of a tensor that has no name. Raises RefusalError for a rule by parameter."""
        for mesh_dim, dims in self.real_cuts:
            if isinstance(dims, (Mapping, Sequence)):
                raise RefusalError(
                    f"{_keyword(mesh_dim)} was given for each parameter, and a tensor that is "
                    "handed to gather_fn or redistribute_fn has no name.",
                    "Make a config with the one tensor dim of this tensor.",
                )
        return self.cuts_of("", 0, ndim)

    def is_for_all(self) -> bool:
        """Whether it says of all plain tensors alike that some group cuts them."""
        return any(not isinstance(dims, (Mapping, Sequence)) for _, dims in self.real_cuts)


def _cuts(chosen: Mapping[str, int | None], ndim: int) -> tuple[tuple[str, ...], ...]:
    cuts: list[list[str]] = [[] for _ in range(ndim)]
    for mesh_dim, tensor_dim in chosen.items():
        if tensor_dim is None:
            continue
        if not -ndim <= tensor_dim < ndim:
            raise RefusalError(
                f"It has {ndim} tensor dims, and '{mesh_dim}' is said to cut dim {tensor_dim}.",
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
                f"Which of its tensor dims the process group '{mesh_dim}' cuts was not said.",
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
            "Give one for each parameter, in the order they are handed to the optimizer.",
        )
    return tensor_dims[index]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One parameter as one rank tells it to the others.

    Of a slice of a flat parameter also the `whole` shape, and where in it the slice begins.
    """

    name: str
    shape: tuple[int, ...]
    whole: tuple[int, ...] | None
    start: int | None


@dataclass(frozen=True, slots=True)
class _PlainLayout:
    """What was worked out of one tensor.

    `flat`: its whole shape, if it is stored flat. `by_the_rule`: whether a rule for all plain
    tensors alike said what cuts it. `sometimes_empty`: whether some rank holds no element of
    it.
    """

    layout: Layout | RefusalError
    flat: tuple[int, ...] | None = None
    by_the_rule: bool = False
    sometimes_empty: bool = False


class PlainTensors:
    """Layouts of plain tensors, as the config defines them; without one each is local to its rank.

    Tensors are held weakly, so that a parameter that was replaced (by FSDP2) can be freed.
    """

    def __init__(self, rule: PlainLayoutRule | None) -> None:
        self.rule = rule
        self._found: MutableMapping[Tensor, _PlainLayout] = WeakTensorKeyDictionary()
        self._is_mixed = False

    def learn(
        self, named: Sequence[tuple[str, Tensor]], layout_cache: LayoutCache, *, exchange: bool
    ) -> None:
        """Work out the layouts of those parameters that are new; a collective if any can be cut.

        Args:
            named: all parameters, DTensors too: a rule may count them.
            layout_cache: where meshes are described.
            exchange: take part in the collective even if nothing is new here.

        Raises:
            PlanMismatchError: ranks hold other parameters. On every rank.
            ValueError: the rule has more tensor dims than there are parameters.
        """
        slices = FlatSlices.of([tensor for _, tensor in named])
        self._is_mixed = any(
            isinstance(t, DTensor) or slices.shape_of(t) is not None for _, t in named
        )
        new = [
            (index, name, tensor)
            for index, (name, tensor) in enumerate(named)
            if not isinstance(tensor, DTensor) and tensor not in self._found
        ]
        if self.rule is None or not self.rule.real_cuts:
            for _, _, tensor in new:
                layout = _whole_everywhere(tensor, slices, layout_cache)
                self._found[tensor] = _PlainLayout(layout)
            return
        for mesh_dim, dims in self.rule.real_cuts:
            if isinstance(dims, Sequence) and len(dims) > len(named):
                raise ValueError(
                    f"{_keyword(mesh_dim)} has {len(dims)} tensor dims for {len(named)} parameters."
                )
        if not (new or exchange):
            return
        mesh, rank = layout_cache.mesh(self.rule.mesh), this_rank()
        mine = [
            _Shard(name, tuple(t.shape), slices.shape_of(t), slices.start_of(t))
            for _, name, t in new
        ]
        groups = Groups(layout_cache.device_meshes, rank).along_each_dim(mesh)
        table = gather_from_mesh(mine, groups, rank)
        _must_match(mesh, table)
        for turn, (index, name, tensor) in enumerate(new):
            shards = {mesh.position_of(other): told[turn] for other, told in table.items()}
            try:
                if refusal := slices.refusal_of(tensor):
                    raise refusal
                found = self._find(mesh, tensor, shards, (name, index))
            except RefusalError as error:
                found = _PlainLayout(error)
            empty = any(0 in shard.shape for shard in shards.values())
            self._found[tensor] = replace(found, sometimes_empty=empty)

    def _find(
        self,
        mesh: MeshSpec,
        tensor: Tensor,
        shards: Mapping[int, _Shard],
        named: tuple[str, int],
    ) -> _PlainLayout:
        """From what all ranks told of a tensor; `named` is its name and index.

        Raises RefusalError.
        """
        assert self.rule is not None
        wholes = {shard.whole for shard in shards.values()}
        shapes = {position: shard.shape for position, shard in shards.items()}
        if len(wholes) > 1:
            raise RefusalError(
                "Ranks hold it as slices of different flat parameters of FSDP1, or some as none.",
                "Wrap the model alike on every rank.",
            )
        (whole,) = wholes
        if whole is None:
            cuts = self.rule.cuts_of(*named, tensor.ndim)
            layout = layout_from_shards(mesh, cuts, shapes)
            return _PlainLayout(layout, by_the_rule=self.rule.is_for_all())
        if all(shape == whole for shape in shapes.values()):  # NO_SHARD
            return _PlainLayout(layout_from_shards(mesh, ((),) * len(whole), shapes))
        cutting = [mesh_dim for mesh_dim, _ in self.rule.real_cuts]
        if len(cutting) != 1:
            raise RefusalError(
                "A slice of a flat parameter of FSDP1 can be cut over one mesh dim, not "
                f"{' and '.join(cutting)}.",
                "Use fully_shard (FSDP2) together with tensor parallelism.",
            )
        slices = {position: (shard.start, prod(shard.shape)) for position, shard in shards.items()}
        layout = flat_layout_from_shards(mesh, cutting[0], whole, slices)
        return _PlainLayout(layout, flat=whole)

    def of(self, tensors: Sequence[Tensor]) -> list[_PlainLayout | None]:
        """What is known of each tensor, for `restore` in a copy; None of what was not learned."""
        return [self._found.get(tensor) for tensor in tensors]

    def restore(self, tensors: Sequence[Tensor], found: Sequence[_PlainLayout | None]) -> None:
        """Take over what `of` gave of the tensors that these are copies of; asks no other rank."""
        self._found.update({t: f for t, f in zip(tensors, found, strict=True) if f is not None})

    def layout(self, tensor: Tensor) -> Layout:
        """The layout of a tensor that was learned. Raises RefusalError if it has none."""
        found = self._found[tensor]
        if isinstance(found.layout, RefusalError):
            raise found.layout
        if found.by_the_rule and self._is_mixed:
            raise RefusalError(
                "It is a plain tensor beside DTensors or slices of FSDP1, and those who make them "
                "leave others whole on every rank; the process groups of the config say that all "
                "plain tensors are cut.",
                "Say it by name, tp_shard_dim={name: dim, or None if replicated} (fsdp_shard_dim "
                "likewise), or use create_devicemesh_config.",
            )
        return found.layout

    def flat_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor that is stored flat; None for any other."""
        found = self._found.get(tensor)
        return None if found is None else found.flat

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether ranks hold, or may hold, different parts of it."""
        found = self._found.get(tensor)
        return (
            found is None or isinstance(found.layout, RefusalError) or bool(found.layout.cut_dims)
        )

    def is_sometimes_empty(self, tensor: Tensor) -> bool:
        """Whether some rank may hold no element of it, and so perhaps never a gradient."""
        found = self._found.get(tensor)
        return found is None or found.sometimes_empty


def _whole_everywhere(
    tensor: Tensor, slices: FlatSlices, layout_cache: LayoutCache
) -> Layout | RefusalError:
    """A plain tensor that lies whole on every rank of its mesh."""
    if refusal := slices.refusal_of(tensor):
        return refusal
    shape = slices.shape_of(tensor)
    if shape is not None and shape != tuple(tensor.shape):
        if len(shape) < 2:
            return RefusalError("Muon needs a matrix; this has one tensor dim.", TO_ADAMW)
        return RefusalError(
            f"It is a slice of a flat parameter of FSDP1, {list(shape)} when whole.",
            "Pass distributed_config=create_auto_config(fsdp_process_group=...).",
        )
    return Layout(layout_cache.plain_mesh, tuple(tensor.shape), ((),) * tensor.ndim)


def _must_match(mesh: MeshSpec, table: Mapping[int, Sequence[_Shard]]) -> None:
    """Raise PlanMismatchError unless all ranks told of the same parameters."""
    names = {rank: tuple(shard.name for shard in told) for rank, told in table.items()}
    first = min(names)
    for rank, told in sorted(names.items()):
        if told == names[first]:
            continue
        alone = [
            ", ".join(n for n in names[a] if n not in names[b]) or "no other"
            for a, b in ((first, rank), (rank, first))
        ]
        raise PlanMismatchError(
            f"Ranks of mesh {mesh} hand over different plain parameters: rank {first} has "
            f"{len(names[first])} ({alone[0]}), rank {rank} has {len(told)} ({alone[1]}). Hand the "
            "same parameters to the optimizer in one order on all of them."
        )
