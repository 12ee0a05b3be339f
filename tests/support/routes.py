"""Checks that what each rank sends is what its peers expect."""

from itertools import combinations

from muon_dtensor.layout import Region
from muon_dtensor.planning.plan import Plan
from muon_dtensor.planning.routes import Packing, rank_bucket


def check_routes(plan: Plan) -> None:
    """Raise ValueError unless every rank expects the pieces that its peers send.

    Derives the routes of every rank.
    """
    for number, bucket in enumerate(plan.buckets):
        rank_buckets = [rank_bucket(plan, bucket, p) for p in range(bucket.mesh.num_ranks)]
        for phase in ("unshard", "reshard"):
            for hop in range(len(getattr(bucket, phase))):
                for position, local in enumerate(rank_buckets):
                    transfer = getattr(local, phase)[hop]
                    peers = bucket.mesh.peers(position, transfer.collective.mesh_dims)
                    peer_index = peers.index(position)
                    for peer, sent in zip(peers, transfer.send.by_peer, strict=True):
                        expected = getattr(rank_buckets[peer], phase)[hop].recv.by_peer[peer_index]
                        if [(s.assignment, s.region) for s in sent] != [
                            (s.assignment, s.region) for s in expected
                        ]:
                            raise ValueError(
                                f"bucket {number}, {phase} hop {hop}: position {position} sends "
                                f"pieces that position {peer} does not expect"
                            )
        for position, local in enumerate(rank_buckets):
            for assignment, region in local.boxes.items():
                _check_tiling(local.wholes, region, assignment, number, position)
            stored = set()
            for assignment in bucket.assignments:
                spec, box = plan.spec(assignment), plan.region(assignment)
                region = box.intersect(spec.layout.region(position))
                if region.numel:
                    stored.add(assignment)
                    _check_tiling(local.results, region, assignment, number, position)
            if {s.assignment for s in local.results.slots} - stored:
                raise ValueError(
                    f"bucket {number}: position {position} receives results of matrices that it "
                    "does not store"
                )
        if bucket.strategy.is_local and any(local.reshard for local in rank_buckets):
            raise ValueError(f"bucket {number} is local but moves data")


def _check_tiling(
    packing: Packing, region: Region, assignment: object, bucket: int, position: int
) -> None:
    """Raise ValueError unless the slots of an assignment cover a region exactly once."""
    pieces = tuple(s.region for s in packing.slots if s.assignment == assignment)
    covered = sum(piece.numel for piece in pieces)
    overlap = any(a.intersect(b).numel for a, b in combinations(pieces, 2))
    if covered != region.numel or overlap or not all(region.covers(p) for p in pieces):
        raise ValueError(
            f"bucket {bucket}: the pieces at position {position} have {covered} elements and do "
            f"not tile a region of {region.numel}"
        )
