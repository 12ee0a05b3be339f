"""Simulate a step: predict the time of a plan on every rank of a topology.

Each rank has a lane for host and compute and a lane for exchanges. A collective starts when the
last rank of its group has reached it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from muon_dtensor.layout import Matrix, MeshSpec
from muon_dtensor.planning.matrix_costs import ITEMSIZES, gram_itemsize, matrix_flops
from muon_dtensor.planning.plan import Action, Assignment, Plan
from muon_dtensor.planning.schedule import Apply, Compute, Fill, Hop, Program, Send, Wait, lower
from muon_dtensor.planning.strategies import AllGather, Collective, Distributed
from muon_dtensor.planning.topology import Topology
from muon_dtensor.planning.traffic import BucketTraffic

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class PredictedSpan:
    """One action on one lane of a rank, from `start` to `stop` in seconds since the step began."""

    rank: int
    lane: str
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and per bucket those of its slowest exchange lane and compute lane.

    `spans`: those of the ranks in `watch`.
    """

    seconds: float
    exchange_seconds: tuple[float, ...]
    compute_seconds: tuple[float, ...]
    spans: tuple[PredictedSpan, ...]


def simulate(plan: Plan, costs: Sequence[BucketTraffic], watch: Collection[int] = ()) -> Prediction:
    """Return the predicted times of a plan.

    Sets of ranks run in the order of the schedule. Each starts when the last of its ranks has
    finished the sets before.

    Args:
        plan: the plan, with the topology in its options.
        costs: traffic of its buckets.
        watch: global ranks whose spans are recorded.
    """
    exchange, compute = [0.0] * len(costs), [0.0] * len(costs)
    spans: list[PredictedSpan] = []
    clock: dict[int, float] = {}
    end = overhead = plan.options.topology.step_overhead
    for rank_set, actions in groupby(plan.schedule, lambda a: plan.buckets[a.bucket].mesh.rank_set):
        start = max(clock.get(rank, overhead) for rank in rank_set)
        simulator = _Simulator(plan, costs, sorted(rank_set), watch)
        stop = start + simulator.run(actions)
        for rank in rank_set:
            clock[rank] = stop
        end = max(end, stop)
        for bucket in simulator.exchange:
            exchange[bucket] += simulator.exchange[bucket]
        for bucket in simulator.compute:
            compute[bucket] += simulator.compute[bucket]
        spans += [
            PredictedSpan(s.rank, s.lane, s.action, s.start + start, s.stop + start)
            for s in simulator.spans
        ]
    return Prediction(end, tuple(exchange), tuple(compute), tuple(spans))


