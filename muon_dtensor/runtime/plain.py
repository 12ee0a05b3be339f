"""How tensors that are no DTensors lie: replicated, or cut, on a mesh that a config names.

Learns the sizes of their shards from all ranks, once. Knows no plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.errors import PlanMismatchError, RefusalError
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.matrices import TO_ADAMW
from muon_dtensor.runtime.collectives import gather_from_mesh
from muon_dtensor.runtime.describe import Describer, FlatSlices, this_rank
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.shards import flat_layout_from_shards, layout_from_shards

TensorDim = int | None | Mapping[str, int | None] | Sequence[int | None]
"""Which tensor dim a process group cuts: of every parameter, by name, or one per parameter.

None in place of a number: the parameter is replicated. None for all: nobody said.
"""


@dataclass(frozen=True)
class PlainRule:
    """Where plain tensors lie. `cuts`: mesh dims and the tensor dims they cut, outermost first.

    All other mesh dims replicate them. Slices of FSDP1's flat parameters are cut by the only
    mesh dim in `cuts`, whatever its tensor dim.
    """

    mesh: DeviceMesh
    cuts: tuple[tuple[str, TensorDim], ...] = ()

    def cuts_of(self, name: str, index: int, ndim: int) -> tuple[tuple[str, ...], ...]:
        """Per tensor dim of one parameter the mesh dims that cut it. Raises RefusalError."""
        cuts: list[list[str]] = [[] for _ in range(ndim)]
        for mesh_dim, tensor_dims in self.cuts:
            if tensor_dims is None:
                raise RefusalError(
                    f"Which of its tensor dims the process group '{mesh_dim}' cuts was not said.",
                    f"Give {_keyword(mesh_dim)}, a tensor dim or {{name: dim}}.",
                )
            tensor_dim = _choose(tensor_dims, name, index)
            if tensor_dim is None:
                continue
            if not -ndim <= tensor_dim < ndim:
                raise RefusalError(
                    f"It has {ndim} tensor dims, and '{mesh_dim}' is said to cut dim {tensor_dim}.",
                    f"Give {_keyword(mesh_dim)} by name: {{name: dim, or None if replicated}}.",
                )
            cuts[tensor_dim].append(mesh_dim)
        return tuple(map(tuple, cuts))

    def depends_on_the_parameter(self) -> bool:
        """Whether the user said for each parameter what cuts it."""
        return all(isinstance(dims, (Mapping, Sequence)) for _, dims in self.cuts)


def _keyword(mesh_dim: str) -> str:
    return "tp_shard_dim" if mesh_dim.startswith("tp") else "fsdp_shard_dim"


def _choose(tensor_dims: TensorDim, name: str, index: int) -> int | None:
    match tensor_dims:
        case Mapping() if name in tensor_dims:
            return tensor_dims[name]
        case Mapping():
            raise RefusalError(
                f"Tensor dims were given for {', '.join(tensor_dims) or 'no parameter'}.",
                f"Name it too: {{'{name}': dim, or None if replicated}}.",
            )
        case int() | None:
            return tensor_dims
    if index >= len(tensor_dims):
        raise RefusalError(
            f"It is parameter {index}, and tensor dims were given for {len(tensor_dims)}.",
            "Give one for each parameter, in the order they are handed to the optimizer.",
        )
    return tensor_dims[index]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One parameter as one rank tells it to the others. `whole`: shape, if it is a flat slice."""

    name: str
    shape: tuple[int, ...]
    whole: tuple[int, ...] | None


