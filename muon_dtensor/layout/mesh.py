"""A device mesh as integers: named dims, shape and ranks."""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import prod


@dataclass(frozen=True)
class MeshSpec:
    """A device mesh as values: named dims, their sizes, and the global rank of each position.

    A position is the row-major index of a coordinate. A mesh without dims is one rank alone;
    parameters that no mesh holds (plain tensors) live there.
    """

    dim_names: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.dim_names)) != len(self.dim_names):
            raise ValueError(f"mesh dim names must differ, got {self.dim_names}")
        if len(self.dim_names) != len(self.shape):
            raise ValueError(f"{len(self.dim_names)} mesh dim names for shape {self.shape}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"mesh dims must have at least one rank, got {self.shape}")
        if len(self.ranks) != prod(self.shape):
            raise ValueError(f"mesh {self.shape} needs {prod(self.shape)} ranks")
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError("a mesh holds every rank at most once")
        if any(type(rank) is not int or rank < 0 for rank in self.ranks):
            raise ValueError("ranks are integers from 0 on")

    @classmethod
    def of(cls, /, **sizes: int) -> "MeshSpec":
        """The mesh of these named sizes over ranks 0, 1, 2, ... in row-major order.

        >>> MeshSpec.of(dp=2, tp=4).num_ranks
        8
        """
        return cls(tuple(sizes), tuple(sizes.values()), tuple(range(prod(sizes.values()))))

    def __hash__(self) -> int:
        # cheaper than thousands of ranks, and meshes of one plan rarely differ in ranks alone
        return hash((self.dim_names, self.shape, self.ranks[0]))

    @cached_property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.dim_names, self.shape, strict=True))

    @cached_property
    def strides(self) -> dict[str, int]:
        """Per mesh dim, how far apart in position two neighbours along it are."""
        return {name: prod(self.shape[index + 1 :]) for index, name in enumerate(self.dim_names)}

    @cached_property
    def rank_set(self) -> frozenset[int]:
        return frozenset(self.ranks)

    def holds(self, rank: int) -> bool:
        """Whether this global rank is on the mesh; a mesh without dims is every rank's own."""
        return not self.dim_names or rank in self.rank_set

    def position_of(self, rank: int) -> int:
        """The position of a global rank that the mesh holds."""
        return self._positions[rank] if self.dim_names else 0

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def index_along(self, position: int, mesh_dims: tuple[str, ...]) -> int:
        """Row-major index of a position among the coordinates of some mesh dims."""
        index = 0
        for name in mesh_dims:
            size = self.sizes[name]
            index = index * size + position // self.strides[name] % size
        return index

    def offset_of(self, index: int, mesh_dims: tuple[str, ...]) -> int:
        """Inverse of `index_along`: the position of this index, with 0 on all other mesh dims."""
        offset = 0
        for name in reversed(mesh_dims):
            index, coordinate = divmod(index, self.sizes[name])
            offset += coordinate * self.strides[name]
        return offset

    def moved(self, position: int, mesh_dims: tuple[str, ...], to: int) -> int:
        """The position that is where `to` is along some mesh dims, else where `position` is."""
        here, there = (self.index_along(p, mesh_dims) for p in (position, to))
        return position + self.offset_of(there, mesh_dims) - self.offset_of(here, mesh_dims)

    def num_ranks_along(self, mesh_dims: tuple[str, ...]) -> int:
        """How many ranks lie along these mesh dims."""
        return prod(self.sizes[name] for name in mesh_dims)

    def peers(self, position: int, mesh_dims: tuple[str, ...]) -> tuple[int, ...]:
        """Positions that differ from this one along `mesh_dims` only, in order of global rank.

        That is the order of ranks inside a process group (torch sorts them).
        """
        base = position - self.offset_of(self.index_along(position, mesh_dims), mesh_dims)
        peers = (
            base + self.offset_of(index, mesh_dims)
            for index in range(self.num_ranks_along(mesh_dims))
        )
        return tuple(sorted(peers, key=self.ranks.__getitem__))

    def names_on(self, whole: "MeshSpec", rank: int) -> tuple[str, ...] | None:
        """The names that the dims of this mesh have on a larger one, if it is a sub-mesh there.

        That is, if it is what one gets of `whole` from `rank` by walking along those dims alone.
        """
        if not (whole.dim_names and whole.holds(rank) and self.rank_set < whole.rank_set):
            return None
        start = whole.position_of(rank)
        for names in permutations(whole.dim_names, len(self.dim_names)):
            if tuple(whole.sizes[name] for name in names) != self.shape:
                continue
            base = start - whole.offset_of(whole.index_along(start, names), names)
            line = (base + whole.offset_of(index, names) for index in range(self.num_ranks))
            if tuple(whole.ranks[position] for position in line) == self.ranks:
                return names
        return None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"({sizes})" if sizes else "this rank alone"
