"""Topologies by name, with the sources of their numbers, and topologies from files."""

from pathlib import Path

from muon_dtensor.planning.topology import Link, Rates, Topology


def _gpu(
    name: str,
    *,
    bfloat16: float,
    float32: float,
    memory: float,
    nvlink: float,
    network: float,
    node_size: int = 8,
) -> Topology:
    """Return the topology of a GPU cluster from data sheets.

    Matmul rates are the `_REACHED` share of the dense peak by size. Links reach three quarters of
    their nominal one-way bandwidth. Latencies are those of NCCL's tuner for the Simple protocol on
    a ring, 3.4 us over NVLink and 14 us over a network (NCCL, src/graph/tuning.cc, hwLat), divided
    by the number of messages in flight. That number and the shares are order-of-magnitude
    assumptions. `tensor_overhead` is what a whole step takes on the host per parameter, measured
    with the arithmetic left out (benchmarks/results/host.json), so it is rather too high.
    """
    in_flight = 8

    def rates(peak: float) -> Rates:
        return tuple((side, share * peak) for side, share in _REACHED)

    return Topology(
        name=name,
        node_size=node_size,
        within_node=Link(3.4e-6 / in_flight, 0.75 * nvlink),
        between_nodes=Link(14e-6 / in_flight, 0.75 * network),
        matmul=(("bfloat16", rates(bfloat16)), ("float32", rates(float32))),
        memory_bandwidth=0.8 * memory,
        tensor_overhead=5e-6,
        collective_overhead=40e-6,
        step_overhead=1e-3,
    )


_REACHED: Rates = ((64, 0.0005), (256, 0.01), (1024, 0.25), (4096, 0.65), (8192, 0.7))
"""(short side, share of a GPU's dense peak that matrix products reach). An order-of-magnitude
assumption for planning without the machine; `muon-dtensor calibrate` measures it."""

_CPU_BF16: Rates = ((16, 0.6e9), (64, 26e9), (192, 270e9), (384, 650e9), (1024, 750e9))
_CPU_FP32: Rates = ((16, 2.5e9), (64, 60e9), (192, 130e9), (1024, 150e9))

PRESETS: dict[str, Topology] = {
    topology.name: topology
    for topology in (
        # measured by `calibrate` with four ranks on two cores of a Xeon with AMX, rounded
        Topology(
            name="gloo-local",
            node_size=1 << 20,
            within_node=Link(0.28e-3, 1e9),
            between_nodes=Link(0.28e-3, 1e9),
            matmul=(("bfloat16", _CPU_BF16), ("float32", _CPU_FP32)),
            memory_bandwidth=13e9,
            tensor_overhead=90e-6,
            collective_overhead=40e-6,
            step_overhead=8e-3,
            ring_factor=1.6,
            cores=2.0,
        ),
        # NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16 and 67 float32 dense, 3.35 TB/s HBM3,
        # 900 GB/s NVLink both ways; one 400 Gb/s NDR adapter for each GPU (DGX H100)
        _gpu(
            "h100-ib-400",
            bfloat16=989e12,
            float32=67e12,
            memory=3.35e12,
            nvlink=450e9,
            network=50e9,
        ),
        # one NVLink domain with any number of ranks, for single nodes
        _gpu(
            "h100-nvlink",
            bfloat16=989e12,
            float32=67e12,
            memory=3.35e12,
            nvlink=450e9,
            network=450e9,
            node_size=1 << 20,
        ),
        # NVIDIA H200 SXM data sheet: compute and NVLink of the H100, 4.8 TB/s HBM3e
        _gpu(
            "h200",
            bfloat16=989e12,
            float32=67e12,
            memory=4.8e12,
            nvlink=450e9,
            network=50e9,
        ),
        # NVIDIA HGX B200 data sheet: 2,250 TFLOP/s bf16 and 75 float32 dense, 8 TB/s HBM3e, 1.8
        # TB/s NVLink both ways; one 400 Gb/s adapter for each GPU (DGX B200)
        _gpu(
            "b200",
            bfloat16=2250e12,
            float32=75e12,
            memory=8e12,
            nvlink=900e9,
            network=50e9,
        ),
        # NVIDIA GB200 NVL72 data sheet: 2,500 TFLOP/s bf16 and 80 float32 dense per GPU (half of
        # the sparse 5,000), 8 TB/s HBM3e, 72 GPUs in one NVLink domain of 1.8 TB/s both ways each;
        # one 400 Gb/s adapter for each GPU
        _gpu(
            "gb200-nvl72",
            bfloat16=2500e12,
            float32=80e12,
            memory=8e12,
            nvlink=900e9,
            network=50e9,
            node_size=72,
        ),
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16, 19.5 float32, 2.04 TB/s, 600 GB/s
        # NVLink both ways; one 200 Gb/s HDR adapter for each GPU (DGX A100)
        _gpu(
            "a100-ib-200",
            bfloat16=312e12,
            float32=19.5e12,
            memory=2.04e12,
            nvlink=300e9,
            network=25e9,
        ),
    )
}
"""Preset topologies by name."""


def topology_of(source: "str | Path | Topology") -> Topology:
    """Return a topology from itself, the name of a preset, or the path of a JSON file.

    Raises ValueError if there is no such preset or file, or if the file is invalid.
    """
    if isinstance(source, Topology):
        return source
    if isinstance(source, str) and source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"no topology {str(source)!r}: neither a file nor one of {', '.join(PRESETS)}"
        )
    try:
        return Topology.from_json(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid topology: {error}") from error