class PlainTensors:
    """Layouts of plain tensors by the rule of a config; without one each is its rank's own."""

    def __init__(self, rule: PlainRule | None) -> None:
        self.rule = rule
        self._found: dict[int, tuple[Tensor, Layout | RefusalError, tuple[int, ...] | None]] = {}
        self._sometimes_empty: set[int] = set()

    def learn(
        self, named: Sequence[tuple[str, Tensor]], describer: Describer, *, beside_dtensors: bool
    ) -> None:
        """Work out the layouts of those parameters that are new; a collective if any can be cut.

        Args:
            named: all parameters, DTensors too: a rule may count them.
            describer: where meshes are described.
            beside_dtensors: whether the optimizer steps DTensors too. A rule for all plain tensors
                alike is then ambiguous, since a plain tensor may be replicated beside them.

        Raises:
            PlanMismatchError: ranks hold other parameters. On every rank.
        """
        slices = FlatSlices.of([tensor for _, tensor in named])
        new = [
            (index, name, tensor)
            for index, (name, tensor) in enumerate(named)
            if not isinstance(tensor, DTensor) and id(tensor) not in self._found
        ]
        if self.rule is None or not self.rule.cuts or not new:
            for _, _, tensor in new:
                self._remember(tensor, _whole_everywhere(tensor, slices, describer), None)
            return
        mesh, rank = describer.mesh(self.rule.mesh), this_rank()
        mine = [_Shard(name, tuple(t.shape), slices.shape_of(t)) for _, name, t in new]
        groups = Groups(describer.device_meshes, rank).along_each_dim(mesh)
        table = gather_from_mesh(mine, groups, rank)
        _must_match(mesh, table)
        for turn, (index, name, tensor) in enumerate(new):
            shards = {mesh.position_of(other): told[turn] for other, told in table.items()}
            if isinstance(refusal := slices.refusal_of(tensor), RefusalError):
                self._remember(tensor, refusal, None)
                continue
            shape = slices.shape_of(tensor)
            is_flat = shape is not None and any(s.shape != shape for s in shards.values())
            try:
                if is_flat:
                    layout = self._flat_layout(mesh, shape, shards)
                else:
                    layout = self._layout(
                        mesh, shards, (name, index), beside_dtensors=beside_dtensors
                    )
            except RefusalError as error:
                self._remember(tensor, error, None)
            else:
                self._remember(tensor, layout, shape if is_flat else None)
            if any(0 in shard.shape for shard in shards.values()):
                self._sometimes_empty.add(id(tensor))

    def _remember(
        self, tensor: Tensor, layout: Layout | RefusalError, shape: tuple[int, ...] | None
    ) -> None:
        self._found[id(tensor)] = (tensor, layout, shape)

    def _flat_layout(
        self, mesh: MeshSpec, shape: tuple[int, ...] | None, shards: Mapping[int, _Shard]
    ) -> Layout:
        assert self.rule is not None
        assert shape is not None
        if len(self.rule.cuts) != 1:
            dims = " and ".join(mesh_dim for mesh_dim, _ in self.rule.cuts)
            raise RefusalError(
                f"A slice of a flat parameter of FSDP1 can be cut over one mesh dim, not {dims}.",
                "Use fully_shard (FSDP2) together with tensor parallelism.",
            )
        if any(shard.whole != shape for shard in shards.values()):
            raise RefusalError(
                "Only some ranks hold it as a slice of a flat parameter of FSDP1.",
                "Wrap the model alike on every rank.",
            )
        (mesh_dim, _) = self.rule.cuts[0]
        return flat_layout_from_shards(
            mesh, mesh_dim, shape, {position: shard.shape for position, shard in shards.items()}
        )

    def _layout(
        self,
        mesh: MeshSpec,
        shards: Mapping[int, _Shard],
        named: tuple[str, int],
        *,
        beside_dtensors: bool,
    ) -> Layout:
        assert self.rule is not None
        if any(shard.whole is not None for shard in shards.values()):  # NO_SHARD: whole on all
            cuts: tuple[tuple[str, ...], ...] = ((),) * len(shards[0].shape)
        elif beside_dtensors and not self.rule.depends_on_the_parameter():
            raise RefusalError(
                "It is no DTensor, and others are: parallelize_module leaves such parameters whole "
                "on every rank, while the process groups of the config say that they are cut.",
                "Say it by name, tp_shard_dim={name: dim, or None if replicated}, or use "
                "create_devicemesh_config.",
            )
        else:
            cuts = self.rule.cuts_of(*named, len(shards[0].shape))
        shapes = {position: shard.shape for position, shard in shards.items()}
        return layout_from_shards(mesh, cuts, shapes)

    def layout(self, tensor: Tensor) -> Layout:
        """The layout of a tensor that was learned. Raises RefusalError if it has none."""
        _, layout, _ = self._found[id(tensor)]
        if isinstance(layout, RefusalError):
            raise layout
        return layout

    def flat_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor that is stored flat; None for any other."""
        found = self._found.get(id(tensor))
        return None if found is None else found[2]

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether ranks hold different parts of it."""
        found = self._found.get(id(tensor))
        return found is not None and (isinstance(found[1], RefusalError) or bool(found[1].cut_dims))

    def is_sometimes_empty(self, tensor: Tensor) -> bool:
        """Whether some rank holds no element of it, and so perhaps never a gradient."""
        return id(tensor) in self._sometimes_empty


def _whole_everywhere(
    tensor: Tensor, slices: FlatSlices, describer: Describer
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
    return Layout(describer.plain_mesh, tuple(tensor.shape), ((),) * tensor.ndim)


def _must_match(mesh: MeshSpec, table: Mapping[int, Sequence[_Shard]]) -> None:
    """Raise PlanMismatchError unless all ranks told of the same parameters."""
    names = {rank: tuple(shard.name for shard in told) for rank, told in table.items()}
    first = min(names)
    for rank, told in sorted(names.items()):
        if told != names[first]:
            ours, theirs = (
                ", ".join(n for n in names[a] if n not in names[b][:]) or "the same in other order"
                for a, b in ((first, rank), (rank, first))
            )
            raise PlanMismatchError(
                f"Ranks of mesh {mesh} hand over different plain parameters: rank {first} has "
                f"{len(names[first])} ({ours}), rank {rank} has {len(told)} ({theirs}). Hand the "
                "same parameters to the optimizer in one order on all of them."
            )
