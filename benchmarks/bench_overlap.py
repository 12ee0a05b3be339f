"""Measures the gain of overlap on a slow link, with two nodes of two ranks on this machine.

    sudo python -m benchmarks.bench_overlap --json overlap.json

Needs root and iproute2: each node is a network namespace, and the virtual link between them has a
limited rate (`tc ... tbf`). Without them it prints the reason and measures nothing.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard

from benchmarks.common import layered, parameters, provenance
from benchmarks.namespaces import launch, sent_nbytes
from muon_dtensor import Muon, create_dtensor_config
from muon_dtensor.cli.baselines import naive_step
from muon_dtensor.cli.calibrate_worker import readings_in_turns
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.planning.plan import Phase
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.schedule import Event, Send, Wait
from muon_dtensor.planning.topology import Link, Topology
from muon_dtensor.runtime.executor import Executor

R, S0 = Replicate(), Shard(0)
NODES, RANKS_PER_NODE = 2, 2
DEADLINE_SECONDS = 550
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    rate: str = "1gbit"
    """Rate of the link between the nodes, in tc's notation. Two cores that iterate in bfloat16
    reach about 0.6 TFLOP/s per node. An H100 with 400 Gbit/s computes 8,000 FLOP per byte, more for
    larger matrices; the same ratio on this machine is 600mbit."""
    layers: int = 12
    dim: int = 384
    bucket_mb: float = 4.0
    """Small, so that several buckets can overlap."""
    only: str = ""
    """Run the comparisons with this text in their title."""
    tokens: int = 256
    """Tokens of a rank in each iteration with FSDP2."""
    rounds: int = 9
    json: Path | None = None
    worker: bool = False
    """Set by the launcher for each rank."""


def naive(params: list[nn.Parameter]) -> Callable[[], Any]:
    """Return a step in which every rank gathers and orthogonalizes every matrix."""
    momenta = [torch.zeros_like(param, requires_grad=False) for param in params]
    return lambda: naive_step(params, momenta, lr=0.0)


def link_megabytes(step: Callable[[], Any]) -> float:
    """Return the megabytes that a step sends over the link, both directions."""
    dist.barrier()
    before = sent_nbytes()
    step()
    dist.barrier()
    sent = torch.tensor((sent_nbytes() - before) / RANKS_PER_NODE)
    dist.all_reduce(sent)
    return float(sent) / 1e6


def topology(config: Config) -> Topology:
    """Return the planner's model of the setup: two nodes, a slow link, half a core per rank."""
    unit = next(u for u in UNITS if config.rate.endswith(u))
    nbytes = float(config.rate.removesuffix(unit)) * UNITS[unit] / 8
    preset = PRESETS["gloo-local"]
    return replace(
        preset,
        name=f"two nodes, {config.rate}",
        node_size=RANKS_PER_NODE,
        between_nodes=Link(preset.within_node.latency, nbytes / RANKS_PER_NODE),
        matmul=tuple((d, tuple((n, r / 2) for n, r in rates)) for d, rates in preset.matmul),
        memory_bandwidth=preset.memory_bandwidth / 2,
        cores=None,
    )


