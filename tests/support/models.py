"""`ParamSpec` lists of Llama 3 70B and of the benchmark workload."""

from collections.abc import Iterator, Sequence

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.plan import ParamSpec

Cuts = tuple[tuple[str, ...], ...]


def param_spec(mesh: MeshSpec, fqn: str, shape: tuple[int, ...], cuts: Cuts) -> ParamSpec:
    """Return one parameter with default options."""
    return ParamSpec(fqn, Layout(mesh, shape, cuts), "float32", matrices_of(shape))


def layered(
    mesh: MeshSpec, num_layers: int, kinds: Sequence[tuple[str, tuple[int, ...], Cuts]]
) -> Iterator[ParamSpec]:
    """Yield `layers.{i}.{name}` for every kind; parameters of a kind share one Layout."""
    layouts = {name: Layout(mesh, shape, cuts) for name, shape, cuts in kinds}
    for layer in range(num_layers):
        for name, shape, _ in kinds:
            yield ParamSpec(f"layers.{layer}.{name}", layouts[name], "float32", matrices_of(shape))


def llama3_70b(mesh: MeshSpec) -> list[ParamSpec]:
    """Return 80 layers x 7 matrices under FSDP and TP.

    Sizes: hidden 8192, intermediate 28672, 8 key-value heads of 128 (Llama 3 herd of models,
    arXiv:2407.21783, table 3).
    """
    hidden, inner, kv = 8192, 28672, 1024
    colwise: Cuts = (("tp", "dp_shard"), ())
    rowwise: Cuts = (("dp_shard",), ("tp",))
    kinds = [
        ("attention.wq.weight", (hidden, hidden), colwise),
        ("attention.wk.weight", (kv, hidden), colwise),
        ("attention.wv.weight", (kv, hidden), colwise),
        ("attention.wo.weight", (hidden, hidden), rowwise),
        ("feed_forward.w1.weight", (inner, hidden), colwise),
        ("feed_forward.w2.weight", (hidden, inner), rowwise),
        ("feed_forward.w3.weight", (inner, hidden), colwise),
    ]
    return list(layered(mesh, 80, kinds))


def anchors(mesh: MeshSpec, cuts: Cuts, num_layers: int, dim: int = 192) -> list[ParamSpec]:
    """Return the benchmark workload, on which other packages are compared: qkv, proj, fc, out."""
    kinds = [
        ("qkv", (3 * dim, dim), cuts),
        ("proj", (dim, dim), cuts),
        ("fc", (4 * dim, dim), cuts),
        ("out", (dim, 4 * dim), cuts),
    ]
    return list(layered(mesh, num_layers, kinds))
