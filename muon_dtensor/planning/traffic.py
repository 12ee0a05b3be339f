"""What one bucket moves, computes and holds at each position of its mesh."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import Layout
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.plan import Assignment, Bucket, Plan
from muon_dtensor.planning.schedule import BufferSequence, Content, Hop, buffer_sequence
from muon_dtensor.planning.strategies import Route

Numels = list[int]
"""Elements, position by position."""


@dataclass(frozen=True)
class BucketTraffic:
    """What one bucket does at each position of its mesh. All numels count wire elements.

    `buffers`: per buffer of the sequence, what it holds. `kept`: per hop, what a rank sends to
    itself. `touched`: what a rank stores of all matrices of the bucket, in `num_touched` pieces.
    `num_parts`: pieces of which the matrices that it orthogonalizes are assembled.
    """

    bucket: Bucket
    sequence: BufferSequence
    flops: tuple[int, ...]
    buffers: tuple[Numels, ...]
    kept: tuple[Numels, ...]
    touched: Numels
    num_touched: list[int]
    num_parts: list[int]

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.bucket.wire_dtype]

    @property
    def pieces(self) -> Numels:
        """What each position packs."""
        return self.buffers[0]

    @property
    def wholes(self) -> Numels:
        """What each position orthogonalizes."""
        return self.buffers[self.sequence.wholes]

    def sent_nbytes(self, hop: Hop) -> list[int]:
        """Bytes each position sends to others in this collective."""
        return self._less_kept(self.buffers[hop.send], hop)

    def received_nbytes(self, hop: Hop) -> list[int]:
        """Bytes each position receives from others in this collective."""
        return self._less_kept(self.buffers[hop.recv], hop)

    def _less_kept(self, numels: Numels, hop: Hop) -> list[int]:
        kept = self.kept[hop.index]
        return [self.itemsize * (n - k) for n, k in zip(numels, kept, strict=True)]


def _distinct(
    assignments: Sequence[Assignment], same: Callable[[Assignment], Hashable]
) -> Iterator[tuple[Assignment, int]]:
    """One assignment for each value of `same`, and how many have that value."""
    keys = [same(assignment) for assignment in assignments]
    examples = dict(zip(keys, assignments, strict=True))
    for key, count in Counter(keys).items():
        yield examples[key], count


class _Sums:
    """Sums over the pieces of a bucket's matrices, position by position.

    Matrices of equal layout have the same holders: they are counted, and visited once.
    """

    def __init__(self, plan: Plan, bucket: Bucket) -> None:
        self.plan = plan
        self.bucket = bucket
        self.mesh = bucket.mesh
        self.num_positions = bucket.mesh.num_ranks

    def tables(
        self, key: Callable[[Layout, Assignment], int]
    ) -> Iterator[tuple[Layout, Assignment, int, int]]:
        """(layout, an example, key, count) for matrices with equal holders and equal key."""
        plan = self.plan

        def same(a: Assignment) -> Hashable:
            return (id(plan.holders(a)), key(plan.spec(a).layout, a))

        for a, count in _distinct(self.bucket.assignments, same):
            layout = plan.spec(a).layout
            yield layout, a, key(layout, a), count

    def touched(self) -> tuple[Numels, list[int]]:
        """What each position stores of all matrices, and in how many pieces."""
        numels, nums = [0] * self.num_positions, [0] * self.num_positions
        for layout, assignment, _, count in self.tables(lambda *_: 0):
            for home, piece in self.plan.holders(assignment).items():
                numel = count * piece.numel
                for offset in layout.replica_offsets:
                    numels[home + offset] += numel
                    nums[home + offset] += count
        return numels, nums

    def arrived(self, done: tuple[str, ...]) -> Numels:
        """Elements at each position after moves towards the owners along `done`."""
        numels, mesh = [0] * self.num_positions, self.mesh

        def key(layout: Layout, assignment: Assignment) -> int:
            along = mesh.offset_of(mesh.index_along(assignment.owner, done), done)
            return layout.replica_offset(assignment.owner) + along

        for _, assignment, offset, count in self.tables(key):
            for home, piece in self.plan.holders(assignment).items():
                start = home - mesh.offset_of(mesh.index_along(home, done), done)
                numels[start + offset] += count * piece.numel
        return numels

    def stayed(self, done: tuple[str, ...], dims: tuple[str, ...]) -> Numels:
        """Elements that need no move along `dims` after moves along `done`."""
        numels, mesh = [0] * self.num_positions, self.mesh
        by_index: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for assignment in self.bucket.assignments:
            holders = self.plan.holders(assignment)
            rows = by_index.get(id(holders))
            if rows is None:
                rows = by_index[id(holders)] = defaultdict(list)
                for home, piece in holders.items():
                    start = home - mesh.offset_of(mesh.index_along(home, done), done)
                    rows[mesh.index_along(home, dims)].append((start, piece.numel))
            owner = assignment.owner
            layout = self.plan.spec(assignment).layout
            offset = layout.replica_offset(owner)
            offset += mesh.offset_of(mesh.index_along(owner, done), done)
            for start, numel in rows.get(mesh.index_along(owner, dims), ()):
                numels[start + offset] += numel
        return numels

    def of(self, content: Content) -> Numels:
        """Elements of a buffer at each position."""
        if content.done is None:
            numels, _ = self.touched()
        elif set(content.done) >= set(self.bucket.strategy.unshard_dims):
            numels = self.owned()
        else:
            numels = self.arrived(content.done)
        return [content.copies * numel for numel in numels] if content.copies > 1 else numels

    def owned(self) -> Numels:
        """Elements of the matrices that each position owns."""
        numels = [0] * self.num_positions
        for assignment in self.bucket.assignments:
            numels[assignment.owner] += self.plan.matrix(assignment).numel
        return numels

    def kept(self, sequence: BufferSequence) -> tuple[Numels, ...]:
        """Elements that each position sends to itself, hop by hop."""
        kept: list[Numels] = []
        by_dims: dict[tuple[str, ...], Numels] = {}
        done: tuple[str, ...] = ()
        for hop in sequence.unshard:
            dims = hop.collective.mesh_dims
            by_dims[dims] = self.stayed(done, dims)
            kept.append(by_dims[dims])
            done = (*done, *dims)
        for hop in sequence.reshard:
            dims = hop.collective.mesh_dims
            if dims not in by_dims:
                # to the holders in all replicas, or to the replicas of a holder: its own piece
                is_direct = hop.collective.route is Route.TO_HOLDERS
                by_dims[dims] = kept[0] if is_direct and kept else self.of(Content(()))
            kept.append(by_dims[dims])
        return tuple(kept)


def bucket_traffic(plan: Plan, bucket: Bucket) -> BucketTraffic:
    """Volumes and flops of one bucket at every position of its mesh."""
    sums = _Sums(plan, bucket)
    sequence = buffer_sequence(bucket.strategy, bucket.mesh)
    contents = {content: sums.of(content) for content in dict.fromkeys(sequence.contents)}
    flops, num_parts = [0] * bucket.mesh.num_ranks, [0] * bucket.mesh.num_ranks
    for a in bucket.assignments:
        flops[a.owner] += matrix_flops(plan.matrix(a), plan.spec(a).num_iterations)
        num_parts[a.owner] += 0 if bucket.strategy.is_local else len(plan.holders(a))
    return BucketTraffic(
        bucket,
        sequence,
        tuple(flops),
        tuple(contents[content] for content in sequence.contents),
        sums.kept(sequence),
        *sums.touched(),
        num_parts,
    )


def plan_traffic(plan: Plan) -> tuple[BucketTraffic, ...]:
    """What each bucket of a plan moves, computes and holds."""
    return tuple(bucket_traffic(plan, bucket) for bucket in plan.buckets)
