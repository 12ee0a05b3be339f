"""A plan as text for people.

Formats what is there. Decides and computes nothing about the step itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from muon_dtensor.layout import Layout, ParamSpec
from muon_dtensor.planning.cost import ITEMSIZES, BucketCost, matrix_flops
from muon_dtensor.planning.ir import (
    AllToAll,
    Bucket,
    Local,
    Owned,
    Plan,
    Strategy,
)
from muon_dtensor.planning.strategies import MOST_DIRECT_RANKS

MOST_ROWS = 10
"""Rows of a table in `summary` before the rest is counted instead of shown."""


def quantity(value: float, unit: str) -> str:
    """A number with an SI prefix: `quantity(7.3e6, 'B')` is `7.3 MB`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5 or prefix == "E":
            digits = 0 if value == round(value) and abs(value) < 1000 and not prefix else 3
            return f"{value:.{digits}g} {prefix}{unit}" if digits else f"{value:.0f} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def families(names: Iterable[str]) -> str:
    """Names with their numbers collapsed: `layers.0.wq, layers.1.wq` is `layers.{0..1}.wq`."""
    numbers: dict[str, list[set[int]]] = {}
    for name in names:
        pattern = re.sub(r"\d+", "#", name)
        found = [int(n) for n in re.findall(r"\d+", name)]
        seen = numbers.setdefault(pattern, [set() for _ in found])
        for place, number in zip(seen, found, strict=True):
            place.add(number)
    texts = []
    for pattern, seen in numbers.items():
        text = pattern
        for place in seen:
            low, high = min(place), max(place)
            full = len(place) == high - low + 1
            inner = f"{{{low}..{high}}}" if full else "{" + ",".join(map(str, sorted(place))) + "}"
            text = text.replace("#", str(low) if low == high else inner, 1)
        texts.append(text)
    return ", ".join(texts)


def cuts_text(layout: Layout) -> str:
    """Cuts in words: `rows over tp=2 then dp=4, replicated over r=2`."""
    names = ["rows", "cols"] if len(layout.shape) == 2 else ["batch", "rows", "cols"]
    if len(layout.shape) not in (2, 3):
        names = [f"dim {index}" for index in range(len(layout.shape))]
    if len(layout.shape) == 1:
        names = ["elements"]
    parts = [
        f"{name} over {' then '.join(f'{d}={layout.mesh.sizes[d]}' for d in dims)}"
        for name, dims in zip(names, layout.cuts, strict=True)
        if dims
    ]
    if layout.replica_dims:
        sizes = " x ".join(f"{d}={layout.mesh.sizes[d]}" for d in layout.replica_dims)
        parts.append(f"replicated over {sizes}")
    return ", ".join(parts) or "whole"


def shape_text(spec: ParamSpec) -> str:
    """The global shape; of a parameter stored flat, that of its matrices."""
    sizes = [(matrix.rows, matrix.cols) for matrix in spec.matrices]
    if len(spec.shape) != 1 or not sizes:
        return str(list(spec.shape))
    if len(set(sizes)) > 1:
        return f"{len(sizes)} matrices, {spec.shape[0]} elements stored flat"
    rows, cols = sizes[0]
    batch = f"{len(sizes)}, " if len(sizes) > 1 else ""
    return f"[{batch}{rows}, {cols}] stored flat"


