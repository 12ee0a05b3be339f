"""The plan language: what a step does, as values.

A Plan is made by `planner.plan_update`, printed by `report`, validated by `check`, and carried out
by the executor.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.strategies import Collective, Strategy
from muon_dtensor.planning.topology import Topology


@dataclass(frozen=True)
class ParamSpec:
    """All a planner may know of one parameter.

    `matrices` hold each of its elements once. `num_iterations` of Newton-Schulz, in `wire_dtype`,
    which is also what travels. `dtype` is that of the stored parameter. `moment_cuts`:
    the mesh dims that cut NorMuon's row second moments, see `planning.normuon_state`; None without
    them.
    """

    fqn: str
    layout: Layout
    dtype: str
    matrices: tuple[Matrix, ...]
    num_iterations: int = 5
    wire_dtype: str = "bfloat16"
    moment_cuts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not all(type(text) is str for text in (self.fqn, self.dtype, self.wire_dtype)):
            raise ValueError("names and dtypes are strings")
        if self.moment_cuts and (not self.layout.cuts or self.moment_cuts != self.layout.cuts[0]):
            raise ValueError(f"moments are cut as tensor dim 0 is or not, got {self.moment_cuts}")
        if type(self.num_iterations) is not int or self.num_iterations < 0:
            raise ValueError(f"num_iterations is an integer from 0 on, got {self.num_iterations}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape


STRATEGIES = ("auto", "owned", "owned_staged")
"""Values of `PlanOptions.strategy`. A matrix that one rank alone holds is local in any case."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One matrix and the position that orthogonalizes it.

    `param` indexes `Plan.params`, `matrix` that parameter's `matrices`; `owner` is a position on
    the mesh of the bucket.
    """

    param: int
    matrix: int
    owner: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another strategy for the matrices that travel as those of a bucket do.

    `seconds`: predicted for a step of these matrices alone. `reason`: why it was not taken.
    """

    strategy: Strategy
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """Matrices moved by one set of collectives: of one mesh, one wire dtype, one strategy.

    `seconds`: predicted for a step of all matrices that travel as these do. `alternatives`: the
    other legal strategies.
    """

    mesh: MeshSpec
    strategy: Strategy
    wire_dtype: str
    assignments: tuple[Assignment, ...]
    seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()

    @property
    def unshard(self) -> tuple[Collective, ...]:
        """The collectives that bring the pieces to the owners, in order."""
        return self.strategy.unshard

    @property
    def reshard(self) -> tuple[Collective, ...]:
        """The collectives that hand the results back, in order."""
        return self.strategy.reshard(self.mesh.dim_names)


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
"""Elements that a device packs together where it may: launches no longer count for so many. The
host takes at most as many as the largest piece has, which stay in its cache."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user may say about the plan as a whole.

    `bucket_nbytes`: most bytes of buffers one bucket may hold on any rank; a matrix that needs
    more than that travels alone. `prefetch_count`: buckets whose exchange is in flight while
    another is orthogonalized. `batched`: whether an owner stacks its equal-shaped matrices of a
    bucket, as many as `bucket_nbytes` hold, into one batch (faster on GPUs, rounds differently).
    `sequential`: ranks orthogonalize one after the other, in the order of global ranks; for
    debugging. `strategy`: one of STRATEGIES; "auto" takes the one that is predicted to be fastest
    on `topology`. `exact`: only strategies that give the bits of one rank.
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
