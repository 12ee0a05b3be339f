"""Plan values: what one step does on every rank.

`planner.plan_update` returns a Plan, `report` prints it, `check` validates it, and the executor
runs it.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.strategies import Collective, Strategy, strategies_for
from muon_dtensor.planning.topology import Topology


@dataclass(frozen=True)
class ParamSpec:
    """One parameter as input of the planner.

    `matrices`: cover each element exactly once. `num_iterations`: of Newton-Schulz. `wire_dtype`:
    dtype in which matrices are orthogonalized and sent. `dtype`: of the stored parameter.
    `moment_cuts`: mesh dims that cut NorMuon's row second moments, see `planning.normuon_state`;
    None without NorMuon. `can_distribute`: whether several ranks can orthogonalize one matrix
    together; False for a user's orthogonalizer, which needs whole matrices, and for NorMuon.
    `shards_momentum`: whether the momentum is cut over the ranks that replicate the parameter.
    `is_offloaded`: whether its shards are on the host of the devices that orthogonalize.
    """

    fqn: str
    layout: Layout
    dtype: str
    matrices: tuple[Matrix, ...]
    num_iterations: int = 5
    wire_dtype: str = "bfloat16"
    moment_cuts: tuple[str, ...] | None = None
    can_distribute: bool = True
    shards_momentum: bool = False
    is_offloaded: bool = False

    def __post_init__(self) -> None:
        if not all(type(text) is str for text in (self.fqn, self.dtype, self.wire_dtype)):
            raise ValueError("names and dtypes must be strings")
        if self.moment_cuts and (not self.layout.cuts or self.moment_cuts != self.layout.cuts[0]):
            raise ValueError(
                f"moment_cuts must be empty or the cuts of tensor dim 0, got {self.moment_cuts}"
            )
        for name in ("can_distribute", "shards_momentum", "is_offloaded"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if type(self.num_iterations) is not int or self.num_iterations < 0:
            raise ValueError(
                f"num_iterations must be an integer of at least 0, got {self.num_iterations}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def momentum_layout(self) -> Layout:
        """The layout of the momentum, and so of the pieces that owners collect."""
        return self.layout.over_replicas if self.shards_momentum else self.layout

    @property
    def gathered_dims(self) -> tuple[str, ...]:
        """Mesh dims that cut the momentum and replicate the parameter.

        Each rank receives its pieces of the result, and an all-gather over these dims gives it
        those of the other replicas.
        """
        return self.layout.replica_dims if self.momentum_layout is not self.layout else ()

    def strategies(self, region: Region) -> tuple[Strategy, ...]:
        """Return `strategies_for` a non-empty matrix of this parameter, or a slab of one."""
        return strategies_for(self.momentum_layout, region, self.gathered_dims)


EXACT_STRATEGIES = ("auto", "owned", "owned_staged")
STRATEGIES = (*EXACT_STRATEGIES, "distributed")
"""Values of `PlanOptions.strategy`. A matrix stored on one rank only is always local."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One matrix and the position that orthogonalizes it.

    `param` indexes `Plan.params`, `matrix` that parameter's `matrices`; `owner` is a position on
    the mesh of the bucket. In a distributed bucket each member of a team has an assignment, and
    `slab` is its box of the matrix; None: all of it.
    """

    param: int
    matrix: int
    owner: int
    slab: Region | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A strategy that was not chosen for the group of matrices that a bucket belongs to.

    `seconds`: predicted for a step of this group alone. `reason`: why it was not chosen.
    """

    strategy: Strategy
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """Matrices of one mesh, wire dtype and strategy that are moved by one set of collectives.

    `seconds`: predicted for a step of its group alone; a group is all matrices that could share a
    bucket with these (see `search.GroupKey`). `alternatives`: the other legal strategies.
    """

    mesh: MeshSpec
    strategy: Strategy
    wire_dtype: str
    assignments: tuple[Assignment, ...]
    seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()

    @property
    def num_matrices(self) -> int:
        return len({(a.param, a.matrix) for a in self.assignments})

    @property
    def unshard(self) -> tuple[Collective, ...]:
        """The collectives that send the pieces to the owners, in order."""
        return self.strategy.unshard

    @property
    def reshard(self) -> tuple[Collective, ...]:
        """The collectives that send the results back to the holders, in order."""
        return self.strategy.reshard(self.mesh.dim_names)


class Phase(StrEnum):
    """One phase of a bucket in the executor; a schedule prints its letter."""

    UNSHARD = "U"
    """Update momenta, pack directions, issue the first collective that sends them to the owners."""
    WAIT = "W"
    """Wait for it, run the other collectives of the unshard, release the sent pieces."""
    ORTHOGONALIZE = "O"
    """Owners orthogonalize their matrices."""
    RESHARD = "R"
    """Issue the first collective that sends the results back."""
    PASS_ON = "P"
    """Wait for it, and issue the second one, if there is one: to replicas, or the next stage."""
    APPLY = "A"
    """Wait for the last one issued, run the others, decay and update the local shards."""


