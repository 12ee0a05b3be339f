"""Elements that each rank sends, receives and computes, against a count of every single element."""

from collections.abc import Iterator

import pytest

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.report import PlanReport, plan_report

SHAPES = ((13, 7), (8, 6), (1, 9), (5, 5), (9, 4))

LAYOUTS = {
    "rows": (MeshSpec.of(a=4), (("a",), ())),
    "columns": (MeshSpec.of(a=3), ((), ("a",))),
    "replicas": (MeshSpec.of(a=4), ((), ())),
    "rows, replicas outside": (MeshSpec.of(r=2, a=3), (("a",), ())),
    "rows, replicas inside": (MeshSpec.of(a=3, r=2), (("a",), ())),
    "rows and columns": (MeshSpec.of(a=2, b=3), (("a",), ("b",))),
    "rows twice": (MeshSpec.of(a=3, b=2), (("b", "a"), ())),
    "three dims": (MeshSpec.of(r=2, a=2, b=2), (("b", "a"), ())),
}


def report_of(name: str, strategy: str) -> PlanReport:
    mesh, cuts = LAYOUTS[name]
    specs = [
        ParamSpec(f"w{i}", Layout(mesh, shape, cuts), "float32", matrices_of(shape))
        for i, shape in enumerate(SHAPES)
    ]
    return plan_report(specs, PlanOptions(strategy=strategy, bucket_nbytes=300))


def elements(report: PlanReport) -> Iterator[tuple[int, tuple[int, ...], list[int]]]:
    """Yield, for each element of each matrix, its owner and the positions that store it."""
    for bucket in report.buckets:
        for assignment in bucket.assignments:
            layout = report.spec(assignment).layout
            regions = [layout.region(p) for p in range(bucket.mesh.num_ranks)]
            rows, cols = layout.shape
            for row in range(rows):
                for col in range(cols):
                    yield (
                        assignment.owner,
                        (row, col),
                        [
                            position
                            for position, region in enumerate(regions)
                            if all(
                                a <= x < b
                                for a, x, b in zip(
                                    region.start, (row, col), region.stop, strict=True
                                )
                            )
                        ],
                    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_direct_step_sends_every_element_once_to_its_owner_and_once_to_each_holder(name):
    report = report_of(name, "owned")
    itemsize = 2
    needed = 0
    for owner, _, holders in elements(report):
        gathered = 0 if owner in holders else 1
        needed += itemsize * (gathered + len([h for h in holders if h != owner]))
    sent = sum(
        sum(traffic.sent_nbytes(hop)) for traffic in report.traffic for hop in traffic.sequence.hops
    )
    assert sent == needed == report.cost.total_nbytes


@pytest.mark.parametrize("strategy", ["auto", "owned", "owned_staged"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_sent_is_received_and_owners_compute_whole_matrices(name, strategy):
    report = report_of(name, strategy)
    for traffic in report.traffic:
        bucket = traffic.bucket
        for hop in traffic.sequence.hops:
            assert sum(traffic.sent_nbytes(hop)) == sum(traffic.received_nbytes(hop))
        owned, stored = [0] * bucket.mesh.num_ranks, [0] * bucket.mesh.num_ranks
        flops = [0] * bucket.mesh.num_ranks
        for assignment in bucket.assignments:
            matrix = report.matrix(assignment)
            owned[assignment.owner] += matrix.rows * matrix.cols
            short, long = sorted((matrix.rows, matrix.cols))
            # X X^T, its square, and the product with X: 2 short^2 long + 2 short^3 + 2 short^2 long
            flops[assignment.owner] += 5 * (4 * short**2 * long + 2 * short**3)
            for position in range(bucket.mesh.num_ranks):
                stored[position] += report.spec(assignment).layout.region(position).numel
        assert traffic.wholes == owned
        assert traffic.stored == stored
        assert list(traffic.flops) == flops


def test_matrices_that_one_rank_stores_send_nothing():
    mesh = MeshSpec.of(ep=4)
    shape = (4, 6, 5)
    spec = ParamSpec(
        "experts", Layout(mesh, shape, (("ep",), (), ())), "float32", matrices_of(shape)
    )
    report = plan_report([spec])
    assert report.cost.total_nbytes == 0
    assert [traffic.sequence.hops for traffic in report.traffic] == [()]
    (traffic,) = report.traffic
    assert traffic.wholes == traffic.stored == [30] * 4
