"""Memory of a step: exchange buffers over time, and work space in addition to them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

from muon_dtensor.planning.matrix_costs import ITEMSIZES, gram_itemsize
from muon_dtensor.planning.plan import DEVICE_BATCH_NUMEL, Plan
from muon_dtensor.planning.schedule import (
    Apply,
    Compute,
    Event,
    Fill,
    flat,
    lifetimes,
    live_sets,
    lower,
)
from muon_dtensor.planning.strategies import Distributed
from muon_dtensor.planning.traffic import BucketTraffic


class Peaks(NamedTuple):
    """The most bytes at any time of a step, per rank: of exchange buffers, and with work space."""

    buffer_nbytes: tuple[int, ...]
    total_nbytes: tuple[int, ...]


def bucket_peak_nbytes(traffic: BucketTraffic) -> int:
    """Return the most bytes of buffers that any rank holds for a bucket."""
    peak_numel = 0
    for numbers in live_sets(traffic.sequence):
        numels = zip(*(traffic.buffers[number] for number in numbers), strict=True)
        peak_numel = max(peak_numel, max(map(sum, numels), default=0))
    return traffic.itemsize * peak_numel


def peaks(plan: Plan, traffics: Sequence[BucketTraffic], index_of: dict[int, int]) -> Peaks:
    """Return the peaks of all ranks over the schedule; `index_of` is the index of each rank.

    On the host the buffers of a step are one block that is allocated for the whole step; see
    `buffer_placement`.
    """
    num_ranks = len(index_of)
    live, buffer_peaks, total_peaks, work_peaks = ([0] * num_ranks for _ in range(4))
    program = lower(plan.schedule, {i: t.sequence for i, t in enumerate(traffics)})
    lives = lifetimes(program)
    for index, (action, event) in enumerate(flat(program)):
        traffic = traffics[action.bucket]
        indices = [index_of[rank] for rank in traffic.bucket.mesh.ranks]
        numbers = dict.fromkeys(event.buffers)
        for number in [n for n in numbers if lives[action.bucket, n].first == index]:
            _add(live, indices, traffic.buffers[number], traffic.itemsize)
            for rank_index in compress(indices, traffic.buffers[number]):
                buffer_peaks[rank_index] = max(buffer_peaks[rank_index], live[rank_index])
        for position, extra in workspaces(plan, traffic, event).items():
            rank_index = indices[position]
            work_peaks[rank_index] = max(work_peaks[rank_index], extra)
            total_peaks[rank_index] = max(total_peaks[rank_index], live[rank_index] + extra)
        for number in numbers:
            if lives[action.bucket, number].last == index:
                _add(live, indices, traffic.buffers[number], -traffic.itemsize)
    total_peaks = list(map(max, total_peaks, buffer_peaks))
    if plan.options.topology.cores is not None:
        total_peaks = [block + extra for block, extra in zip(buffer_peaks, work_peaks, strict=True)]
    return Peaks(tuple(buffer_peaks), tuple(total_peaks))


def _add(totals: list[int], indices: Sequence[int], numels: Sequence[int], itemsize: int) -> None:
    for index, numel in zip(compress(indices, numels), filter(None, numels), strict=True):
        totals[index] += itemsize * numel


def state_nbytes(plan: Plan) -> int:
    """Return the most bytes of momenta, in the dtype of their parameters, that any rank stores."""
    totals: dict[int, int] = defaultdict(int)
    for (layout, dtype), count in Counter(
        (spec.momentum_layout, spec.dtype) for spec in plan.params
    ).items():
        for position, rank in enumerate(layout.mesh.ranks):
            totals[rank] += count * layout.region(position).numel * ITEMSIZES.get(dtype, 4)
    return max(totals.values(), default=0)


def offloaded_nbytes(plan: Plan, traffics: Sequence[BucketTraffic]) -> tuple[int, int]:
    """Return the most bytes that a rank copies to the device, and those of a rank back, per step.

    Of buckets with offloaded shards: packed directions and results, in their wire dtype.
    """
    to_device: Counter[int] = Counter()
    to_host: Counter[int] = Counter()
    for traffic in traffics:
        if not plan.is_offloaded(traffic.bucket):
            continue
        results = traffic.buffers[traffic.sequence.results]
        for rank, packed, result in zip(
            traffic.bucket.mesh.ranks, traffic.pieces, results, strict=True
        ):
            to_device[rank] += traffic.itemsize * packed
            to_host[rank] += traffic.itemsize * result
    return max(to_device.values(), default=0), max(to_host.values(), default=0)


def workspaces(plan: Plan, traffic: BucketTraffic, event: Event) -> dict[int, int]:
    """Return {position: bytes of work space during an event}; positions without any may be absent.

    Counts the tensors that the elementwise passes, the iteration and the executor allocate.
    """
    match event:
        case Fill() | Apply() if plan.is_offloaded(traffic.bucket):
            return {}  # on the host
        case Fill():
            return _packing(plan, traffic)
        case Compute():
            return _orthogonalizing(plan, traffic)
        case Apply():
            return _applying(plan, traffic)
        case _:
            return {}


def _applying(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """Return the bytes of the copies that reproduce how the host rounds narrow dtypes.

    If a parameter has the wire dtype, its update makes two float32 copies of a piece.
    """
    largest: dict[int, int] = defaultdict(int)
    if plan.options.topology.cores is None:
        return largest
    counted: set[tuple[int, bool]] = set()
    for a in traffic.bucket.assignments:
        spec, matrix, holders = plan.spec(a), plan.matrix(a), plan.holders(a)
        if spec.dtype != traffic.bucket.wire_dtype or spec.dtype != "bfloat16":
            continue
        is_tall = matrix.rows > matrix.cols > 1
        if (id(holders), is_tall) in counted:
            continue
        counted.add((id(holders), is_tall))
        for home, numel in plan.holder_numels(a):
            first = spec.layout.home(home)
            nbytes = (traffic.itemsize if is_tall else 8) * numel
            for offset in spec.layout.replica_offsets:
                largest[first + offset] = max(largest[first + offset], nbytes)
    return largest


def _packing(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """Return the bytes of directions before they are cast to the wire dtype.

    The host packs one piece at a time, or several that are together no larger than the largest
    piece. A device packs up to `DEVICE_BATCH_NUMEL` elements at a time.
    """
    largest: dict[int, int] = defaultdict(int)
    widest = 0
    counted: set[tuple[int, int, str]] = set()
    for a in traffic.bucket.assignments:
        spec, holders = plan.spec(a), plan.holders(a)
        size = ITEMSIZES.get(spec.dtype, 4)
        widest = max(widest, size)
        offset = spec.momentum_layout.replica_offset(a.owner)
        key = (id(holders), offset, spec.dtype)
        if key in counted:
            continue
        counted.add(key)
        for home, numel in plan.holder_numels(a):
            largest[home + offset] = max(largest[home + offset], size * numel)
    if plan.options.topology.cores is None:
        packed = {p: widest * min(traffic.pieces[p], DEVICE_BATCH_NUMEL) for p in largest}
        return {p: max(n, packed[p]) for p, n in largest.items()}
    return dict(largest)


def _orthogonalizing(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """Return the bytes of Newton-Schulz: two matrices and two Gram matrices per matrix of a batch.

    On a device, if all matrices of a rank are one batch and are stored in pieces, its buffer is
    freed once they are assembled and allocated again for the result.
    """
    strategy = traffic.bucket.strategy
    if isinstance(strategy, Distributed):
        return _distributing(plan, traffic, strategy)
    keeps_buffers = plan.options.topology.cores is not None
    by_owner: dict[int, Counter[tuple[int, int, bool]]] = defaultdict(Counter)
    for a in traffic.bucket.assignments:
        matrix, holders = plan.matrix(a), plan.holders(a)
        in_pieces = len(holders) > 1 or bool(matrix.pattern)
        by_owner[a.owner][matrix.rows, matrix.cols, in_pieces] += 1
    nbytes: dict[int, int] = {}
    for position, sizes in by_owner.items():
        peak_numel = 0
        for (rows, cols, in_pieces), count in sizes.items():
            batch = min(count, plan.options.max_batch(traffic.itemsize * rows * cols))
            short = min(rows, cols)
            numel = batch * (2 * rows * cols + 2 * short * short)
            if in_pieces and batch == count and len(sizes) == 1 and not keeps_buffers:
                numel -= traffic.wholes[position]
            peak_numel = max(peak_numel, numel)
        nbytes[position] = traffic.itemsize * peak_numel
    return nbytes


def _distributing(plan: Plan, traffic: BucketTraffic, strategy: Distributed) -> dict[int, int]:
    """Return the bytes of a team's iteration, which takes one matrix after the other.

    At any time there are two slabs; one that is a single piece stays in the buffer and is not
    counted again. The most in addition: this rank's part of the Gram matrix and the rows that it
    receives, in the dtype of the sum; or the rows that it sends to all members, what it receives,
    and its own rows. On a host a narrow slab is multiplied in float32.
    """
    itemsize, gram = traffic.itemsize, gram_itemsize(traffic.bucket.wire_dtype)
    is_host = plan.options.topology.cores is not None
    nbytes: dict[int, int] = defaultdict(int)
    for a in traffic.bucket.assignments:
        matrix, numel = plan.matrix(a), plan.region(a).numel
        short = min(matrix.rows, matrix.cols)
        num_rows = -(-short // strategy.team_size)
        slabs = itemsize * numel * (1 + (len(plan.holders(a)) > 1))
        summed = 2 * gram * short * short
        if is_host and itemsize < gram:
            summed = max(summed, gram * (numel + short * short))
        gathered = itemsize * short * (num_rows * (strategy.team_size + 1) + short)
        nbytes[a.owner] = max(nbytes[a.owner], slabs + max(summed, gathered))
    return nbytes
