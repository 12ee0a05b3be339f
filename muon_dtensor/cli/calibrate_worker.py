"""One process of `muon-dtensor calibrate`: all ranks measure, rank 0 writes the topology.

Times functions of this package on this machine and fits the parameters of the cost model.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dtensor import Muon
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.newton_schulz import NUM_ITERATIONS
from muon_dtensor.algorithms.update import (
    MatrixSlice,
    apply_updates,
    update_momentum,
    write_directions,
)
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.matrix_costs import newton_schulz_flops
from muon_dtensor.planning.plan import Plan
from muon_dtensor.planning.simulate import applied_nbytes, packed_nbytes, simulate
from muon_dtensor.planning.topology import Link, Rates, Topology
from muon_dtensor.planning.traffic import plan_traffic
from muon_dtensor.runtime.collectives import all_gather_parts, all_reduce_sum, all_to_all

ROUNDS = 7
SIDES = {"cpu": (16, 64, 128, 192, 256, 384, 512, 768, 1024), "cuda": (64, 256, 1024, 4096, 8192)}
"""Short sides of the timed matrices, by device type."""
ASPECT_RATIO = 3
"""Long side of a timed matrix divided by its short side."""
LARGE_SIDE = 192
"""Smallest short side of a matrix whose iteration keeps a core busy."""
NBYTES = tuple(1 << n for n in (10, 15, 18, 20, 22, 24))
"""Bytes that a rank sends in the timed exchanges."""
RING_NUMELS = (1 << 12, 1 << 16, 1 << 19)
"""Elements of the timed all-gathers and all-reduces."""
STEP_NUMS, STEP_SIDE = (4, 32), 32
"""Numbers of matrices in the timed steps, and their side. Host overheads are fitted to them."""
READING_SECONDS = 4e-3
"""Approximate duration of one reading; calls are repeated to reach it."""


def readings_in_turns(
    bodies: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return the seconds of each body on the slowest rank, one reading per round.

    The bodies alternate in each round. One warm-up round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for turn in range(rounds + 1):
        for name, body in bodies.items():
            dist.barrier()
            start = time.perf_counter()
            body()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = torch.tensor(time.perf_counter() - start, device=device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if turn:
                times[name].append(float(seconds))
    return times


def median_seconds(
    bodies: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> dict[str, float]:
    """Return the median of each body's `readings_in_turns`."""
    readings = readings_in_turns(bodies, device, rounds)
    return {name: statistics.median(values) for name, values in readings.items()}


class _Bench:
    """Measurements on all ranks together, or on rank 0 while the other ranks wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, body: Callable[[], object], rank_0_only: bool = False) -> float:
        """Return the seconds of one call on the slowest rank."""
        repeats = 1

        def repeated() -> None:
            if not rank_0_only or dist.get_rank() == 0:
                for _ in range(repeats):
                    body()

        single_call = median_seconds({"": repeated}, self.device, rounds=2)[""]
        repeats = max(1, int(READING_SECONDS / single_call))
        return median_seconds({"": repeated}, self.device)[""] / repeats

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a random tensor with the same values on every rank."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(self.device, dtype)

    def matmul(self) -> tuple[tuple[tuple[str, Rates], ...], float]:
        """Measure the iteration on one rank and on all ranks.

        Returns (FLOP/s of a single rank by dtype and short side, number of ranks that run at that
        speed at the same time).
        """
        rates: dict[str, list[tuple[int, float]]] = {"bfloat16": [], "float32": []}
        slowdowns = []
        for name, points in rates.items():
            dtype = getattr(torch, name)
            for side in SIDES[self.device.type]:
                matrix = self.randn(side, ASPECT_RATIO * side, dtype=dtype)
                body = partial(newton_schulz, matrix, dtype=dtype)
                single_rank = self.seconds(body, rank_0_only=True)
                flops = newton_schulz_flops(side, ASPECT_RATIO * side, NUM_ITERATIONS)
                points.append((side, flops / single_rank))
                if side >= LARGE_SIDE:
                    slowdowns.append(self.seconds(body) / single_rank)
        cores = dist.get_world_size() / max(1.0, statistics.median(slowdowns))
        return tuple((name, tuple(points)) for name, points in rates.items()), cores

    def elementwise(self) -> float:
        """Return bytes/s of momentum, direction, decay and update, as `simulate` counts bytes."""
        num, side = 16, 512
        params, momenta, grads = (list(self.randn(num, side, side)) for _ in range(3))
        wires = list(self.randn(num, side, side, dtype=torch.bfloat16))
        matrix_slices = [MatrixSlice(side, side, 0, False)] * num

        def body() -> None:
            for i in range(num):
                item = slice(i, i + 1)
                update_momentum(momenta[item], grads[item], 0.95)
                write_directions(wires[item], momenta[item], grads[item], 0.95, True)
            for i in range(num):
                item = slice(i, i + 1)
                # decay -1 flips signs: it costs a pass and does not shrink values over the rounds
                apply_updates(
                    params[item], wires[item], matrix_slices[item], decay=-1.0, matrix_lr=0.0
                )

        element_nbytes = packed_nbytes(4, 2, momenta=1, pieces=1) + applied_nbytes(4, 2, stored=1)
        return num * side * side * element_nbytes / self.seconds(body)

    def link(self, group: ProcessGroup) -> tuple[Link, float]:
        """Return (link of a group of two or more ranks, seconds to start a collective)."""
        size = dist.get_world_size(group)
        readings, start_seconds = [], []
        for nbytes in NBYTES:
            split = max(1, nbytes // (size - 1))
            send = torch.zeros(size * split, dtype=torch.uint8, device=self.device)
            recv, splits = torch.empty_like(send), [split] * size

            def exchange(send: Tensor, recv: Tensor, splits: Sequence[int]) -> None:
                start = time.perf_counter()
                work = all_to_all(send, recv, splits, splits, group)
                start_seconds.append(time.perf_counter() - start)
                work.wait()

            seconds = self.seconds(partial(exchange, send, recv, splits))
            readings.append((size - 1, (size - 1) * split, seconds))
        latency, per_byte = fitted(readings)
        return Link(latency, 1 / per_byte), statistics.median(start_seconds)

    def ring_factor(self, topology: Topology) -> float:
        """Return measured over predicted seconds of all-gathers and all-reduces of all ranks."""
        group = dist.group.WORLD
        size = dist.get_world_size()
        assert group is not None, "the default process group exists"
        mesh, factors = MeshSpec.of(all=size), []
        for numel in RING_NUMELS:
            block = torch.zeros(-(-numel // size), device=self.device)
            gathered = torch.zeros(size * block.numel(), device=self.device)
            for predicted, body in (
                (
                    topology.all_gather_seconds(mesh, ("all",), 4 * block.numel()),
                    partial(all_gather_parts, gathered, block, group),
                ),
                (
                    topology.all_reduce_seconds(mesh, ("all",), 4 * gathered.numel()),
                    partial(all_reduce_sum, gathered, group),
                ),
            ):
                factors.append(self.seconds(body) / predicted)
        return statistics.median(factors)

    def steps(self) -> dict[int, tuple[Plan, float]]:
        """Return, by number of tiny matrices, a plan on all ranks and the seconds of its step."""
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),), mesh_dim_names=("all",))
        optimizers = {}
        for num in STEP_NUMS:
            params = []
            for _ in range(num):
                weight = self.randn(STEP_SIDE, STEP_SIDE)
                shard = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
                params.append(nn.Parameter(shard))
                params[-1].grad = shard.clone()
            optimizers[num] = Muon(params, strategy="owned")
        seconds = median_seconds(
            {str(num): optimizer.step for num, optimizer in optimizers.items()},
            self.device,
            rounds=5 * ROUNDS,
        )
        return {
            num: (optimizer.plan.plan, seconds[str(num)]) for num, optimizer in optimizers.items()
        }


def fitted(readings: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Fit (latency, seconds per byte) to (messages, bytes, seconds), by least squares of ratios.

    The fit is exact at the last reading, so that noise makes neither value negative.
    """
    messages, nbytes, longest = readings[-1]
    best = (float("inf"), 0.0, 1.0)
    for candidate in range(200):
        latency = longest / messages * candidate / 200
        per_byte = (longest - messages * latency) / nbytes
        error = sum(((m * latency + n * per_byte) / t - 1) ** 2 for m, n, t in readings)
        best = min(best, (error, latency, per_byte))
    return best[1:]


