"""The plan language: what a step does, as values.

A Plan is made by `planner.plan_update`, read by people through `render`, held to its promises by
`check`, and obeyed by the executor. Nothing here decides or computes.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from muon_dtensor.layout import Matrix, MeshSpec, ParamSpec, Region
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.topology import Topology

if TYPE_CHECKING:
    from muon_dtensor.planning.cost import PlanCost
    from muon_dtensor.planning.predict import Prediction
    from muon_dtensor.planning.volumes import BucketCost


class Route(StrEnum):
    """Which pieces an all-to-all carries, from whom to whom."""

    TO_OWNER = "to_owner"
    """Every holder in the owner's replica sends its piece of the direction to the owner."""
    TO_HOLDERS = "to_holders"
    """The owner sends every holder among its peers that holder's piece of the result."""
    TO_REPLICAS = "to_replicas"
    """A holder in the owner's replica sends its piece on to its counterparts in the others."""

    TO_ALL = "to_all"
    """Every holder sends its piece to all other holders of its replica."""

    TO_TEAM = "to_team"
    """Every holder sends each member of the team in its replica its part of that one's slab."""

    FROM_TEAM = "from_team"
    """Every member of the team sends every holder among its peers its part of the slab's result."""


@dataclass(frozen=True, slots=True)
class AllToAll:
    """One packed, uneven all-to-all among the ranks that differ along `mesh_dims` only."""

    mesh_dims: tuple[str, ...]
    route: Route


Collective = AllToAll


@dataclass(frozen=True, slots=True)
class Local:
    """One rank holds the whole matrix, and no other rank holds any of it. Nothing moves."""


@dataclass(frozen=True, slots=True)
class Owned:
    """One rank orthogonalizes the matrix for all that hold a part of it.

    `unshard_dims`: mesh dims along which its pieces lie apart (none: every replica holds it
    whole). `replica_dims`: mesh dims along which the pieces are repeated. `hops`: the way back,
    1 = the owner sends every holder its piece directly, 2 = to its own replica, which passes the
    pieces on. `is_staged`: pieces travel along one mesh dim after the other, the innermost first,
    in smaller groups, and back the same way; else along all of them at once.
    """

    unshard_dims: tuple[str, ...]
    replica_dims: tuple[str, ...]
    hops: int
    is_staged: bool = False


@dataclass(frozen=True, slots=True)
class Gathered:
    """Every holder gets the whole matrix and orthogonalizes it for itself; nothing goes back.

    `unshard_dims` and `replica_dims` as for Owned; replicas send each other nothing.
    """

    unshard_dims: tuple[str, ...]
    replica_dims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gram:
    """A team of ranks orthogonalizes the matrix together, each a slab of its long side.

    The members differ along `team_dims`; `unshard_dims` and `replica_dims` as for Owned. Each adds
    its part to the Gram matrix of the short side, computes its rows of a polynomial of that, and
    multiplies its slab; see `orthogonalize.gram`. `is_in_place`: the slabs are the shards.
    Rounds otherwise than the iteration on the whole matrix.
    """

    unshard_dims: tuple[str, ...]
    replica_dims: tuple[str, ...]
    team_dims: tuple[str, ...]
    is_in_place: bool


Strategy = Local | Owned | Gathered | Gram


