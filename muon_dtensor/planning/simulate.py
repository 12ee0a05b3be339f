"""A simulated step: a plan run on every rank's clock, with the prices of a topology.

Each rank has a lane for the host and compute and a lane for exchanges. Ranks wait for each other
where collectives make them.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from muon_dtensor.layout import Matrix, MeshSpec
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.plan import Action, Assignment, Plan
from muon_dtensor.planning.schedule import Apply, Compute, Fill, Hop, Program, Send, Wait, lower
from muon_dtensor.planning.topology import Topology
from muon_dtensor.planning.traffic import BucketTraffic

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class PredictedSpan:
    """What one rank does from `start` to `stop`, seconds from the beginning of the step."""

    rank: int
    lane: str
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step; per bucket those of its slowest exchange lane and compute lane.

    `spans`: of the ranks that were watched.
    """

    seconds: float
    exchange_seconds: tuple[float, ...]
    compute_seconds: tuple[float, ...]
    spans: tuple[PredictedSpan, ...]


def simulate(plan: Plan, costs: Sequence[BucketTraffic], watch: Collection[int] = ()) -> Prediction:
    """Run the schedule; `costs`: of the buckets, `watch`: global ranks whose spans are recorded.

    Sets of ranks run one after the other, as the schedule has them, and each begins when the last
    of its ranks is done with those before.
    """
    exchange, compute = [0.0] * len(costs), [0.0] * len(costs)
    spans: list[PredictedSpan] = []
    clock: dict[int, float] = {}
    end = overhead = plan.options.topology.step_overhead
    for rank_set, actions in groupby(plan.schedule, lambda a: plan.buckets[a.bucket].mesh.rank_set):
        start = max(clock.get(rank, overhead) for rank in rank_set)
        walk = _Walk(plan, costs, sorted(rank_set), watch)
        stop = start + walk.run(actions)
        for rank in rank_set:
            clock[rank] = stop
        end = max(end, stop)
        for bucket in walk.exchange:
            exchange[bucket] += walk.exchange[bucket]
        for bucket in walk.compute:
            compute[bucket] += walk.compute[bucket]
        spans += [
            PredictedSpan(s.rank, s.lane, s.action, s.start + start, s.stop + start)
            for s in walk.spans
        ]
    return Prediction(end, tuple(exchange), tuple(compute), tuple(spans))