def with_overheads(topology: Topology, steps: Mapping[int, tuple[Plan, float]]) -> Topology:
    """Return the topology with the tensor and step overheads that reproduce the measured steps."""

    traffics = {num: plan_traffic(plan) for num, (plan, _) in steps.items()}

    def predicted(num: int, per_tensor: float) -> float:
        plan, _ = steps[num]
        candidate = replace(topology, tensor_overhead=per_tensor, step_overhead=0.0)
        plan = replace(plan, options=replace(plan.options, topology=candidate))
        return simulate(plan, traffics[num]).seconds

    few, many = STEP_NUMS
    difference = max(0.0, steps[many][1] - steps[few][1])
    low, high = 0.0, difference
    for _ in range(40):
        middle = (low + high) / 2
        if predicted(many, middle) - predicted(few, middle) < difference:
            low = middle
        else:
            high = middle
    step_overhead = steps[few][1] - predicted(few, low)
    return replace(topology, tensor_overhead=low, step_overhead=max(0.0, step_overhead))


def measured_topology(name: str, device: torch.device) -> Topology:
    """Measure the machine of the default process group. A collective; equal on all ranks."""
    bench, size = _Bench(device), dist.get_world_size()
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    matmul, cores = bench.matmul()
    on_cpu = device.type == "cpu"
    slowdown = size / cores if on_cpu else 1.0
    mesh = init_device_mesh(
        device.type, (size // node_size, node_size), mesh_dim_names=("node", "local")
    )
    links, collective_overhead = [], 0.0
    for dim in ("local", "node"):
        if mesh[dim].size() > 1:
            link, collective_overhead = bench.link(mesh.get_group(dim))
            links.append(link)
    # a single rank has no link; a single node uses its own link for both
    links = links or [Link(0.0, 1e12)]
    topology = Topology(
        name=name,
        node_size=node_size,
        within_node=links[0],
        between_nodes=links[-1],
        matmul=matmul,
        # measured on all ranks together; the cost model applies the slowdown itself
        memory_bandwidth=bench.elementwise() * slowdown,
        collective_overhead=collective_overhead / slowdown,
        cores=cores if on_cpu else None,
    )
    if size > 1:
        topology = replace(topology, ring_factor=bench.ring_factor(topology))
    topology = with_overheads(topology, bench.steps())
    # measured times differ between ranks
    texts = [topology.to_json()]
    dist.broadcast_object_list(texts, src=0)
    return Topology.from_json(texts[0])


def main(out: Path, name: str) -> None:
    """Measure on all ranks; write the file on rank 0."""
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    topology = measured_topology(name, device)
    if dist.get_rank() == 0:
        out.write_text(topology.to_json())
        print(f"{out}: {topology}")
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
