"""Validates a plan: recomputes from the layouts what must hold of it, and raises ValueError."""

from collections import Counter, defaultdict

from muon_dtensor.layout import Region
from muon_dtensor.planning.plan import Bucket, ParamSpec, Phase, Plan
from muon_dtensor.planning.routes import Packing, rank_bucket
from muon_dtensor.planning.schedule import buffer_sequence, phases_of
from muon_dtensor.planning.strategies import can_own, strategies_for


def check(plan: Plan) -> None:
    """Raise ValueError with all that is wrong with a plan. Takes time linear in its matrices."""
    wrong = [*_wrong_matrices(plan), *_wrong_assignments(plan)]
    if wrong:
        raise ValueError("not a valid plan:\n  " + "\n  ".join(wrong))
    wrong = [
        *(problem for bucket in plan.buckets for problem in _wrong_bucket(plan, bucket)),
        *_wrong_schedule(plan),
    ]
    if wrong:
        raise ValueError("not a valid plan:\n  " + "\n  ".join(wrong))


def wrong_matrices(spec: ParamSpec) -> str:
    """What is wrong with the matrices of a parameter; empty if nothing is."""
    whole = Region.whole(spec.shape)
    regions = tuple(matrix.region for matrix in spec.matrices)
    if any(len(region.start) != len(spec.shape) for region in regions):
        return "Its matrices have other tensor dims than it has itself."
    if not all(whole.covers(region) for region in regions):
        return "One of its matrices reaches outside it."
    held = sum(region.numel for region in regions)
    if held != whole.numel or _overlap(regions):
        return "Its matrices do not hold every element exactly once."
    return ""


def _wrong_matrices(plan: Plan) -> list[str]:
    wrong = ((spec.fqn, wrong_matrices(spec)) for spec in plan.params)
    return [f"{fqn}: {text}" for fqn, text in wrong if text]


def _overlap(regions: tuple[Region, ...]) -> bool:
    ordered = sorted((r for r in regions if r.numel), key=lambda r: r.start)
    for index, region in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.start[:1] >= region.stop[:1] and region.start[:1]:
                break
            if region.intersect(other).numel:
                return True
    return False


def _wrong_assignments(plan: Plan) -> list[str]:
    wrong = []
    places = (n for b in plan.buckets for a in b.assignments for n in (a.param, a.matrix, a.owner))
    if any(type(number) is not int for number in places):
        return ["an assignment is not made of integers"]
    counts = Counter((a.param, a.matrix) for b in plan.buckets for a in b.assignments)
    expected = {
        (param, index)
        for param, spec in enumerate(plan.params)
        for index, matrix in enumerate(spec.matrices)
        if matrix.numel
    }
    for param, index in sorted(counts.keys() | expected):
        count, due = counts[param, index], int((param, index) in expected)
        if count != due:
            name = plan.params[param].fqn if 0 <= param < len(plan.params) else f"param {param}"
            wrong.append(f"{name}: matrix {index} is orthogonalized {count} times, not {due}")
    return wrong


def _wrong_bucket(plan: Plan, bucket: Bucket) -> list[str]:
    wrong = []
    for assignment in bucket.assignments:
        if not 0 <= assignment.param < len(plan.params):
            continue
        spec = plan.spec(assignment)
        if not 0 <= assignment.matrix < len(spec.matrices):
            continue
        layout, matrix = spec.layout, plan.matrix(assignment)
        if layout.mesh != bucket.mesh or spec.wire_dtype != bucket.wire_dtype:
            wrong.append(f"{spec.fqn}: its mesh or wire dtype is not that of its bucket")
        elif bucket.strategy not in strategies_for(layout, matrix.region):
            wrong.append(f"{spec.fqn}: {bucket.strategy} cannot bring its matrix together")
        elif not 0 <= assignment.owner < bucket.mesh.num_ranks:
            wrong.append(f"{spec.fqn}: owner {assignment.owner} is not on mesh {bucket.mesh}")
        elif not can_own(layout, matrix.region, assignment.owner):
            wrong.append(f"{spec.fqn}: matrix {assignment.matrix} cannot travel to its owner")
    return wrong


def _wrong_schedule(plan: Plan) -> list[str]:
    wrong = []
    phases: dict[int, list[Phase]] = defaultdict(list)
    for action in plan.schedule:
        phases[action.bucket].append(action.phase)
    for index, bucket in enumerate(plan.buckets):
        due = list(phases_of(buffer_sequence(bucket.strategy, bucket.mesh)))
        if phases[index] != due:
            wrong.append(f"bucket {index} runs {''.join(phases[index])}, not {''.join(due)}")
    if strays := [str(a) for a in plan.schedule if not 0 <= a.bucket < len(plan.buckets)]:
        wrong.append(f"the schedule runs buckets that do not exist: {', '.join(strays)}")
    return wrong


def check_routes(plan: Plan) -> None:
    """Raise ValueError unless what each rank sends is what its peers expect, piece by piece.

    Derives every rank's routes, so it takes time linear in ranks x matrices: for tests and for
    small plans.
    """
    for number, bucket in enumerate(plan.buckets):
        ranks = [rank_bucket(plan, bucket, p) for p in range(bucket.mesh.num_ranks)]
        for phase in ("unshard", "reshard"):
            for hop in range(len(getattr(bucket, phase))):
                for position, here in enumerate(ranks):
                    transfer = getattr(here, phase)[hop]
                    peers = bucket.mesh.peers(position, transfer.collective.mesh_dims)
                    turn = peers.index(position)
                    for peer, sent in zip(peers, transfer.send.by_peer, strict=True):
                        there = getattr(ranks[peer], phase)[hop].recv.by_peer[turn]
                        if [s.region for s in sent] != [s.region for s in there] or [
                            s.assignment for s in sent
                        ] != [s.assignment for s in there]:
                            raise ValueError(
                                f"bucket {number}, {phase} hop {hop}: position {position} sends "
                                f"to {peer} what that does not expect"
                            )
        for position, here in enumerate(ranks):
            for assignment in here.owned:
                region = here.matrices[assignment].region
                _must_tile(here.wholes, region, assignment, number, position)
            for assignment, region in here.stored:
                _must_tile(here.results, region, assignment, number, position)
            if {s.assignment for s in here.results.slots} - {a for a, _ in here.stored}:
                raise ValueError(f"bucket {number}: position {position} gets what it does not hold")
        if bucket.strategy.is_local and any(r.reshard for r in ranks):
            raise ValueError(f"bucket {number} is local and still moves data")


def _must_tile(
    packing: Packing, region: Region, assignment: object, bucket: int, position: int
) -> None:
    pieces = tuple(s.region for s in packing.slots if s.assignment == assignment)
    covered = sum(piece.numel for piece in pieces)
    if covered != region.numel or _overlap(pieces) or not all(region.covers(p) for p in pieces):
        raise ValueError(
            f"bucket {bucket}: position {position} gets {covered} of {region.numel} elements"
        )
