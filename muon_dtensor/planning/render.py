"""Render a plan as text."""

import difflib
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from muon_dtensor.layout import Layout
from muon_dtensor.layout.region import IndexSet
from muon_dtensor.planning.cost import PlanCost
from muon_dtensor.planning.matrix_costs import matrix_flops
from muon_dtensor.planning.memory import bucket_peak_nbytes, offloaded_nbytes
from muon_dtensor.planning.normuon_state import reductions
from muon_dtensor.planning.plan import Alternative, Assignment, Bucket, ParamSpec, Plan
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.simulate import Prediction
from muon_dtensor.planning.strategies import AllGather, Collective
from muon_dtensor.planning.topology import Topology
from muon_dtensor.planning.traffic import BucketTraffic, bucket_traffic

MOST_ROWS, MOST_LINES = 8, 28
"""The most rows, and lines of rows, of a table in `summary`; further rows are only counted."""


def quantity(value: float, unit: str) -> str:
    """Return a number with an SI prefix: `quantity(7.3e6, 'B')` is `7.3 MB`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5 or prefix == "E":
            digits = 0 if value == round(value) and abs(value) < 1000 and not prefix else 3
            return f"{value:.{digits}g} {prefix}{unit}" if digits else f"{value:.0f} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Return seconds as text in s, ms or us: `duration(0.0123)` is `12.3 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def families(names: Iterable[str]) -> str:
    """Return names with numbers collapsed: `layers.0.wq, layers.1.wq` is `layers.{0..1}.wq`."""
    numbers_of: dict[str, list[set[int]]] = {}
    for name in names:
        pattern = re.sub(r"\d+", "#", name)
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        fields = numbers_of.setdefault(pattern, [set() for _ in numbers])
        for field, number in zip(fields, numbers, strict=True):
            field.add(number)
    texts = []
    for pattern, fields in numbers_of.items():
        text = pattern
        for field in fields:
            low, high = min(field), max(field)
            is_range = len(field) == high - low + 1
            values = f"{low}..{high}" if is_range else ",".join(map(str, sorted(field)))
            text = text.replace("#", str(low) if low == high else f"{{{values}}}", 1)
        texts.append(text)
    return ", ".join(texts)


def machine(topology: Topology) -> str:
    """Return the name of a topology, with a remark if its numbers were not measured."""
    is_estimate = topology in PRESETS.values() and topology.name != "gloo-local"
    return f"{topology.name}{' (data sheets, not calibrated)' * is_estimate}"


def cuts_text(layout: Layout) -> str:
    """Return the cuts as text: `rows over tp=2 then dp=4, replicated over r=2`."""
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
    """Return the global shape; for a parameter stored flat, that of its matrices."""
    sizes = [(matrix.rows, matrix.cols) for matrix in spec.matrices]
    if len(spec.shape) != 1 or not sizes:
        return str(list(spec.shape))
    if len(set(sizes)) > 1:
        return f"{len(sizes)} matrices, {spec.shape[0]} elements stored flat"
    rows, cols = sizes[0]
    batch = f"{len(sizes)}, " if len(sizes) > 1 else ""
    return f"[{batch}{rows}, {cols}] stored flat"


def headline(plan: Plan, cost: PlanCost, prediction: Prediction, digest: str) -> str:
    """Return the plan as one line."""
    kinds = Counter(bucket.strategy.kind for bucket in plan.buckets)
    where = ", ".join(str(mesh) for mesh in plan.meshes) or "no mesh"
    buckets = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    return (
        f"Muon plan: {_count(cost.num_matrices, 'matrix', 'matrices')} on {where}; "
        f"buckets: {buckets}; {quantity(cost.total_nbytes, 'B')} sent a step, "
        f"{quantity(max(cost.peak_nbytes, default=0), 'B')} held, "
        f"{duration(prediction.seconds)} predicted on {plan.options.topology.name}; "
        f"digest {digest[:16]}"
    )


def adamw_text(numels: Sequence[int]) -> str:
    """Return a line about the parameters that AdamW steps, from their elements on this rank."""
    parameters = _count(len(numels), "parameter", "parameters")
    return f"AdamW steps {parameters} ({sum(numels):,} elements on this rank), nothing is sent"


def summary(
    plan: Plan,
    cost: PlanCost,
    prediction: Prediction,
    digest: str,
    adamw_numels: Sequence[int] = (),
    recognized: Mapping[str, str] | None = None,
) -> str:
    """Return the plan as one screen of text: buckets, parameters, totals with lower bounds.

    `recognized`: what parameters hold, by name.
    """
    lines = []
    for mesh in plan.meshes:
        count = sum(len(s.matrices) for s in plan.params if s.layout.mesh == mesh)
        lines.append(f"mesh {mesh}: {_count(count, 'matrix', 'matrices')}")
    if not plan.params:
        return adamw_text(adamw_numels) if adamw_numels else "no parameters, nothing to do"
    lines.append("")
    lines += _shorten(_bucket_rows(plan, cost, prediction))
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
        f"{plan.options.prefetch_count} prefetched), {quantity(max(cost.peak_nbytes), 'B')} with "
        "work space",
        f"predicted {duration(prediction.seconds)} a step on {machine(plan.options.topology)}",
    ]
    for text, count in Counter((recognized or {}).values()).items():
        lines.append(f"recognized in {_count(count, 'parameter', 'parameters')}: {text}")
    if any(spec.gathered_dims for spec in plan.params):
        lines.append(_momentum_text(plan))
    if any(spec.is_offloaded for spec in plan.params):
        lines.append(offload_text(plan, cost.buckets))
    for reduction in reductions(plan):
        sizes = " x ".join(f"{name}={reduction.mesh.sizes[name]}" for name in reduction.mesh_dims)
        lines.append(
            f"row moments  all_reduce over {sizes}, not counted above: "
            f"{quantity(reduction.sent_nbytes, 'B')} a rank"
        )
    if adamw_numels:
        lines.append(adamw_text(adamw_numels))
    order = " ".join(map(str, plan.schedule))
    remark = ", ranks orthogonalize one after the other" if plan.options.sequential else ""
    if len(order) <= 100:
        lines.append(f"schedule {order}{remark}")
    elif remark:
        lines.append(f"schedule of {len(plan.schedule)} actions{remark}")
    lines.append(f"digest {digest[:16]}")
    return "\n".join(lines)


def offload_text(plan: Plan, traffics: Sequence[BucketTraffic]) -> str:
    """Return a line about what is copied for weights on the hosts."""
    to_device, to_host = offloaded_nbytes(plan, traffics)
    return (
        f"offloaded weights: up to {quantity(to_device, 'B')} a rank copied to the device, "
        f"{quantity(to_host, 'B')} back (not in the predicted time)"
    )


def _momentum_text(plan: Plan) -> str:
    """Return a line about momenta that are cut over replicas."""

    def most_elements(layouts: Iterable[Layout]) -> int:
        totals: Counter[int] = Counter()
        for layout, count in Counter(layouts).items():
            for position, rank in enumerate(layout.mesh.ranks):
                totals[rank] += count * layout.region(position).numel
        return max(totals.values(), default=0)

    cut = most_elements(spec.momentum_layout for spec in plan.params)
    stored = most_elements(spec.layout for spec in plan.params)
    return f"momentum cut over replicas: at most {cut:,} elements a rank, of weights {stored:,}"


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _shorten(rows: list[list[str]]) -> list[str]:
    stops = list(accumulate(map(len, rows)))
    shown = rows
    if len(rows) > MOST_ROWS or sum(map(len, rows)) > MOST_LINES:
        shown = rows[: max(1, min(MOST_ROWS // 2, bisect_right(stops, MOST_LINES)))]
    lines = [line for row in shown for line in row]
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} more")
    return lines


def _bucket_rows(plan: Plan, cost: PlanCost, prediction: Prediction) -> list[list[str]]:
    """Return the lines of each bucket; buckets with equal lines share one row."""
    indices_by_lines: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(plan.buckets)):
        lines = tuple(_bucket_lines(plan, index, cost.buckets[index], prediction))
        indices_by_lines.setdefault(lines, []).append(index)
    rows = []
    printed: set[tuple[Alternative, ...]] = set()
    for (head, *tail), numbers in indices_by_lines.items():
        title = f"bucket {numbers[0]}  " if len(numbers) == 1 else f"buckets {ranges(numbers)}  "
        bucket = plan.buckets[numbers[0]]
        alternatives = [] if bucket.alternatives in printed else instead(bucket)
        printed.add(bucket.alternatives)
        rows.append([title + head, *tail, *(f"    {line}" for line in alternatives)])
    return rows


def _bucket_lines(
    plan: Plan, index: int, traffic: BucketTraffic, prediction: Prediction
) -> list[str]:
    bucket = plan.buckets[index]
    owners = _count(len({a.owner for a in bucket.assignments}), "owner", "owners")
    matrices = _count(bucket.num_matrices, "matrix", "matrices")
    lines = [
        f"{bucket.strategy.text}: {matrices} in {bucket.wire_dtype}, {owners}",
        f"  per rank at most {quantity(max(traffic.flops), 'FLOP')} "
        f"and {quantity(bucket_peak_nbytes(traffic), 'B')} of buffers",
    ]
    for phase in ("unshard", "reshard"):
        for hop in getattr(traffic.sequence, phase):
            sent = traffic.sent_nbytes(hop)
            lines.append(
                f"  {phase}  {collective_text(bucket, hop.collective)}: "
                f"{quantity(sum(sent), 'B')}, at most {quantity(max(sent), 'B')} a rank"
            )
    if any(traffic.team_nbytes):
        lines.append(
            f"  iteration  all_to_all in teams: {quantity(sum(traffic.team_nbytes), 'B')}, "
            f"at most {quantity(max(traffic.team_nbytes), 'B')} a rank"
        )
    exchange, compute = prediction.exchange_seconds[index], prediction.compute_seconds[index]
    lines += [
        f"  predicted  {duration(exchange)} of exchange, {duration(compute)} of compute",
        f"  chosen: {reason(plan, bucket)}",
    ]
    return lines


def collective_text(bucket: Bucket, collective: Collective) -> str:
    """Return a collective with its mesh dims: `all_to_all to owner over dp=4 x tp=2`."""
    name = "all_gather" if isinstance(collective, AllGather) else "all_to_all"
    route = collective.route.replace("_", " ")
    return f"{name} {route} over {dims_text(bucket, collective.mesh_dims)}"


def dims_text(bucket: Bucket, mesh_dims: Sequence[str]) -> str:
    """Return mesh dims with their sizes: `dp=4 x tp=2`."""
    return " x ".join(f"{name}={bucket.mesh.sizes[name]}" for name in mesh_dims)


def reason(plan: Plan, bucket: Bucket) -> str:
    """Return why a bucket has its strategy, with the predicted seconds of its group."""
    if bucket.strategy.is_local:
        return "each matrix is stored on one rank, nothing to send"
    seconds = f"{duration(bucket.seconds)} predicted for these matrices alone"
    if plan.options.strategy == "auto":
        return seconds
    return f"strategy={plan.options.strategy!r} was requested; {seconds}"


def instead(bucket: Bucket) -> list[str]:
    """Return the strategies that were not chosen, with their predicted seconds and the reason."""
    return [
        f"instead of {alternative.strategy.text}: {duration(alternative.seconds)}, "
        f"{alternative.reason}"
        for alternative in bucket.alternatives
    ]


def _param_lines(plan: Plan) -> list[str]:
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    buckets_of: dict[int, set[int]] = defaultdict(set)
    owners: dict[int, set[int]] = defaultdict(set)
    for number, bucket in enumerate(plan.buckets):
        for assignment in bucket.assignments:
            buckets_of[assignment.param].add(number)
            owners[assignment.param].add(bucket.mesh.ranks[assignment.owner])
    for index, spec in enumerate(plan.params):
        pattern = re.sub(r"\d+", "#", spec.fqn)
        key = (pattern, shape_text(spec), cuts_text(spec.layout))
        groups[key].append(index)
    lines = []
    for (_, shape, cuts), members in groups.items():
        buckets = sorted(set().union(*(buckets_of[i] for i in members)))
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
    return f"{noun}{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with runs collapsed: `0-3,8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ",".join(texts) if len(texts) <= 6 else f"{','.join(texts[:5])},... ({len(numbers)})"


def explain(plan: Plan, fqn: str, recognized: str = "") -> str:
    """Return what a step does with one parameter, matrix by matrix.

    `recognized`: what the parameter holds.
    Raises ValueError if the plan has no parameter of this name, with the most similar name.
    """
    names = {spec.fqn: i for i, spec in enumerate(plan.params)}
    if fqn not in names:
        similar = difflib.get_close_matches(fqn, names, n=1)
        hint = f" Did you mean '{similar[0]}'?" if similar else ""
        raise ValueError(
            f"the plan has no parameter {fqn!r}, but {len(names)} others.{hint} A plan has no "
            "parameters of AdamW and no frozen parameters."
        )
    index = names[fqn]
    spec = plan.params[index]
    lines = [
        f"{fqn}  {shape_text(spec)} {spec.dtype} on {spec.layout.mesh}",
        f"  stored: {cuts_text(spec.layout)}",
        *([f"  recognized: {recognized}"] if recognized else []),
        *([f"  momentum: {cuts_text(spec.momentum_layout)}"] if spec.gathered_dims else []),
    ]
    equal: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for number, bucket in enumerate(plan.buckets):
        for assignment in bucket.assignments:
            if assignment.param == index:
                region = plan.region(assignment)
                box = f"[{', '.join(_indices_text(*dim) for dim in region.per_dim)}]"
                matrix_lines = tuple(_matrix_lines(plan, number, bucket, assignment))
                rank = bucket.mesh.ranks[assignment.owner]
                equal.setdefault(matrix_lines, []).append((box, rank))
    for (place, pieces, flops, *details), matrices in equal.items():
        boxes, ranks = zip(*matrices, strict=True)
        if len(matrices) == 1:
            lines.append(f"  matrix {boxes[0]} in {place}")
            lines.append(f"    {pieces}; rank {ranks[0]} orthogonalizes it, {flops}")
        else:
            owners = _listed("rank", sorted(set(ranks)))
            lines.append(f"  {len(boxes)} matrices {boxes[0]} to {boxes[-1]} in {place}")
            lines.append(f"    each {pieces}, {flops}; owned by {owners}")
        lines += details
    if not equal:
        lines.append("  no elements, nothing to do")
    return "\n".join(lines)


def _indices_text(first: int, last: int, indices: IndexSet | None) -> str:
    """Return the indices of one tensor dim of a region as text."""
    if indices is None:
        return f"{first}:{last}"
    first = indices.first
    *outer, (length, stride) = indices.axes
    text = f"{first}:{first + (length - 1) * stride + 1}" + (f":{stride}" if stride > 1 else "")
    for count, period in reversed(outer):
        text += f", {count} times every {period}"
    return f"({text})" if outer else text


def _matrix_lines(plan: Plan, number: int, bucket: Bucket, assignment: Assignment) -> Iterator[str]:
    """Yield the bucket, pieces, flops, bytes sent and strategy of one matrix."""
    layout, holders = plan.spec(assignment).momentum_layout, plan.holders(assignment)
    traffic = bucket_traffic(plan, replace(bucket, assignments=(assignment,)))
    yield f"bucket {number}, {bucket.strategy.text}"
    replicas = _count(len(layout.replica_offsets), "replica", "replicas")
    yield f"in {_count(len(holders), 'piece', 'pieces')} on each of {replicas}"
    yield quantity(sum(traffic.flops), "FLOP")
    for phase in ("unshard", "reshard"):
        for hop in getattr(traffic.sequence, phase):
            nbytes = quantity(sum(traffic.sent_nbytes(hop)), "B")
            yield f"    {phase}: {nbytes} by {collective_text(bucket, hop.collective)}"
    yield f"    chosen: {reason(plan, bucket)}"
    yield from (f"      {line}" for line in instead(bucket))