def gram_segments(num_iterations: int) -> tuple[int, ...]:
    """How many iterations a team makes before it computes the Gram matrix anew: 2, then 3 each.

    With five in all that is one restart after the second, which keeps float32 within 5e-4 of the
    plain iteration (tests/test_strategies.py measures it); later ones do so for more iterations.
    """
    rest = num_iterations - 2
    if rest <= 0:
        return (num_iterations,) if num_iterations else ()
    return (2, *([3] * (rest // 3)), *([rest % 3] if rest % 3 else []))


STRATEGIES = ("auto", "owned", "owned_staged", "gathered", "gram")
"""What `PlanOptions.strategy` may say. A matrix whole on one rank alone is Local in any case."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One matrix and the position that orthogonalizes it.

    `param` indexes `Plan.params`, `matrix` that parameter's `matrices`; `owner` is a position on
    the mesh of the bucket: of a gathered matrix the first of those that orthogonalize it, of a
    team its first member.
    """

    param: int
    matrix: int
    owner: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another strategy for the matrices that travel as those of a bucket do.

    `seconds`: what a step of these matrices alone would take by it (gram: of all matrices, where
    teams share what they may), None where nobody priced it;
    `reason`: why it was not taken.
    """

    strategy: Strategy
    seconds: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """Matrices moved by one set of collectives: of one mesh, one wire dtype, one strategy.

    `seconds`: what a step of all matrices that travel like these would take alone, as predicted,
    and `alternatives`: what else was thought of.
    """

    mesh: MeshSpec
    strategy: Strategy
    wire_dtype: str
    assignments: tuple[Assignment, ...]
    unshard: tuple[Collective, ...]
    reshard: tuple[Collective, ...]
    seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()


class Phase(StrEnum):
    """What the executor does with one bucket; the letter is how a schedule prints it."""

    UNSHARD = "U"
    """Momentum, direction, pack, issue the collectives that bring matrices to their owners."""
    WAIT = "W"
    """Wait for them; the sent pieces are let go."""
    ORTHOGONALIZE = "O"
    """Every owner orthogonalizes its matrices."""
    RESHARD = "R"
    """Issue the first collective that hands the results back."""
    APPLY = "A"
    """Wait for it, run those that follow, weight decay and update of the local shards."""


@dataclass(frozen=True, slots=True)
class Action:
    """One phase of one bucket. Prints as a token, `U3`, and `Action.parse` reads it back."""

    phase: Phase
    bucket: int

    def __str__(self) -> str:
        return f"{self.phase.value}{self.bucket}"

    @classmethod
    def parse(cls, token: str) -> "Action":
        """Inverse of `str`. Raises ValueError for what is no token."""
        return cls(Phase(token[:1]), int(token[1:]))


DEVICE_BATCH_NUMEL = 1 << 22
"""Elements that a device packs at once where it may: launches no longer count for so many. The
host takes at most as many as the largest piece has, which stay in its cache."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user may say about the plan as a whole.

    `bucket_nbytes`: most bytes of buffers one bucket may hold on any rank; a matrix that needs
    more by itself travels alone. `prefetch_count`: buckets whose exchange is in flight while
    another is orthogonalized. `batched`: whether an owner stacks its equal-shaped matrices of a
    bucket, as many as `bucket_nbytes` hold, into one batch (faster on GPUs, rounds differently).
    `sequential`: ranks orthogonalize one after the other, in the order of global ranks; for
    debugging. `strategy`: one of STRATEGIES; "auto" takes the one that is predicted to be fastest
    on `topology`, and with `exact` False maybe
    Gram.
    """

    bucket_nbytes: int = 256 * 2**20
    prefetch_count: int = 1
    batched: bool = False
    sequential: bool = False
    strategy: str = "auto"
    exact: bool = True
    topology: Topology = PRESETS["h100-ib-400"]

    def most_batched(self, matrix_nbytes: int) -> int:
        """How many matrices of this size are orthogonalized together at most."""
        return max(1, self.bucket_nbytes // max(1, matrix_nbytes)) if self.batched else 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if type(self.exact) is not bool or not isinstance(self.topology, Topology):
            raise ValueError("exact is True or False, topology a Topology")
        if self.strategy == "gram" and self.exact:
            raise ValueError("strategy='gram' rounds differently: say exact=False as well")
        if self.strategy == "gram" and self.sequential:
            raise ValueError("strategy='gram' lets ranks work together: not one after the other")
        if type(self.bucket_nbytes) is not int or self.bucket_nbytes < 1:
            raise ValueError(f"bucket_mb must be above 0, got {self.bucket_nbytes} bytes")
        if type(self.prefetch_count) is not int or self.prefetch_count < 0:
            raise ValueError(
                f"prefetch_count must be an integer from 0 on, got {self.prefetch_count}"
            )
        if type(self.batched) is not bool or type(self.sequential) is not bool:
            raise ValueError("batched and sequential are True or False")


@dataclass(frozen=True)
class Plan:
    """What one step does on every rank: a value, equal on all of them."""

    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    schedule: tuple[Action, ...]
    options: PlanOptions

    def spec(self, assignment: Assignment) -> ParamSpec:
        """The parameter that holds this matrix."""
        return self.params[assignment.param]

    def matrix(self, assignment: Assignment) -> Matrix:
        """The matrix itself."""
        return self.params[assignment.param].matrices[assignment.matrix]

    def holders(self, assignment: Assignment) -> dict[int, Region]:
        """Who in one replica holds which piece of this matrix; see `Layout.holders`."""
        return self.spec(assignment).layout.holders(self.matrix(assignment).region)

    @cached_property
    def meshes(self) -> tuple[MeshSpec, ...]:
        """The meshes of the parameters, each once, in the order of the parameters."""
        return tuple(dict.fromkeys(spec.layout.mesh for spec in self.params))

    @cached_property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Per parameter the global ranks that orthogonalize its matrices, in matrix order."""
        owners: dict[str, list[tuple[int, int]]] = {spec.fqn: [] for spec in self.params}
        for bucket in self.buckets:
            for assignment in bucket.assignments:
                rank = bucket.mesh.ranks[assignment.owner]
                owners[self.spec(assignment).fqn].append((assignment.matrix, rank))
        return {fqn: tuple(rank for _, rank in sorted(found)) for fqn, found in owners.items()}

    @cached_property
    def bucket_costs(self) -> "tuple[BucketCost, ...]":
        """What each bucket moves, computes and holds."""
        from muon_dtensor.planning.volumes import bucket_cost

        return tuple(bucket_cost(self, bucket) for bucket in self.buckets)

    @cached_property
    def cost(self) -> "PlanCost":
        """Bytes, flops and buffers of every rank, and the lower bounds."""
        from muon_dtensor.planning.cost import plan_cost

        return plan_cost(self)

    @cached_property
    def prediction(self) -> "Prediction":
        """How long a step takes on the topology of the options."""
        from muon_dtensor.planning.predict import predict

        return predict(self)

    def summary(self) -> str:
        """The plan as one screen of text; the same as `str(plan)`."""
        from muon_dtensor.planning.render import summary

        return summary(self)

    def explain(self, fqn: str) -> str:
        """All that happens to one parameter. Raises ValueError for an unknown name."""
        from muon_dtensor.planning.render import explain

        return explain(self, fqn)

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` reads it back to an equal plan."""
        from muon_dtensor.planning.serialize import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of `to_json`. Raises ValueError for what is no plan, or breaks `check`."""
        from muon_dtensor.planning.serialize import from_json

        return from_json(text)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON text, in hex: equal digests are equal plans."""
        from muon_dtensor.planning.serialize import digest

        return digest(self)

    def __str__(self) -> str:
        return self.summary()