class _Simulator:
    """Simulates one set of ranks. Lists of times are indexed by the index of a rank in `ranks`."""

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
        self.arrivals: dict[int, list[float]] = {}
        self.exchange: dict[int, float] = defaultdict(float)
        self.compute: dict[int, float] = defaultdict(float)
        self.spans: list[PredictedSpan] = []
        self._index_of = {rank: index for index, rank in enumerate(ranks)}
        self._orders: dict[MeshSpec, list[int]] = {}
        self._groups: dict[tuple[MeshSpec, tuple[str, ...]], list[list[int]]] = {}

    def run(self, actions: Iterable[Action]) -> float:
        """Return the seconds until the last rank has finished."""
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
        """Return the rank index of each position of a mesh."""
        if mesh not in self._orders:
            self._orders[mesh] = [self._index_of[rank] for rank in mesh.ranks]
        return self._orders[mesh]

    def _groups_of(self, mesh: MeshSpec, mesh_dims: tuple[str, ...]) -> list[list[int]]:
        """Return the positions of each process group along some mesh dims."""
        key = (mesh, mesh_dims)
        if key not in self._groups:
            fixed_dims = tuple(name for name in mesh.dim_names if name not in mesh_dims)
            groups: dict[int, list[int]] = defaultdict(list)
            for position in range(mesh.num_ranks):
                groups[mesh.index_along(position, fixed_dims)].append(position)
            self._groups[key] = list(groups.values())
        return self._groups[key]

    def _work(self, action: Action, seconds: Sequence[float]) -> None:
        """Advance each position by its seconds of compute, scaled where ranks share cores."""
        mesh = self.plan.buckets[action.bucket].mesh
        order = self._order(mesh)
        durations = self._with_shared_cores(mesh, seconds)
        self.compute[action.bucket] += max(durations, default=0.0)
        for position, duration in enumerate(durations):
            self.host[order[position]] += duration
        self._record(action, "compute", self.host, order, durations)

    def _record(
        self,
        action: Action,
        lane: str,
        stops: Sequence[float],
        order: Sequence[int],
        durations: Sequence[float],
    ) -> None:
        """Append the spans of the watched ranks; each ends at its value in `stops`."""
        if not self.watch:
            return
        positions = {index: position for position, index in enumerate(order)}
        for index in self.watch:
            duration = durations[positions[index]]
            if duration > 0:
                stop = stops[index]
                span = PredictedSpan(self.ranks[index], lane, action, stop - duration, stop)
                self.spans.append(span)

    def _with_shared_cores(self, mesh: MeshSpec, seconds: Sequence[float]) -> Sequence[float]:
        """Return the seconds of each position, longer where more ranks compute than cores allow."""
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
            max(duration, min(duration * active[node] / cores, totals[node] / cores))
            for node, duration in zip(nodes, seconds, strict=True)
        ]

    def _send(self, action: Action, cost: BucketTraffic, hop: Hop) -> None:
        """Issue a collective: it starts with the last rank of its group and ends on all of them."""
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
        arrivals = self.arrivals.setdefault(action.bucket, [0.0] * len(self.ranks))
        durations = [0.0] * len(order)
        for group in self._groups_of(mesh, mesh_dims):
            seconds = self._exchange_seconds(
                mesh, hop.collective, [sent[p] for p in group], [received[p] for p in group]
            )
            start = max(max(self.host[order[p]], self.wire[order[p]]) for p in group)
            for position in group:
                index = order[position]
                self.wire[index] = arrivals[index] = start + seconds
                durations[position] = seconds
                if topology.cores is not None:
                    self.host[index] = start + seconds
        self.exchange[action.bucket] += max(durations, default=0.0)
        self._record(action, "exchange", self.wire, order, durations)

    def _exchange_seconds(
        self, mesh: MeshSpec, collective: Collective, sent: Sequence[int], received: Sequence[int]
    ) -> float:
        """Return the seconds of a collective, from the bytes of each rank of the group."""
        topology, mesh_dims = self.topology, collective.mesh_dims
        nbytes = float(max(*sent, *received))
        if topology.cores is not None:
            # While only one rank still exchanges, it can use all cores.
            mean = sum(sent) / len(sent)
            nbytes = max(mean, nbytes * min(1.0, topology.cores / len(sent)))
        elif isinstance(collective, AllGather):
            part = max(received) // max(1, len(received) - 1)
            return topology.all_gather_seconds(mesh, mesh_dims, part)
        return topology.all_to_all_seconds(mesh, mesh_dims, nbytes)

    def _wait(self, bucket: int) -> None:
        arrivals = self.arrivals.pop(bucket, None)
        if arrivals is not None:
            self.host = [max(a, b) for a, b in zip(self.host, arrivals, strict=True)]

    def _packing(self, cost: BucketTraffic) -> list[float]:
        """Return the seconds to update momenta, and to compute and cast the packed directions."""
        overhead, size = self.topology.tensor_overhead, self._param_itemsize(cost)
        memory, itemsize = self.topology.memory_seconds, cost.itemsize
        return [
            overhead * num + memory(packed_nbytes(size, itemsize, momenta=momenta, pieces=pieces))
            for num, momenta, pieces in zip(
                cost.num_momenta, cost.momenta, cost.pieces, strict=True
            )
        ]

    def _applying(self, cost: BucketTraffic) -> list[float]:
        """Return the seconds to decay and update the stored pieces."""
        overhead, size = self.topology.tensor_overhead, self._param_itemsize(cost)
        memory, itemsize = self.topology.memory_seconds, cost.itemsize
        return [
            overhead * num + memory(applied_nbytes(size, itemsize, stored=stored))
            for num, stored in zip(cost.num_stored, cost.stored, strict=True)
        ]

    def _param_itemsize(self, cost: BucketTraffic) -> int:
        return ITEMSIZES.get(self.plan.spec(cost.bucket.assignments[0]).dtype, 4)

    def _orthogonalize(self, action: Action, cost: BucketTraffic) -> None:
        bucket, plan, topology = cost.bucket, self.plan, self.topology
        if isinstance(bucket.strategy, Distributed):
            self._orthogonalize_together(action, cost, bucket.strategy)
            return
        seconds = [0.0] * bucket.mesh.num_ranks

        def price(matrix: Matrix, num_iterations: int) -> float:
            return orthogonalize_seconds(topology, matrix, num_iterations, bucket.wire_dtype)

        for a, matrix_seconds in priced(bucket.assignments, self._size, price):
            seconds[a.owner] += matrix_seconds
        total = [a + b for a, b in zip(seconds, self._assembling(cost), strict=True)]
        if plan.options.sequential:
            self._work_sequentially(action, total)
        else:
            self._work(action, total)

    def _orthogonalize_together(
        self, action: Action, cost: BucketTraffic, strategy: Distributed
    ) -> None:
        """Advance the members of each team together; they wait for every exchange inside."""
        bucket, mesh = cost.bucket, cost.bucket.mesh
        compute, exchange = [0.0] * mesh.num_ranks, [0.0] * mesh.num_ranks
        prices: dict[tuple[int, int, int], tuple[float, float]] = {}
        for a in bucket.assignments:
            matrix, num_iterations = self._size(a)
            size = (matrix.rows, matrix.cols, num_iterations)
            if size not in prices:
                prices[size] = distributed_seconds(
                    self.topology, mesh, strategy, size, bucket.wire_dtype
                )
            compute[a.owner] += prices[size][0]
            exchange[a.owner] += prices[size][1]
        self._work(action, [a + b for a, b in zip(compute, self._assembling(cost), strict=True)])
        order = self._order(mesh)
        owners = (a.owner for a in bucket.assignments)
        teams = (mesh.team(p, strategy.team_dims, strategy.team_size) for p in owners)
        for team in dict.fromkeys(teams):
            stop = max(self.host[order[p]] for p in team) + max(exchange[p] for p in team)
            for position in team:
                self.host[order[position]] = stop
        self._record(action, "compute", self.host, order, exchange)

    def _size(self, assignment: Assignment) -> tuple[Matrix, int]:
        return self.plan.matrix(assignment), self.plan.spec(assignment).num_iterations

    def _assembling(self, cost: BucketTraffic) -> list[float]:
        """Return the seconds of two copies: assembling matrices, and splitting the results."""
        overhead = self.topology.tensor_overhead
        bytes_per_element = 4 * cost.itemsize if cost.sequence.unshard else 0
        return [
            overhead * num + self.topology.memory_seconds(bytes_per_element * numel)
            for num, numel in zip(cost.num_parts, cost.wholes, strict=True)
        ]

    def _work_sequentially(self, action: Action, seconds: Sequence[float]) -> None:
        """Advance the positions one after the other, in the order of global ranks."""
        mesh = self.plan.buckets[action.bucket].mesh
        order = self._order(mesh)
        stop = max(self.host)
        for position in sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__):
            stop += seconds[position]
            self.host[order[position]] = stop
        self.compute[action.bucket] += sum(seconds)
        self._record(action, "compute", self.host, order, seconds)
        self.host = [stop] * len(self.host)


