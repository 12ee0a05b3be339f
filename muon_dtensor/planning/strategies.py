"""How a matrix is brought together and handed back: one class per strategy."""

from dataclasses import dataclass
from enum import StrEnum

from muon_dtensor.layout import Layout, Region


class Route(StrEnum):
    """Which pieces an all-to-all carries, from whom to whom."""

    TO_OWNER = "to_owner"
    """Every holder in the owner's replica sends its piece of the direction to the owner."""
    TO_HOLDERS = "to_holders"
    """The owner sends every holder among its peers that holder's piece of the result."""
    TO_REPLICAS = "to_replicas"
    """A holder in the owner's replica sends its piece on to its counterparts in the others."""


@dataclass(frozen=True, slots=True)
class AllToAll:
    """One packed, uneven all-to-all among the ranks that differ along `mesh_dims` only."""

    mesh_dims: tuple[str, ...]
    route: Route


Collective = AllToAll


@dataclass(frozen=True, slots=True)
class Owned:
    """One rank orthogonalizes the matrix for all ranks that hold a part of it.

    Without mesh dims the owner is the only rank that holds any of it: nothing moves.

    `unshard_dims`: mesh dims along which its pieces lie apart (none: every replica holds all of
    it). `replica_dims`: mesh dims along which the pieces are repeated. `hops`: the way back,
    1 = the owner sends every holder its piece directly, 2 = to its own replica, which passes the
    pieces on. `is_staged`: pieces travel along one mesh dim after the other, the innermost first,
    in smaller groups, and back the same way; else along all of them in one exchange.
    """

    unshard_dims: tuple[str, ...] = ()
    replica_dims: tuple[str, ...] = ()
    hops: int = 1
    is_staged: bool = False

    @property
    def is_local(self) -> bool:
        """Whether nothing moves."""
        return not self.unshard_dims and not self.replica_dims

    @property
    def kind(self) -> str:
        """The word of `plan.STRATEGIES` for it, or "local"."""
        if self.is_local:
            return "local"
        return "owned_staged" if self.is_staged else "owned"

    @property
    def text(self) -> str:
        """The strategy in a few words."""
        text = f"{self.kind.split('_')[0]}{', one mesh dim at a time' * self.is_staged}"
        if not self.replica_dims:
            return text
        return f"{text}, shared by replicas in {self.hops} hop{'s' * (self.hops > 1)}"

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The mesh dims of each exchange on the way to the owner."""
        if self.is_staged:
            return tuple((name,) for name in reversed(self.unshard_dims))
        return (self.unshard_dims,) if self.unshard_dims else ()

    @property
    def unshard(self) -> tuple[Collective, ...]:
        """What brings the pieces of a matrix to its owner."""
        return tuple(AllToAll(dims, Route.TO_OWNER) for dims in self.stages)

    def reshard(self, dim_names: tuple[str, ...]) -> tuple[Collective, ...]:
        """What hands the result back; `dim_names` are all names of the mesh, in its order."""
        if self.is_local:
            return ()
        if self.hops == 1 and not self.is_staged:
            apart_or_same = {*self.unshard_dims, *self.replica_dims}
            both = tuple(name for name in dim_names if name in apart_or_same)
            return (AllToAll(both, Route.TO_HOLDERS),)
        back = (AllToAll(dims, Route.TO_HOLDERS) for dims in reversed(self.stages))
        spread = (AllToAll(self.replica_dims, Route.TO_REPLICAS),) if self.replica_dims else ()
        return (*back, *spread)


Strategy = Owned
STRATEGY_CLASSES: tuple[type[Strategy], ...] = (Owned,)
"""The members of the union `Strategy`, for JSON: a class goes by its name in lower case."""


def strategies_for(layout: Layout, matrix: Region) -> tuple[Strategy, ...]:
    """Legal strategies for a matrix with at least one element, fewest collectives first."""
    apart, same = _dims_apart(layout, matrix), layout.replica_dims
    strategies = [Owned(apart, same)]
    if apart and same:
        strategies.append(Owned(apart, same, hops=2))
    if len(apart) > 1:
        strategies.append(Owned(apart, same, hops=2 if same else 1, is_staged=True))
    return tuple(strategies)


def can_own(layout: Layout, matrix: Region, position: int) -> bool:
    """Whether the collectives of its strategies can bring a matrix to this position."""
    apart = _dims_apart(layout, matrix)
    fixed = tuple(name for name in layout.cut_dims if name not in apart)
    along = layout.mesh.index_along
    return along(position, fixed) == along(next(iter(layout.holders(matrix))), fixed)


def _dims_apart(layout: Layout, matrix: Region) -> tuple[str, ...]:
    """Mesh dims along which the pieces of a matrix lie at different coordinates."""
    homes = layout.holders(matrix)
    return tuple(
        name
        for name in layout.cut_dims
        if len({layout.mesh.index_along(home, (name,)) for home in homes}) > 1
    )
