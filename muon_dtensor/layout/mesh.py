"""A device mesh as integers: named dims, shape and ranks."""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import prod


@dataclass(frozen=True)
class MeshSpec:
    """A device mesh as values: named dims, their sizes, and the global rank of each position.

    A position is the row-major index of a coordinate. A mesh without dims stands for a single
    rank: the mesh of plain tensors.
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
            raise ValueError("a mesh contains every rank at most once")
        if any(type(rank) is not int or rank < 0 for rank in self.ranks):
            raise ValueError("ranks must be integers of at least 0")

    @classmethod
    def of(cls, /, **sizes: int) -> "MeshSpec":
        """Return the mesh of these named sizes over ranks 0, 1, 2, ... in row-major order.

        >>> MeshSpec.of(dp=2, tp=4).num_ranks
        8
        """
        return cls(tuple(sizes), tuple(sizes.values()), tuple(range(prod(sizes.values()))))

    def __hash__(self) -> int:
        # Hashing thousands of ranks is slow, and meshes of one plan rarely differ in ranks only.
        return hash((self.dim_names, self.shape, self.ranks[0]))

    @cached_property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.dim_names, self.shape, strict=True))

    @cached_property
    def strides(self) -> dict[str, int]:
        """Per mesh dim, the difference in position of two neighbours along it."""
        return {name: prod(self.shape[index + 1 :]) for index, name in enumerate(self.dim_names)}

    @cached_property
    def rank_set(self) -> frozenset[int]:
        return frozenset(self.ranks)

    def holds(self, rank: int) -> bool:
        """Whether this global rank is on the mesh; a mesh without dims holds any rank."""
        return not self.dim_names or rank in self.rank_set

    def position_of(self, rank: int) -> int:
        """Return the position of a global rank that the mesh holds."""
        return self._positions[rank] if self.dim_names else 0

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def index_along(self, position: int, mesh_dims: tuple[str, ...]) -> int:
        """Return the row-major index of a position among the coordinates of some mesh dims."""
        index = 0
        for name in mesh_dims:
            size = self.sizes[name]
            index = index * size + position // self.strides[name] % size
        return index

    def offset_of(self, index: int, mesh_dims: tuple[str, ...]) -> int:
        """Return the position of this index along some mesh dims, with 0 on all other dims.

        Inverse of `index_along`.
        """
        offset = 0
        for name in reversed(mesh_dims):
            index, coordinate = divmod(index, self.sizes[name])
            offset += coordinate * self.strides[name]
        return offset

    def moved(self, position: int, mesh_dims: tuple[str, ...], to: int) -> int:
        """Return the position with the coordinates of `to` on some mesh dims, else its own."""
        offset, new_offset = (
            self.offset_of(self.index_along(p, mesh_dims), mesh_dims) for p in (position, to)
        )
        return position + new_offset - offset

    def offsets_along(self, mesh_dims: tuple[str, ...]) -> list[int]:
        """Return, for each position, what its coordinates on some mesh dims add to it.

        `moved(p, mesh_dims, to=q)` is `p + offsets[q] - offsets[p]`.
        """
        if mesh_dims not in self._offsets:
            self._offsets[mesh_dims] = [
                self.offset_of(self.index_along(position, mesh_dims), mesh_dims)
                for position in range(self.num_ranks)
            ]
        return self._offsets[mesh_dims]

    @cached_property
    def _offsets(self) -> dict[tuple[str, ...], list[int]]:
        return {}

    def num_ranks_along(self, mesh_dims: tuple[str, ...]) -> int:
        """Return the product of the sizes of these mesh dims."""
        return prod(self.sizes[name] for name in mesh_dims)

    def peers(self, position: int, mesh_dims: tuple[str, ...]) -> tuple[int, ...]:
        """Return the positions that differ from this one along `mesh_dims` only.

        They are in order of global rank, as in a process group (torch sorts its ranks).
        """
        return self.team(position, mesh_dims, self.num_ranks_along(mesh_dims))

    def team(self, position: int, mesh_dims: tuple[str, ...], size: int) -> tuple[int, ...]:
        """Return the `size` positions with consecutive indices along `mesh_dims` around this one.

        `size` divides the number of ranks along `mesh_dims`: every position is in one team. The
        positions are in order of global rank.
        """
        index = self.index_along(position, mesh_dims)
        base = position - self.offset_of(index, mesh_dims)
        first = index - index % size
        team = (base + self.offset_of(first + i, mesh_dims) for i in range(size))
        return tuple(sorted(team, key=self.ranks.__getitem__))

    def names_on(self, larger: "MeshSpec", rank: int) -> tuple[str, ...] | None:
        """Return the dims of `larger` that make up this mesh, or None if it is not a sub-mesh.

        It is a sub-mesh if it consists of the ranks of `larger` that differ from `rank` along those
        dims only, in row-major order.
        """
        if not (larger.dim_names and larger.holds(rank) and self.rank_set < larger.rank_set):
            return None
        start = larger.position_of(rank)
        for names in permutations(larger.dim_names, len(self.dim_names)):
            if tuple(larger.sizes[name] for name in names) != self.shape:
                continue
            base = start - larger.offset_of(larger.index_along(start, names), names)
            positions = (base + larger.offset_of(index, names) for index in range(self.num_ranks))
            if tuple(larger.ranks[position] for position in positions) == self.ranks:
                return names
        return None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"({sizes})" if sizes else "this rank alone"
