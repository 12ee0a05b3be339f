"""Strategies: the collectives that bring a matrix to its owner and return the result."""

from dataclasses import dataclass
from enum import StrEnum

from muon_dtensor.layout import Layout, Region


class Route(StrEnum):
    """Which pieces a collective carries, with senders and receivers."""

    TO_OWNER = "to_owner"
    """Every holder in the owner's replica sends its piece of the direction to the owner."""
    TO_HOLDERS = "to_holders"
    """The owner sends each holder among its peers its piece of the result."""
    TO_REPLICAS = "to_replicas"
    """A holder in the owner's replica sends its piece of the result to the other replicas."""


@dataclass(frozen=True, slots=True)
class AllToAll:
    """A packed, uneven all-to-all among the ranks that differ along `mesh_dims` only."""

    mesh_dims: tuple[str, ...]
    route: Route


@dataclass(frozen=True, slots=True)
class AllGather:
    """An uneven all-gather among the ranks that differ along `mesh_dims` only.

    Each rank sends all that it has to all others. gloo cannot gather parts of several sizes: there
    each rank sends a message to each other rank.
    """

    mesh_dims: tuple[str, ...]
    route: Route = Route.TO_REPLICAS


Collective = AllToAll | AllGather


@dataclass(frozen=True, slots=True)
class Owned:
    """One rank orthogonalizes the matrix for all ranks that store a part of it.

    Without mesh dims the owner is the only rank that stores any of it, and nothing is sent.

    `unshard_dims`: mesh dims over which its pieces are spread; empty if each replica is on one
    rank. `replica_dims`: mesh dims over which results are replicated; the pieces are too, or they
    are cut over these dims (see `ParamSpec.gathered_dims`). `hops`: 1 = the owner sends results to
    all holders directly, 2 = to the holders in its own replica, or of the pieces that are cut,
    which send them to the other replicas. `is_staged`: pieces are sent over one mesh dim at a time,
    the innermost first, in smaller groups, and results in the reverse order; otherwise over all
    dims in one exchange.
    """

    unshard_dims: tuple[str, ...] = ()
    replica_dims: tuple[str, ...] = ()
    hops: int = 1
    is_staged: bool = False

    @property
    def is_local(self) -> bool:
        """Whether nothing is sent."""
        return not self.unshard_dims and not self.replica_dims

    @property
    def kind(self) -> str:
        """Its name in `plan.STRATEGIES`, or "local"."""
        if self.is_local:
            return "local"
        return "owned_staged" if self.is_staged else "owned"

    @property
    def text(self) -> str:
        """The strategy as text."""
        return self._text(self.kind.split("_")[0])

    def _text(self, kind: str) -> str:
        text = f"{kind}{', one mesh dim at a time' * self.is_staged}"
        if not self.replica_dims:
            return text
        if set(self.replica_dims) <= set(self.unshard_dims):
            return f"{text}, results gathered by replicas"
        return f"{text}, shared by replicas in {self.hops} hop{'s' * (self.hops > 1)}"

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The mesh dims of each exchange of the unshard, in order."""
        if self.is_staged:
            return tuple((name,) for name in reversed(self.unshard_dims))
        return (self.unshard_dims,) if self.unshard_dims else ()

    @property
    def unshard(self) -> tuple[Collective, ...]:
        """The collectives that send the pieces of a matrix to its owner."""
        return tuple(AllToAll(dims, Route.TO_OWNER) for dims in self.stages)

    def reshard(self, dim_names: tuple[str, ...]) -> tuple[Collective, ...]:
        """Return the collectives that send the result back; `dim_names`: all dims of the mesh."""
        if not self.unshard_dims and not self.replica_dims:
            return ()
        if self.unshard_dims and self.hops == 1 and not self.is_staged:
            moved_dims = {*self.unshard_dims, *self.replica_dims}
            ordered_dims = tuple(name for name in dim_names if name in moved_dims)
            return (AllToAll(ordered_dims, Route.TO_HOLDERS),)
        to_holders = (AllToAll(dims, Route.TO_HOLDERS) for dims in reversed(self.stages))
        to_replicas = (AllGather(self.replica_dims),) if self.replica_dims else ()
        return (*to_holders, *to_replicas)


@dataclass(frozen=True, slots=True)
class Distributed(Owned):
    """The ranks of a team orthogonalize the matrix together, each with a slab of its long side.

    Slabs move between the ranks that store them and the members of the team as owned matrices do,
    see `Owned`; without mesh dims each member already holds its slab. It is not bitwise: see
    `algorithms.distributed_newton_schulz`.

    `team_dims`, `team_size`: a team is this number of ranks with consecutive indices along these
    mesh dims. `shares_polynomial`: each member computes some rows of the polynomial and sends them
    to the others; otherwise every member computes all rows.
    """

    team_dims: tuple[str, ...] = ()
    team_size: int = 2
    shares_polynomial: bool = False

    @property
    def is_local(self) -> bool:
        return False

    @property
    def kind(self) -> str:
        return "distributed"

    @property
    def text(self) -> str:
        rows = "shared" if self.shares_polynomial else "repeated"
        return f"{self._text('distributed')}, teams of {self.team_size}, polynomial {rows}"


Strategy = Owned | Distributed
STRATEGY_CLASSES: tuple[type[Strategy], ...] = (Owned, Distributed)
"""The members of the union `Strategy`. JSON names a class by its name in lower case."""


def strategies_for(
    layout: Layout, matrix: Region, gathered_dims: tuple[str, ...] = ()
) -> tuple[Strategy, ...]:
    """Return the legal strategies for a non-empty matrix, fewest collectives first.

    `layout`: of the momentum. `gathered_dims`: see `ParamSpec.gathered_dims`.
    """
    unshard_dims = _unshard_dims(layout, matrix)
    replica_dims = gathered_dims or layout.replica_dims
    strategies = []
    if not unshard_dims or not gathered_dims:
        strategies.append(Owned(unshard_dims, replica_dims))
    if unshard_dims and replica_dims:
        strategies.append(Owned(unshard_dims, replica_dims, hops=2))
    if len(unshard_dims) > 1:
        hops = 2 if replica_dims else 1
        strategies.append(Owned(unshard_dims, replica_dims, hops, is_staged=True))
    return tuple(strategies)


def can_own(layout: Layout, matrix: Region, position: int) -> bool:
    """Whether the collectives of its strategies can send a matrix to this position."""
    unshard_dims = _unshard_dims(layout, matrix)
    fixed = tuple(name for name in layout.cut_dims if name not in unshard_dims)
    along = layout.mesh.index_along
    return along(position, fixed) == along(next(iter(layout.holders(matrix))), fixed)


def _unshard_dims(layout: Layout, matrix: Region) -> tuple[str, ...]:
    """Return the mesh dims along which the pieces of a matrix have different coordinates."""
    homes = layout.holders(matrix)
    return tuple(
        name
        for name in layout.cut_dims
        if len({layout.mesh.index_along(home, (name,)) for home in homes}) > 1
    )