class _Walk:
    """One set of ranks on its way through the schedule. Times by index among its sorted ranks."""

    def __init__(
        self,
        plan: Plan,
        costs: Sequence[BucketTraffic],
        ranks: Sequence[int],
        watch: Collection[int],
    ) -> None:
        self.plan = plan
        self.topology = plan.options.topology
        self.costs = costs
        self.ranks = ranks
        self.watch = [index for index, rank in enumerate(ranks) if rank in watch]
        self.host = [0.0] * len(ranks)
        self.wire = [0.0] * len(ranks)
        self.landed: dict[int, list[float]] = {}
        self.exchange: dict[int, float] = defaultdict(float)
        self.compute: dict[int, float] = defaultdict(float)
        self.spans: list[PredictedSpan] = []
        self._index_of = {rank: index for index, rank in enumerate(ranks)}
        self._orders: dict[MeshSpec, list[int]] = {}
        self._groups: dict[tuple[MeshSpec, tuple[str, ...]], list[list[int]]] = {}

    def run(self, actions: Iterable[Action]) -> float:
        """Seconds until the last rank is done."""
        program: Program = lower(list(actions), {i: c.sequence for i, c in enumerate(self.costs)})
        for action, events in program:
            cost = self.costs[action.bucket]
            for event in events:
                match event:
                    case Fill():
                        self._work(action, self._packing(cost))
                    case Send(hop=hop):
                        self._send(action, cost, hop)
                    case Wait():
                        self._wait(action.bucket)
                    case Compute():
                        self._orthogonalize(action, cost)
                    case Apply():
                        self._work(action, self._applying(cost))
        return max(self.host, default=0.0)

    def _order(self, mesh: MeshSpec) -> list[int]:
        """Index of each position of a mesh."""
        if mesh not in self._orders:
            self._orders[mesh] = [self._index_of[rank] for rank in mesh.ranks]
        return self._orders[mesh]

    def _groups_of(self, mesh: MeshSpec, mesh_dims: tuple[str, ...]) -> list[list[int]]:
        """Positions of each group along some mesh dims."""
        key = (mesh, mesh_dims)
        if key not in self._groups:
            others = tuple(name for name in mesh.dim_names if name not in mesh_dims)
            groups: dict[int, list[int]] = defaultdict(list)
            for position in range(mesh.num_ranks):
                groups[mesh.index_along(position, others)].append(position)
            self._groups[key] = list(groups.values())
        return self._groups[key]

    def _work(self, action: Action, seconds: Sequence[float]) -> None:
        """Let each position compute for so long; those that share cores slow each other down."""
        mesh = self.plan.buckets[action.bucket].mesh
        order = self._order(mesh)
        shared = self._shared(mesh, seconds)
        self.compute[action.bucket] += max(shared, default=0.0)
        for position, duration in enumerate(shared):
            self.host[order[position]] += duration
        self._watched(action, "compute", self.host, order, shared)

    def _watched(
        self,
        action: Action,
        lane: str,
        stops: Sequence[float],
        order: Sequence[int],
        durations: Sequence[float],
    ) -> None:
        if not self.watch:
            return
        positions = {index: position for position, index in enumerate(order)}
        for index in self.watch:
            duration = durations[positions[index]]
            if duration > 0:
                stop = stops[index]
                span = PredictedSpan(self.ranks[index], lane, action, stop - duration, stop)
                self.spans.append(span)

    def _shared(self, mesh: MeshSpec, seconds: Sequence[float]) -> Sequence[float]:
        cores = self.topology.cores
        if cores is None:
            return seconds
        totals: dict[int, float] = defaultdict(float)
        active: dict[int, int] = defaultdict(int)
        nodes = [rank // self.topology.node_size for rank in mesh.ranks]
        for node, duration in zip(nodes, seconds, strict=True):
            totals[node] += duration
            active[node] += duration > 0
        return [
            max(own, min(own * active[node] / cores, totals[node] / cores))
            for node, own in zip(nodes, seconds, strict=True)
        ]

    def _send(self, action: Action, cost: BucketTraffic, hop: Hop) -> None:
        """One collective: begins when the last of its group is there, ends for all at once."""
        topology, mesh = self.topology, cost.bucket.mesh
        launch = [topology.collective_overhead] * mesh.num_ranks
        if hop.repacks:
            launch = [
                topology.collective_overhead + topology.memory_seconds(2 * cost.itemsize * numel)
                for numel in cost.buffers[hop.send]
            ]
        self._work(action, launch)
        mesh_dims = hop.collective.mesh_dims
        order = self._order(mesh)
        sent, received = cost.sent_nbytes(hop), cost.received_nbytes(hop)
        landed = self.landed.setdefault(action.bucket, [0.0] * len(self.ranks))
        durations = [0.0] * len(order)
        for group in self._groups_of(mesh, mesh_dims):
            most = float(max(max(sent[p], received[p]) for p in group))
            if topology.cores is not None:
                # a rank that exchanges alone has the cores to itself
                mean = sum(sent[p] for p in group) / len(group)
                most = max(mean, most * min(1.0, topology.cores / len(group)))
            seconds = topology.all_to_all_seconds(mesh, mesh_dims, most)
            start = max(max(self.host[order[p]], self.wire[order[p]]) for p in group)
            for position in group:
                index = order[position]
                self.wire[index] = landed[index] = start + seconds
                durations[position] = seconds
                if topology.cores is not None:
                    self.host[index] = start + seconds
        self.exchange[action.bucket] += max(durations, default=0.0)
        self._watched(action, "exchange", self.wire, order, durations)

    def _wait(self, bucket: int) -> None:
        landed = self.landed.pop(bucket, None)
        if landed is not None:
            self.host = [max(a, b) for a, b in zip(self.host, landed, strict=True)]

    def _packing(self, cost: BucketTraffic) -> list[float]:
        """Momentum of all that is touched, then direction and cast of what is packed."""
        each, size = self.topology.tensor_overhead, self._param_itemsize(cost)
        memory, itemsize = self.topology.memory_seconds, cost.itemsize
        return [
            each * num + memory(packed_nbytes(size, itemsize, touched=touched, pieces=pieces))
            for num, touched, pieces in zip(
                cost.num_touched, cost.touched, cost.pieces, strict=True
            )
        ]

    def _applying(self, cost: BucketTraffic) -> list[float]:
        """Decay and update of all that is touched."""
        each, size = self.topology.tensor_overhead, self._param_itemsize(cost)
        memory, itemsize = self.topology.memory_seconds, cost.itemsize
        return [
            each * num + memory(applied_nbytes(size, itemsize, touched=touched))
            for num, touched in zip(cost.num_touched, cost.touched, strict=True)
        ]

    def _param_itemsize(self, cost: BucketTraffic) -> int:
        return ITEMSIZES.get(self.plan.spec(cost.bucket.assignments[0]).dtype, 4)

    def _orthogonalize(self, action: Action, cost: BucketTraffic) -> None:
        bucket, plan, topology = cost.bucket, self.plan, self.topology
        seconds = [0.0] * bucket.mesh.num_ranks

        def price(matrix: Matrix, num_iterations: int) -> float:
            return orthogonalize_seconds(topology, matrix, num_iterations, bucket.wire_dtype)

        for a, taken in priced(bucket.assignments, self._size, price):
            seconds[a.owner] += taken
        total = [a + b for a, b in zip(seconds, self._assembling(cost), strict=True)]
        if plan.options.sequential:
            self._in_turn(action, total)
        else:
            self._work(action, total)

    def _size(self, assignment: Assignment) -> tuple[Matrix, int]:
        return self.plan.matrix(assignment), self.plan.spec(assignment).num_iterations

    def _assembling(self, cost: BucketTraffic) -> list[float]:
        """Matrices are assembled from pieces, and results taken apart: two copies."""
        each, copied = (
            self.topology.tensor_overhead,
            4 * cost.itemsize if cost.sequence.unshard else 0,
        )
        return [
            each * num + self.topology.memory_seconds(copied * numel)
            for num, numel in zip(cost.num_parts, cost.wholes, strict=True)
        ]

    def _in_turn(self, action: Action, seconds: Sequence[float]) -> None:
        mesh = self.plan.buckets[action.bucket].mesh
        order = self._order(mesh)
        turn = max(self.host)
        for position in sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__):
            turn += seconds[position]
            self.host[order[position]] = turn
        self.compute[action.bucket] += sum(seconds)
        self._watched(action, "compute", self.host, order, seconds)
        self.host = [turn] * len(self.host)