def summary(plan: Plan) -> str:
    """The plan on one screen: buckets, then parameters, then totals against the bounds."""
    cost = plan.cost
    lines = []
    for mesh in plan.meshes:
        count = sum(len(s.matrices) for s in plan.params if s.layout.mesh == mesh)
        lines.append(f"mesh {mesh}: {_count(count, 'matrix', 'matrices')}")
    if not plan.params:
        return "no parameters, nothing to do"
    lines.append("")
    lines += _shorten(_bucket_rows(cost.buckets))
    lines.append("")
    lines += _shorten([[line] for line in _param_lines(plan)])
    total, bound = cost.total_nbytes, cost.bound_nbytes
    over = f" ({total / bound:.3f} x the bound of {quantity(bound, 'B')})" if bound else ""
    sent = max(cost.sent_nbytes, default=0)
    lines += [
        "",
        f"sent per step {quantity(total, 'B')}{over}, busiest rank {quantity(sent, 'B')}",
        f"compute {quantity(cost.model_flops, 'FLOP')}, done {cost.redundancy:.2f} times, "
        f"slowest rank {cost.imbalance:.2f} x the mean, makespan {cost.makespan:.2f}",
        f"buffers at most {quantity(cost.peak_buffer_nbytes, 'B')} per rank "
        f"(cap {quantity(plan.options.bucket_nbytes, 'B')} a bucket, "
        f"{plan.options.prefetch_count} prefetched)",
    ]
    order = " ".join(map(str, plan.schedule))
    turns = ", ranks orthogonalize one after the other" if plan.options.sequential else ""
    if len(order) <= 100:
        lines.append(f"schedule {order}{turns}")
    elif turns:
        lines.append(f"schedule of {len(plan.schedule)} actions{turns}")
    lines.append(f"digest {plan.digest[:16]}")
    return "\n".join(lines)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _shorten(rows: list[list[str]]) -> list[str]:
    shown = rows if len(rows) <= MOST_ROWS else rows[: MOST_ROWS // 2]
    lines = [line for row in shown for line in row]
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} more like these")
    return lines


def _bucket_rows(costs: Sequence[BucketCost]) -> list[list[str]]:
    """Lines per bucket; buckets that read the same are told once."""
    same: dict[tuple[str, ...], list[int]] = {}
    for index, cost in enumerate(costs):
        same.setdefault(tuple(_bucket_lines(cost)), []).append(index)
    rows = []
    for (head, *tail), numbers in same.items():
        title = f"bucket {numbers[0]}  " if len(numbers) == 1 else f"buckets {_ranges(numbers)}  "
        rows.append([title + head, *tail])
    return rows


def _bucket_lines(cost: BucketCost) -> list[str]:
    bucket = cost.bucket
    owners = _count(len({a.owner for a in bucket.assignments}), "owner", "owners")
    matrices = _count(len(bucket.assignments), "matrix", "matrices")
    lines = [
        f"{strategy_text(bucket.strategy)}: {matrices} in {bucket.wire_dtype}, {owners}",
        f"  per rank at most {quantity(max(cost.flops), 'FLOP')} "
        f"and {quantity(cost.peak_nbytes, 'B')} of buffers",
    ]
    for phase, collectives in (("unshard", bucket.unshard), ("reshard", bucket.reshard)):
        for c in collectives:
            sent = cost.sent_nbytes(c)
            route = c.route.replace("_", " ")
            lines.append(
                f"  {phase}  all_to_all {route} over {collective_dims(bucket, c)}: "
                f"{quantity(sum(sent), 'B')}, at most {quantity(max(sent), 'B')} a rank"
            )
    reason = _reason(bucket, sum(cost.wholes), sum(cost.flops), _why_hops(cost))
    lines.append(f"  because {reason}")
    return lines


def strategy_text(strategy: Strategy) -> str:
    """The strategy in a word or three."""
    match strategy:
        case Local():
            return "local"
        case Owned(replica_dims=()):
            return "owned"
        case Owned(hops=hops):
            return f"owned, shared by replicas in {_count(hops, 'hop', 'hops')}"


def collective_dims(bucket: Bucket, collective: AllToAll) -> str:
    """The mesh dims of a collective with their sizes, `dp=4 x tp=2`."""
    return " x ".join(f"{name}={bucket.mesh.sizes[name]}" for name in collective.mesh_dims)


def _reason(bucket: Bucket, numel: int, flops: int, why_hops: str = "") -> str:
    """Why this and not the alternative, with what that would cost for these matrices."""
    match bucket.strategy:
        case Local():
            return "it lies whole on one rank: nothing to send"
        case Owned(unshard_dims=apart, replica_dims=same):
            mesh = bucket.mesh
            num_ranks = mesh.num_ranks_along(apart) * mesh.num_ranks_along(same)
            num_gathers = (mesh.num_ranks_along(apart) - 1) * mesh.num_ranks_along(same)
            nbytes = ITEMSIZES[bucket.wire_dtype] * numel * num_gathers
            work = quantity(flops * num_ranks, "FLOP")
            text = f"each rank doing all would mean {quantity(nbytes, 'B')} and {work}"
            return f"{text}{why_hops}"


