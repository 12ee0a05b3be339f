"""What a rank holds beside exchange buffers while it packs, and while it orthogonalizes.

Counts the tensors that `update`, `orthogonalize` and the executor make. Knows no schedule.
"""

from collections import Counter, defaultdict

from muon_dtensor.layout import Matrix
from muon_dtensor.planning.ir import (
    DEVICE_BATCH_NUMEL,
    Gathered,
    Gram,
    Local,
    Owned,
    Phase,
    Plan,
    gram_segments,
)
from muon_dtensor.planning.matrix_costs import ITEMSIZES
from muon_dtensor.planning.teams import (
    GRAM_ITEMSIZE,
    gathered_nbytes,
    own_rows,
    slabs,
    summed_nbytes,
)
from muon_dtensor.planning.volumes import BucketCost, boxes_of


def workspaces(plan: Plan, cost: BucketCost, phase: Phase) -> dict[int, int]:
    """Per position the bytes of work space at the fullest moment of a phase.

    Positions and phases without work space are left out.
    """
    match phase:
        case Phase.UNSHARD:
            return _packing(plan, cost)
        case Phase.ORTHOGONALIZE:
            return _orthogonalizing(plan, cost)
        case Phase.APPLY:
            return _applying(plan, cost)
        case _:
            return {}


def _applying(plan: Plan, cost: BucketCost) -> dict[int, int]:
    """The wide copies that imitate how the host rounds narrow dtypes.

    `update` makes two in float32 of a piece whose parameter has the dtype of the wire.
    """
    if plan.options.topology.cores is None:
        return {}
    strategy = cost.bucket.strategy
    largest: dict[int, int] = defaultdict(int)
    seen: set[tuple[int, bool]] = set()
    for a in cost.bucket.assignments:
        spec, matrix, holders = plan.spec(a), plan.matrix(a), plan.holders(a)
        if spec.dtype != cost.bucket.wire_dtype or spec.dtype != "bfloat16":
            continue
        is_tall = matrix.rows > matrix.cols > 1
        if (id(holders), is_tall) in seen:
            continue
        seen.add((id(holders), is_tall))
        parts = [matrix.region]
        if isinstance(strategy, Gram):
            parts = list(slabs(matrix, cost.bucket.mesh.num_ranks_along(strategy.team_dims)))
        for home, piece in holders.items():
            numel = max(piece.intersect(part).numel for part in parts)
            for offset in spec.layout.replica_offsets:
                nbytes = (cost.itemsize if is_tall else 8) * numel
                largest[home + offset] = max(largest[home + offset], nbytes)
    return dict(largest)


def read_in(cost: BucketCost, phase: Phase) -> list[int]:
    """Per position the bytes of the buffer that a phase computes on."""
    match phase:
        case Phase.UNSHARD:
            numels = cost.pieces
        case Phase.APPLY:
            numels = cost.reshard[-1].recv if cost.reshard else cost.wholes
        case _:
            numels = cost.wholes
    return [cost.itemsize * numel for numel in numels]


def _packing(plan: Plan, cost: BucketCost) -> dict[int, int]:
    """The direction of the largest piece before it is cast.

    On the host several are packed at once only where they are no larger together, on a device up to
    `DEVICE_BATCH_NUMEL` elements.
    """
    largest: dict[int, int] = defaultdict(int)
    widest = 0
    seen: set[tuple[int, int, str]] = set()
    for a in cost.bucket.assignments:
        spec, holders = plan.spec(a), plan.holders(a)
        size = ITEMSIZES.get(spec.dtype, 4)
        widest = max(widest, size)
        if not cost.unshard:
            for position, numel in boxes_of(plan, cost.bucket, a):
                largest[position] = max(largest[position], size * numel)
            continue
        offsets: tuple[int, ...] = (spec.layout.replica_offset(a.owner),)
        if not isinstance(cost.bucket.strategy, Owned):
            offsets = spec.layout.replica_offsets
        same = (id(holders), offsets[-1], spec.dtype)
        if same in seen:
            continue
        seen.add(same)
        for offset in offsets:
            for home, piece in holders.items():
                largest[home + offset] = max(largest[home + offset], size * piece.numel)
    if plan.options.topology.cores is None:
        packed = {p: widest * min(cost.pieces[p], DEVICE_BATCH_NUMEL) for p in largest}
        return {p: max(n, packed[p]) for p, n in largest.items()}
    return dict(largest)


def _orthogonalizing(plan: Plan, cost: BucketCost) -> dict[int, int]:
    match cost.bucket.strategy:
        case Gram() as strategy:
            return _sharing(plan, cost, strategy)
        case Local() | Owned() | Gathered():
            return _alone(plan, cost)


def _alone(plan: Plan, cost: BucketCost) -> dict[int, int]:
    """What Newton-Schulz holds beside its input: two matrices, two of their Gram's size.

    On a device the buffer of a rank whose matrices are one batch, in pieces, is given up as soon
    as they are put together, and made anew for the result.
    """
    is_kept = plan.options.topology.cores is not None
    at: dict[int, Counter[tuple[int, int, bool]]] = defaultdict(Counter)
    for a in cost.bucket.assignments:
        matrix, holders = plan.matrix(a), plan.holders(a)
        in_pieces = len(holders) > 1 or bool(matrix.pattern)
        for position, _ in boxes_of(plan, cost.bucket, a):
            at[position][matrix.rows, matrix.cols, in_pieces] += 1
    found: dict[int, int] = {}
    for position, sizes in at.items():
        most = 0
        for (rows, cols, in_pieces), count in sizes.items():
            together = min(count, plan.options.most_batched(cost.itemsize * rows * cols))
            numel, short = rows * cols, min(rows, cols)
            held = together * (2 * numel + 2 * short * short)
            if in_pieces and together == count and len(sizes) == 1 and not is_kept:
                held -= cost.wholes[position]
            most = max(most, held)
        found[position] = cost.itemsize * most
    return found


def _sharing(plan: Plan, cost: BucketCost, strategy: Gram) -> dict[int, int]:
    found: dict[int, int] = defaultdict(int)
    for a in cost.bucket.assignments:
        matrix = plan.matrix(a)
        num_members = cost.bucket.mesh.num_ranks_along(strategy.team_dims)
        for index, (member, numel) in enumerate(boxes_of(plan, cost.bucket, a)):
            assembled = cost.itemsize * numel if cost.unshard else 0
            segments = gram_segments(plan.spec(a).num_iterations)
            work = assembled + _member_nbytes(matrix, numel, num_members, index, segments)
            found[member] = max(found[member], work)
    return dict(found)


def _member_nbytes(
    matrix: Matrix, slab_numel: int, num_members: int, index: int, segments: tuple[int, ...]
) -> int:
    """What one member holds at most in `gram_polar_factor`, moment by moment."""
    short = min(matrix.rows, matrix.cols)
    slab, gram = GRAM_ITEMSIZE * slab_numel, summed_nbytes(matrix)
    part = gathered_nbytes(matrix, num_members)
    rows = GRAM_ITEMSIZE * own_rows(short, num_members, index) * short
    # fewer rows than the others send are copied to be sent
    copied = 0 if rows == part else part
    whole = num_members * part
    moments = [slab + rows + whole + max(slab, copied)]
    if max(segments) == 1:
        moments.append(slab + gram + rows)
    if max(segments) >= 2:
        moments.append(slab + gram + rows + whole + max(2 * rows, copied))
        moments.append(slab + 2 * rows + whole + max(2 * rows, copied))
    if max(segments) >= 3:
        moments.append(slab + 2 * whole + 3 * rows + max(2 * rows, copied))
    return max(moments)