def packed_nbytes(itemsize: int, wire_itemsize: int, *, touched: int, pieces: int) -> int:
    """Bytes that packing reads and writes, of so many touched and packed elements.

    The moving average of the momentum reads two and writes one; so does the direction, and the
    cast reads that and writes the wire dtype.
    """
    return 3 * itemsize * touched + (4 * itemsize + wire_itemsize) * pieces


def applied_nbytes(itemsize: int, wire_itemsize: int, *, touched: int) -> int:
    """Bytes of decay, which reads and writes a shard, and update, which also reads the result."""
    return (4 * itemsize + wire_itemsize) * touched


def priced(
    things: Iterable[T],
    size_of: Callable[[T], tuple[Matrix, int]],
    price: Callable[[Matrix, int], V],
) -> Iterator[tuple[T, V]]:
    """Each thing with the price of its matrix and iterations, which is asked once for each size."""
    known: dict[tuple[int, int, int], V] = {}
    for thing in things:
        matrix, num_iterations = size_of(thing)
        key = (matrix.rows, matrix.cols, num_iterations)
        if key not in known:
            known[key] = price(matrix, num_iterations)
        yield thing, known[key]


def orthogonalize_seconds(
    topology: Topology, matrix: Matrix, num_iterations: int, wire_dtype: str
) -> float:
    """One matrix on one rank by itself."""
    flops = matrix_flops(matrix, num_iterations)
    return topology.matmul_seconds(flops, min(matrix.rows, matrix.cols), wire_dtype)