def comparisons(config: Config) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return steps by title and name. The first step of each title is the reference."""
    shapes, cap = layered(config.layers, config.dim), config.bucket_mb
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    hsdp = init_device_mesh("cpu", (NODES, RANKS_PER_NODE), mesh_dim_names=("replica", "shard"))

    def muon(mesh: DeviceMesh, placements: tuple[Placement, ...], **options: Any) -> Any:
        params = parameters(shapes, mesh, placements)
        optimizer = Muon(params, lr=0.0, bucket_mb=cap, strategy="owned", **options)
        optimizer.step()
        return optimizer.step

    link = topology(config)
    in_turns = create_dtensor_config(async_gpu_parallelism=False)
    table = [(16384, 4 * config.dim)]
    groups = [
        {"params": parameters(shapes, flat, (S0,))},
        {"params": parameters(table, flat, (S0,)), "algorithm": "adamw"},
    ]
    joint = Muon(groups, lr=0.0, bucket_mb=cap, strategy="owned")
    muon_only = Muon(parameters(shapes, flat, (S0,)), lr=0.0, bucket_mb=cap, strategy="owned")
    adamw_only = Muon([{"params": parameters(table, flat, (S0,)), "algorithm": "adamw"}], lr=0.0)
    for optimizer in (joint, muon_only, adamw_only):
        optimizer.step()

    def sequential_step() -> None:
        muon_only.step()
        adamw_only.step()

    return {
        "fsdp over both nodes": {
            "prefetch 1": muon(flat, (S0,), prefetch_count=1),
            "prefetch 0": muon(flat, (S0,), prefetch_count=0),
            "prefetch 2": muon(flat, (S0,), prefetch_count=2),
            "one bucket": _one_bucket(shapes, flat),
            "async_gpu_parallelism=False": muon(flat, (S0,), distributed_config=in_turns),
            "naive": naive(parameters(shapes, flat, (S0,))),
        },
        "hsdp, a replica on each node": {
            "prefetch 1": muon(hsdp, (R, S0), prefetch_count=1),
            "prefetch 0": muon(hsdp, (R, S0), prefetch_count=0),
            "prefetch 1, planned for the link": muon(
                hsdp, (R, S0), prefetch_count=1, topology=link
            ),
            "no replica sharing": muon(hsdp["shard"], (S0,), prefetch_count=1),
            "naive": naive(parameters(shapes, hsdp, (R, S0))),
        },
        "fsdp, and AdamW of an embedding": {
            "while exchanges are in flight": joint.step,
            "afterwards": sequential_step,
        },
        "an iteration with FSDP2": {
            "with a step": iteration(config, flat),
            "first exchanges within backward": iteration(config, flat, change=_unshard_in_backward),
            "first exchanges not sent": iteration(config, flat, change=_without_unshard),
            "last results behind the next forward": iteration(
                config, flat, change=_apply_last_results_before_the_last_layer
            ),
            "without a step": iteration(config, flat, has_step=False),
        },
    }


def iteration(
    config: Config,
    mesh: DeviceMesh,
    *,
    has_step: bool = True,
    change: Callable[[list[nn.Linear], Muon], None] | None = None,
) -> Callable[[], Any]:
    """Return a forward, a backward and a step of linear layers that `fully_shard` shards.

    `change`: changes the step to what would be no training, to measure the most that an overlap can
    gain.
    """
    shapes = [shape for _ in range(config.layers) for shape in layered(1, config.dim)]
    layers = [nn.Linear(cols, rows, bias=False) for rows, cols in shapes]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    tokens = [torch.randn(config.tokens, layer.in_features) for layer in layers]
    params = [layer.weight for layer in layers]
    optimizer = Muon(params, lr=0.0, bucket_mb=config.bucket_mb, strategy="owned")

    def forward_and_backward() -> None:
        # every layer has inputs of its own size, and needs the result of the layer before. Each
        # gradient is of normal size: with numbers near zero the host multiplies slowly.
        total = torch.zeros((), requires_grad=True)
        for layer, batch in zip(layers, tokens, strict=True):
            total = total + layer(batch + 0 * total).square().mean()
        total.backward()

    def whole() -> None:
        forward_and_backward()
        optimizer.step()

    if not has_step:
        return forward_and_backward
    whole()
    if change is not None:
        change(layers, optimizer)
    return whole


def _without_unshard(layers: list[nn.Linear], optimizer: Muon) -> None:
    """Do not send directions to the owners: no overlap of these exchanges can gain more."""
    del layers
    executor = optimizer._planned_step.executor
    executor._program = tuple(
        (action, tuple(e for e in events if not _is_of_unshard(executor, action.bucket, e)))
        for action, events in executor._program
    )


def _is_of_unshard(executor: Executor, bucket: int, event: Event) -> bool:
    hops = executor._buckets[bucket].sequence.unshard
    return isinstance(event, Send | Wait) and event.hop in hops


def _unshard_in_backward(layers: list[nn.Linear], optimizer: Muon) -> None:
    """Send a bucket's directions once FSDP2 has reduced its gradients, in the backward pass.

    That is before ranks have compared their gradients.
    """
    table, executor = optimizer._planned_step.table, optimizer._planned_step.executor
    executor._buffers._offsets.clear()  # more buckets are in flight than the plan says
    first = [(a, events) for a, events in executor._program if a.phase is Phase.UNSHARD]
    executor._program = tuple(pair for pair in executor._program if pair not in first)
    missing = {
        action.bucket: {a.param for a in executor._buckets[action.bucket].planned.assignments}
        for action, _ in first
    }
    reduced: set[int] = set()

    def send_ready() -> None:
        for action, events in first:
            if missing[action.bucket] <= reduced and action.bucket not in executor._in_flight:
                grads = {entry.name: entry.param.grad for entry in table.muon}
                params = table.muon_params(
                    {name: grad for name, grad in grads.items() if grad is not None},
                    optimizer.state,
                    optimizer.param_groups,
                    None,
                    optimizer._settings.kernel(),
                    casts_momenta=True,
                    as_shards=True,
                )
                bucket = executor._buckets[action.bucket]
                executor._act(action, events, bucket, params, None)

    def after_backward_of(index: int) -> None:
        state = layers[index]._get_fsdp_state()
        (group,) = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        post_backward = group.post_backward

        def reduce_and_send() -> None:
            post_backward()
            reduced.add(index)
            send_ready()
            if len(reduced) == len(layers):
                reduced.clear()

        group.post_backward = reduce_and_send

    for index in range(len(layers)):
        after_backward_of(index)


def _apply_last_results_before_the_last_layer(layers: list[nn.Linear], optimizer: Muon) -> None:
    """Await and apply the last results just before the last layer runs.

    This is the most that a step behind the next forward can gain. The layers before use old
    weights.
    """
    executor = optimizer._planned_step.executor
    *actions, (action, events) = executor._program
    executor._program = tuple(actions)
    walk, pending = executor._walk, []

    def walk_most(params: Any, *rest: Any) -> None:
        walk(params, *rest)
        pending.append(params)

    def apply_last(*_: Any) -> None:
        if pending:
            bucket = executor._buckets[action.bucket]
            executor._act(action, events, bucket, pending.pop(), None)

    executor._walk = walk_most
    layers[-1].register_forward_pre_hook(apply_last)


def _one_bucket(shapes: list[tuple[int, ...]], mesh: DeviceMesh) -> Callable[[], Any]:
    optimizer = Muon(parameters(shapes, mesh, (S0,)), lr=0.0, strategy="owned")
    optimizer.step()
    return optimizer.step


def work(config: Config) -> None:
    """Measure on one rank; rank 0 prints and writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for title, bodies in comparisons(config).items():
        if config.only not in title:
            continue
        readings = readings_in_turns(bodies, torch.device("cpu"), config.rounds)
        reference = next(iter(bodies))
        rows = {}
        for name, seconds in readings.items():
            ratios = [a / b for a, b in zip(seconds, readings[reference], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows[name] = {
                "ms": 1e3 * statistics.median(seconds),
                "times_ours": middle,
                "spread": high - low,
                "link_mb": link_megabytes(bodies[name]),
            }
        results[title] = rows
        if dist.get_rank() == 0:
            show(title, rows, config)
    if dist.get_rank() == 0 and config.json:
        settings = {
            "rate": config.rate,
            "layers": config.layers,
            "dim": config.dim,
            "bucket_mb": config.bucket_mb,
            "rounds": config.rounds,
        }
        config.json.write_text(json.dumps({**provenance(), **settings, "ways": results}, indent=1))
    dist.barrier()
    destroy_process_group()


def show(title: str, rows: dict[str, dict[str, float]], config: Config) -> None:
    """Print the table of one comparison."""
    work = f"{config.layers} layers, d = {config.dim}, link of {config.rate}"
    table = Table(title=f"{title}; {work}")
    for column in ("", "ms", "x the first", "MB over the link"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        ratio = f"{row['times_ours']:.2f} +-{row['spread'] / 2:.2f}"
        table.add_row(name, f"{row['ms']:.0f}", ratio, f"{row['link_mb']:.1f}")
    Console(width=100).print(table)
    sys.stdout.flush()


def main() -> None:
    """Start the ranks; with `--worker`, run as one of them."""
    config = tyro.cli(Config, description=__doc__)
    if config.worker:
        work(config)
    else:
        sys.exit(
            launch("benchmarks.bench_overlap", config.rate, NODES, RANKS_PER_NODE, DEADLINE_SECONDS)
        )


if __name__ == "__main__":
    main()