def _why_hops(cost: BucketCost) -> str:
    """Why the results take one hop or two, where there is a choice."""
    match cost.bucket.strategy:
        case Owned(unshard_dims=(_, *_) as apart, replica_dims=(_, *_) as same, hops=hops):
            mesh, copies = cost.bucket.mesh, cost.num_replicas
            num_ranks = mesh.num_ranks_along(tuple(apart)) * mesh.num_ranks_along(tuple(same))
            if hops == 1:
                return "; a second hop would save no bytes"
            if num_ranks > MOST_DIRECT_RANKS:
                return f"; one hop would be among {num_ranks} ranks"
            busiest = quantity(copies * max(cost.wholes) * cost.itemsize, "B")
            return f"; in one hop the busiest owner would send {busiest}"
        case _:
            return ""


def _param_lines(plan: Plan) -> list[str]:
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    where: dict[int, set[int]] = defaultdict(set)
    owners: dict[int, set[int]] = defaultdict(set)
    for number, bucket in enumerate(plan.buckets):
        for assignment in bucket.assignments:
            where[assignment.param].add(number)
            owners[assignment.param].add(bucket.mesh.ranks[assignment.owner])
    for index, spec in enumerate(plan.params):
        pattern = re.sub(r"\d+", "#", spec.fqn)
        key = (pattern, shape_text(spec), cuts_text(spec.layout))
        groups[key].append(index)
    lines = []
    for (_, shape, cuts), members in groups.items():
        buckets = sorted(set().union(*(where[i] for i in members)))
        ranks = sorted(set().union(*(owners[i] for i in members)))
        flops = sum(
            matrix_flops(m, plan.params[i].num_iterations)
            for i in members
            for m in plan.params[i].matrices
        )
        place = f"{_listed('bucket', buckets)}, {_listed('owner', ranks)}" if buckets else "empty"
        name = families(plan.params[i].fqn for i in members)
        lines.append(f"{name}  {shape}  {cuts}: {place}, {quantity(flops, 'FLOP')}")
    return lines


def _listed(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs collapsed, `0-3,8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ",".join(texts) if len(texts) <= 6 else f"{','.join(texts[:5])},... ({len(numbers)})"


def explain(plan: Plan, fqn: str) -> str:
    """All that happens to one parameter, matrix by matrix. Raises KeyError for other names."""
    index = {spec.fqn: i for i, spec in enumerate(plan.params)}[fqn]
    spec = plan.params[index]
    lines = [
        f"{fqn}  {shape_text(spec)} {spec.dtype} on {spec.layout.mesh}",
        f"  stored: {cuts_text(spec.layout)}",
    ]
    for number, cost in enumerate(plan.cost.buckets):
        bucket = cost.bucket
        for assignment in bucket.assignments:
            if assignment.param != index:
                continue
            matrix = plan.matrix(assignment)
            holders = plan.holders(assignment)
            own = holders.get(spec.layout.home(assignment.owner))
            kept = 0 if own is None else own.numel
            away = (matrix.numel - kept) * cost.itemsize
            back = away + matrix.numel * (len(spec.layout.replica_offsets) - 1) * cost.itemsize
            region = matrix.region
            box = ", ".join(f"{a}:{b}" for a, b in zip(region.start, region.stop, strict=True))
            lines += [
                f"  matrix [{box}] in bucket {number}, {strategy_text(bucket.strategy)}",
                f"    in {_count(len(holders), 'piece', 'pieces')} on each of "
                f"{_count(len(spec.layout.replica_offsets), 'replica', 'replicas')}; "
                f"rank {bucket.mesh.ranks[assignment.owner]} orthogonalizes it, "
                f"{quantity(matrix_flops(matrix, spec.num_iterations), 'FLOP')}",
            ]
            lines += [
                f"    {phase}: {quantity(nbytes, 'B')} by "
                + ", then ".join(f"all_to_all over {collective_dims(bucket, c)}" for c in todo)
                for phase, nbytes, todo in (
                    ("unshard", away, bucket.unshard),
                    ("reshard", back, bucket.reshard),
                )
                if todo
            ]
            flops = matrix_flops(matrix, spec.num_iterations)
            lines.append(f"    because {_reason(bucket, matrix.numel, flops)}")
    if len(lines) == 2:
        lines.append("  no elements, nothing to do")
    return "\n".join(lines)
