"""Validate a plan against the layouts of its parameters."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from muon_dtensor.layout import Region
from muon_dtensor.planning.plan import Assignment, Bucket, ParamSpec, Phase, Plan
from muon_dtensor.planning.schedule import buffer_sequence, phases_of
from muon_dtensor.planning.strategies import Distributed, Strategy, can_own
from muon_dtensor.planning.teams import distributed_strategies, team_of, team_slabs


def check(plan: Plan) -> None:
    """Raise ValueError listing every problem of a plan. Takes time linear in its matrices."""
    problems = [*_matrix_problems(plan), *_assignment_problems(plan)]
    if problems:
        raise ValueError("not a valid plan:\n  " + "\n  ".join(problems))
    problems = [
        *(problem for bucket in plan.buckets for problem in _bucket_problems(plan, bucket)),
        *_schedule_problems(plan),
    ]
    if problems:
        raise ValueError("not a valid plan:\n  " + "\n  ".join(problems))


def problem_of_matrices(spec: ParamSpec) -> str:
    """Return what is wrong with the matrices of a parameter; an empty string if they are valid."""
    param_region = Region.of_shape(spec.shape)
    regions = tuple(matrix.region for matrix in spec.matrices)
    if any(len(region.start) != len(spec.shape) for region in regions):
        return "One of its matrices has a different number of tensor dims."
    if not all(param_region.covers(region) for region in regions):
        return "One of its matrices extends outside it."
    numel = sum(region.numel for region in regions)
    if numel != param_region.numel or _overlap(regions):
        return "Its matrices do not cover every element exactly once."
    return ""


def _matrix_problems(plan: Plan) -> list[str]:
    problems = ((spec.fqn, problem_of_matrices(spec)) for spec in plan.params)
    return [f"{fqn}: {problem}" for fqn, problem in problems if problem]


def _overlap(regions: tuple[Region, ...]) -> bool:
    ordered = sorted(((r.bounding_box, r) for r in regions if r.numel), key=lambda r: r[0].start)
    for index, (box, region) in enumerate(ordered):
        for other_box, other in ordered[index + 1 :]:
            if other_box.start[:1] >= box.stop[:1] and box.start[:1]:
                break
            if region.shares_elements(other):
                return True
    return False


def _assignment_problems(plan: Plan) -> list[str]:
    problems = []
    fields = (n for b in plan.buckets for a in b.assignments for n in (a.param, a.matrix, a.owner))
    if any(type(field) is not int for field in fields):
        return ["the fields of an assignment must be integers"]
    counts = Counter(matrix for bucket in plan.buckets for matrix in _orthogonalized(bucket))
    expected = {
        (param, index)
        for param, spec in enumerate(plan.params)
        for index, matrix in enumerate(spec.matrices)
        if matrix.numel
    }
    for param, index in sorted(counts.keys() | expected):
        count, expected_count = counts[param, index], int((param, index) in expected)
        if count != expected_count:
            name = plan.params[param].fqn if 0 <= param < len(plan.params) else f"param {param}"
            problems.append(
                f"{name}: matrix {index} is orthogonalized {count} times, not {expected_count}"
            )
    return problems


def _orthogonalized(bucket: Bucket) -> Iterable[tuple[int, int]]:
    """Return (param, matrix) once for each owner or team."""
    matrices = [(a.param, a.matrix) for a in bucket.assignments]
    return dict.fromkeys(matrices) if isinstance(bucket.strategy, Distributed) else matrices


def _bucket_problems(plan: Plan, bucket: Bucket) -> list[str]:
    problems = []
    for assignment in bucket.assignments:
        if not 0 <= assignment.param < len(plan.params):
            continue
        spec = plan.spec(assignment)
        if not 0 <= assignment.matrix < len(spec.matrices):
            continue
        layout, matrix = spec.layout, plan.matrix(assignment)
        if layout.mesh != bucket.mesh or spec.wire_dtype != bucket.wire_dtype:
            problems.append(f"{spec.fqn}: its mesh or wire dtype differs from its bucket's")
        elif not _is_legal(plan, bucket.strategy, assignment):
            problems.append(f"{spec.fqn}: {bucket.strategy} is not legal for its layout")
        elif not 0 <= assignment.owner < bucket.mesh.num_ranks:
            problems.append(f"{spec.fqn}: owner {assignment.owner} is not on mesh {bucket.mesh}")
        elif not can_own(spec.momentum_layout, matrix.region, assignment.owner):
            problems.append(f"{spec.fqn}: matrix {assignment.matrix} cannot be sent to its owner")
    if isinstance(bucket.strategy, Distributed) and not problems:
        problems += _team_problems(plan, bucket, bucket.strategy)
    return problems


def _is_legal(plan: Plan, strategy: Strategy, assignment: Assignment) -> bool:
    spec, matrix = plan.spec(assignment), plan.matrix(assignment)
    if isinstance(strategy, Distributed):
        return plan.options.can_distribute and strategy in distributed_strategies(spec, matrix)
    whole = assignment.slab is None
    return whole and strategy in spec.strategies(matrix.region)


def _team_problems(plan: Plan, bucket: Bucket, strategy: Distributed) -> list[str]:
    """Return the matrices whose slabs are not those of one team."""
    slabs: dict[tuple[int, int], list[tuple[int, Region]]] = defaultdict(list)
    for a in bucket.assignments:
        slabs[a.param, a.matrix].append((a.owner, plan.region(a)))
    problems = []
    for (param, index), boxes in slabs.items():
        spec = plan.params[param]
        team = team_of(boxes[0][0], bucket.mesh, strategy)
        expected = team_slabs(strategy, spec.momentum_layout, spec.matrices[index], team)
        if sorted(boxes, key=lambda box: box[0]) != list(expected.items()):
            problems.append(f"{spec.fqn}: matrix {index} is not cut into the slabs of one team")
    return problems


def _schedule_problems(plan: Plan) -> list[str]:
    problems = []
    phases: dict[int, list[Phase]] = defaultdict(list)
    for action in plan.schedule:
        phases[action.bucket].append(action.phase)
    for index, bucket in enumerate(plan.buckets):
        expected = list(phases_of(buffer_sequence(bucket.strategy, bucket.mesh)))
        if phases[index] != expected:
            problems.append(
                f"bucket {index} runs {''.join(phases[index])}, not {''.join(expected)}"
            )
    if unknown := [str(a) for a in plan.schedule if not 0 <= a.bucket < len(plan.buckets)]:
        problems.append(f"the schedule runs buckets that do not exist: {', '.join(unknown)}")
    return problems
