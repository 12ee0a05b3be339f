"""Memory of a step: exchange buffers over time, and the work space beside them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

from muon_dtensor.planning.matrix_costs import ITEMSIZES
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
from muon_dtensor.planning.traffic import BucketTraffic


class Peaks(NamedTuple):
    """Most bytes at any time of a step, rank by rank: of buffers, and with the work space."""

    buffer_nbytes: tuple[int, ...]
    total_nbytes: tuple[int, ...]


def bucket_peak_nbytes(traffic: BucketTraffic) -> int:
    """Most bytes of buffers that any rank holds for a bucket."""
    most = 0
    for numbers in live_sets(traffic.sequence):
        held = zip(*(traffic.buffers[number] for number in numbers), strict=True)
        most = max(most, max(map(sum, held), default=0))
    return traffic.itemsize * most


def peaks(plan: Plan, traffics: Sequence[BucketTraffic], index_of: dict[int, int]) -> Peaks:
    """Follow the buffers of all ranks through the schedule; `index_of` orders the ranks.

    On the host the buffers of a step are one block that lives all the time; see
    `buffer_placement`.
    """
    num_ranks = len(index_of)
    held, most_held, most, most_work = ([0] * num_ranks for _ in range(4))
    program = lower(plan.schedule, {i: t.sequence for i, t in enumerate(traffics)})
    lives = lifetimes(program)
    for index, (action, event) in enumerate(flat(program)):
        traffic = traffics[action.bucket]
        places = [index_of[rank] for rank in traffic.bucket.mesh.ranks]
        numbers = dict.fromkeys(event.buffers)
        begins = [n for n in numbers if lives[action.bucket, n].first == index]
        for number in begins:
            _add(held, places, traffic.buffers[number], traffic.itemsize)
        work = workspaces(plan, traffic, event)
        for position, place in enumerate(places):
            extra = work.get(position, 0)
            most_held[place] = max(most_held[place], held[place])
            most_work[place] = max(most_work[place], extra)
            most[place] = max(most[place], held[place] + extra)
        for number in numbers:
            if lives[action.bucket, number].last == index:
                _add(held, places, traffic.buffers[number], -traffic.itemsize)
    if plan.options.topology.cores is not None:
        most = [block + extra for block, extra in zip(most_held, most_work, strict=True)]
    return Peaks(tuple(most_held), tuple(most))


def _add(held: list[int], places: Sequence[int], numels: Sequence[int], itemsize: int) -> None:
    for place, numel in zip(compress(places, numels), filter(None, numels), strict=True):
        held[place] += itemsize * numel


def workspaces(plan: Plan, traffic: BucketTraffic, event: Event) -> dict[int, int]:
    """Per position the bytes of work space beside the buffers during an event, if it has any.

    Counts the tensors that the elementwise passes, the iteration and the executor make.
    """
    match event:
        case Fill():
            return _packing(plan, traffic)
        case Compute():
            return _orthogonalizing(plan, traffic)
        case Apply():
            return _applying(plan, traffic)
        case _:
            return {}


def _applying(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """The wide copies that imitate how the host rounds narrow dtypes.

    The update makes two in float32 of a piece whose parameter has the dtype of the wire.
    """
    largest: dict[int, int] = defaultdict(int)
    if plan.options.topology.cores is None:
        return largest
    seen: set[tuple[int, bool]] = set()
    for a in traffic.bucket.assignments:
        spec, matrix, holders = plan.spec(a), plan.matrix(a), plan.holders(a)
        if spec.dtype != traffic.bucket.wire_dtype or spec.dtype != "bfloat16":
            continue
        is_tall = matrix.rows > matrix.cols > 1
        if (id(holders), is_tall) in seen:
            continue
        seen.add((id(holders), is_tall))
        for home, piece in holders.items():
            for offset in spec.layout.replica_offsets:
                nbytes = (traffic.itemsize if is_tall else 8) * piece.numel
                largest[home + offset] = max(largest[home + offset], nbytes)
    return largest


def _packing(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """The direction of the largest piece before it is cast.

    On the host several are packed together only if they are no larger than one, on a device up to
    `DEVICE_BATCH_NUMEL` elements.
    """
    largest: dict[int, int] = defaultdict(int)
    widest = 0
    seen: set[tuple[int, int, str]] = set()
    for a in traffic.bucket.assignments:
        spec, holders = plan.spec(a), plan.holders(a)
        size = ITEMSIZES.get(spec.dtype, 4)
        widest = max(widest, size)
        offset = spec.layout.replica_offset(a.owner)
        same = (id(holders), offset, spec.dtype)
        if same in seen:
            continue
        seen.add(same)
        for home, piece in holders.items():
            largest[home + offset] = max(largest[home + offset], size * piece.numel)
    if plan.options.topology.cores is None:
        packed = {p: widest * min(traffic.pieces[p], DEVICE_BATCH_NUMEL) for p in largest}
        return {p: max(n, packed[p]) for p, n in largest.items()}
    return dict(largest)


def _orthogonalizing(plan: Plan, traffic: BucketTraffic) -> dict[int, int]:
    """What Newton-Schulz holds beside its input: two matrices, two of their Gram's size.

    On a device the buffer of a rank whose matrices are one batch, in pieces, is given up as soon
    as they are put together, and made anew for the result.
    """
    is_kept = plan.options.topology.cores is not None
    at: dict[int, Counter[tuple[int, int, bool]]] = defaultdict(Counter)
    for a in traffic.bucket.assignments:
        matrix, holders = plan.matrix(a), plan.holders(a)
        in_pieces = len(holders) > 1 or bool(matrix.pattern)
        at[a.owner][matrix.rows, matrix.cols, in_pieces] += 1
    nbytes: dict[int, int] = {}
    for position, sizes in at.items():
        most = 0
        for (rows, cols, in_pieces), count in sizes.items():
            together = min(count, plan.options.most_batched(traffic.itemsize * rows * cols))
            numel, short = rows * cols, min(rows, cols)
            held = together * (2 * numel + 2 * short * short)
            if in_pieces and together == count and len(sizes) == 1 and not is_kept:
                held -= traffic.wholes[position]
            most = max(most, held)
        nbytes[position] = traffic.itemsize * most
    return nbytes