@dataclass(frozen=True, slots=True)
class Action:
    """One phase of one bucket. Prints as a token, `U3`, and `Action.parse` reads it back."""

    phase: Phase
    bucket: int

    def __str__(self) -> str:
        return f"{self.phase.value}{self.bucket}"

    @classmethod
    def parse(cls, token: str) -> "Action":
        """Inverse of `str`. Raises ValueError if the text is not a token."""
        return cls(Phase(token[:1]), int(token[1:]))


DEVICE_BATCH_NUMEL = 1 << 22
"""The most elements that a device packs together: beyond this size launch overhead is negligible.
The host packs at most as many as its largest piece has, so that they stay in cache."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of the plan as a whole.

    `bucket_nbytes`: the most bytes of buffers of one bucket on any rank. A matrix that needs more
    has a bucket near its own size (see `buckets.OVER_CAP`). `prefetch_count`: number of buckets
    whose exchange is in flight while another one is orthogonalized. `batched`: owners stack
    equal-shaped matrices of a bucket, up to `bucket_nbytes`, into one batch (faster on GPUs, rounds
    differently). `sequential`: ranks orthogonalize one after the other in the order of global
    ranks, for debugging. `strategy`: one of STRATEGIES; "auto" is the strategy predicted to be
    fastest on `topology`. `exact`: only strategies that are bitwise equal to one rank, which are
    all except "distributed".
    """

    bucket_nbytes: int = 256 * 2**20
    prefetch_count: int = 1
    batched: bool = False
    sequential: bool = False
    strategy: str = "auto"
    exact: bool = True
    topology: Topology = PRESETS["h100-ib-400"]

    def max_batch(self, matrix_nbytes: int) -> int:
        """Return the most matrices of this size that are orthogonalized as one batch."""
        return max(1, self.bucket_nbytes // max(1, matrix_nbytes)) if self.batched else 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if type(self.exact) is not bool or not isinstance(self.topology, Topology):
            raise ValueError("exact must be True or False, topology a Topology")
        if type(self.bucket_nbytes) is not int or self.bucket_nbytes < 1:
            raise ValueError(f"bucket_mb must be above 0, got {self.bucket_nbytes} bytes")
        if type(self.prefetch_count) is not int or self.prefetch_count < 0:
            raise ValueError(
                f"prefetch_count must be an integer of at least 0, got {self.prefetch_count}"
            )
        if type(self.batched) is not bool or type(self.sequential) is not bool:
            raise ValueError("batched and sequential must be True or False")
        if self.strategy == "distributed" and not self.can_distribute:
            raise ValueError(
                "strategy='distributed' rounds differently from torch.optim.Muon, and its ranks "
                "compute at the same time: it needs exact=False and async_gpu_parallelism=True"
            )

    @property
    def can_distribute(self) -> bool:
        """Whether several ranks may orthogonalize one matrix together."""
        return not (self.exact or self.sequential)


@dataclass(frozen=True)
class Plan:
    """What one step does on every rank; equal on all ranks."""

    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    schedule: tuple[Action, ...]
    options: PlanOptions

    def spec(self, assignment: Assignment) -> ParamSpec:
        """Return the parameter of this matrix."""
        return self.params[assignment.param]

    def is_offloaded(self, bucket: Bucket) -> bool:
        """Whether the shards of a bucket are offloaded: those of all its matrices, or none."""
        return self.spec(bucket.assignments[0]).is_offloaded

    def matrix(self, assignment: Assignment) -> Matrix:
        """Return the matrix."""
        return self.params[assignment.param].matrices[assignment.matrix]

    def region(self, assignment: Assignment) -> Region:
        """Return the box that the owner orthogonalizes: the matrix, or a slab of it."""
        return assignment.slab or self.matrix(assignment).region

    def holder_numels(self, assignment: Assignment) -> tuple[tuple[int, int], ...]:
        """Return (home, elements of its piece) for each of `holders`."""
        return self.spec(assignment).momentum_layout.holder_numels(self.region(assignment))

    def holders(self, assignment: Assignment) -> dict[int, Region]:
        """Return {home: its piece of the matrix or slab}; see `Layout.holders`.

        The pieces are those of the momentum.
        """
        return self.spec(assignment).momentum_layout.holders(self.region(assignment))

    @cached_property
    def meshes(self) -> tuple[MeshSpec, ...]:
        """The distinct meshes of the parameters, in the order of the parameters."""
        return tuple(dict.fromkeys(spec.layout.mesh for spec in self.params))

    @cached_property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Per parameter, the global ranks that orthogonalize its matrices, in matrix order.

        A team is listed rank by rank.
        """
        owners: dict[str, list[tuple[int, int]]] = {spec.fqn: [] for spec in self.params}
        for bucket in self.buckets:
            for assignment in bucket.assignments:
                rank = bucket.mesh.ranks[assignment.owner]
                owners[self.spec(assignment).fqn].append((assignment.matrix, rank))
        return {fqn: tuple(rank for _, rank in sorted(pairs)) for fqn, pairs in owners.items()}