def packed_nbytes(itemsize: int, wire_itemsize: int, *, momenta: int, pieces: int) -> int:
    """Return the bytes that packing reads and writes.

    The momentum update reads two values and writes one for each of `momenta` elements. For each of
    `pieces` elements, the direction reads two values and writes one, and the cast reads that one
    and writes the wire dtype.
    """
    return 3 * itemsize * momenta + (4 * itemsize + wire_itemsize) * pieces


def applied_nbytes(itemsize: int, wire_itemsize: int, *, stored: int) -> int:
    """Return the bytes that decay and update of `stored` elements read and write.

    Decay reads and writes a shard. The update does the same and also reads the result.
    """
    return (4 * itemsize + wire_itemsize) * stored


def priced(
    items: Iterable[T],
    size_of: Callable[[T], tuple[Matrix, int]],
    price: Callable[[Matrix, int], V],
) -> Iterator[tuple[T, V]]:
    """Yield each item with the price of its matrix and iterations; `price` runs once per size."""
    prices: dict[tuple[int, int, int], V] = {}
    for item in items:
        matrix, num_iterations = size_of(item)
        key = (matrix.rows, matrix.cols, num_iterations)
        if key not in prices:
            prices[key] = price(matrix, num_iterations)
        yield item, prices[key]


def orthogonalize_seconds(
    topology: Topology, matrix: Matrix, num_iterations: int, wire_dtype: str
) -> float:
    """Return the seconds to orthogonalize one matrix on one rank."""
    flops = matrix_flops(matrix, num_iterations)
    return topology.matmul_seconds(flops, min(matrix.rows, matrix.cols), wire_dtype)


def distributed_seconds(
    topology: Topology,
    mesh: MeshSpec,
    strategy: Distributed,
    size: tuple[int, int, int],
    dtype: str,
) -> tuple[float, float]:
    """Return the seconds of (compute, exchange) of one matrix on the ranks of a team.

    `size`: rows, cols and number of iterations. Products have the rate of a square one of as many
    flops. The host multiplies slabs in float32, because its bfloat16 products round the Gram matrix
    to bfloat16.
    """
    rows, cols, num_iterations = size
    short, team_size = min(rows, cols), strategy.team_size
    slab = -(-max(rows, cols) // team_size)
    num_poly_rows = -(-short // team_size) if strategy.shares_polynomial else short
    wide = "float32" if topology.cores is not None and dtype == "bfloat16" else dtype

    def product(m: int, n: int, inner: int, dtype: str) -> float:
        return topology.matmul_seconds(2 * m * n * inner, round((m * n * inner) ** (1 / 3)), dtype)

    def exchanged(nbytes: float) -> float:
        return topology.collective_overhead + topology.all_to_all_seconds(
            mesh, strategy.team_dims, nbytes, team_size
        )

    compute = (
        product(short, short, slab, wide)
        + product(num_poly_rows, short, short, dtype)
        + product(short, slab, short, dtype)
    )
    wire, gram = ITEMSIZES[dtype], gram_itemsize(dtype)
    others = short * short * (team_size - 1) / team_size
    num_gathers = 1 + strategy.shares_polynomial
    exchange = exchanged(gram * others) + num_gathers * exchanged(wire * others)
    # the sums, and the copies of what is gathered
    compute += topology.memory_seconds((gram + num_gathers * wire) * short * short)
    return num_iterations * compute, num_iterations * exchange + exchanged(
        2 * gram * (team_size - 1)
    )
