"""Weight shapes of published models, with sources, sharded as torchtitan shards them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.plan import ParamSpec

FSDP_DIMS = ("dp_shard", "fsdp", "cp")
"""Mesh dims over which fully_shard cuts dim 0 (torchtitan folds cp into it)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A weight that repeats over layers. Experts are 3-D.

    `tp`: "col", "row", or "" (replicated over tp). `layers`: first layer, and the layer after the
    last one.
    """

    name: str
    shape: tuple[int, ...]
    tp: str
    layers: tuple[int, int]


def llama3(num_layers: int, hidden: int, inner: int, kv: int = 1024) -> tuple[Kind, ...]:
    """Return the weights of a Llama 3 model with 8 key-value heads of 128.

    Sizes: Llama 3 herd of models, arXiv:2407.21783, table 3.
    """
    all_layers = (0, num_layers)
    sizes = [
        ("attention.wq", (hidden, hidden), "col"),
        ("attention.wk", (kv, hidden), "col"),
        ("attention.wv", (kv, hidden), "col"),
        ("attention.wo", (hidden, hidden), "row"),
        ("feed_forward.w1", (inner, hidden), "col"),
        ("feed_forward.w2", (hidden, inner), "row"),
        ("feed_forward.w3", (inner, hidden), "col"),
    ]
    return tuple(Kind(name, shape, tp, all_layers) for name, shape, tp in sizes)


def deepseek(num_layers: int, num_heads: int, num_dense: int, num_experts: int) -> tuple[Kind, ...]:
    """Return the weights of a model with DeepSeek-V3's attention and experts.

    Hidden size 7168, latent ranks 1536 and 512. Heads have 128 + 64 query and key dims and 128
    value dims. Inner sizes: 18432 in dense layers, 2048 in experts, of which one is shared
    (DeepSeek-V3, arXiv:2412.19437, section 4.2).
    """
    hidden, inner = 7168, 2048
    every, dense, moe = (0, num_layers), (0, num_dense), (num_dense, num_layers)
    return (
        Kind("attention.wq_a", (1536, hidden), "", every),
        Kind("attention.wq_b", (num_heads * 192, 1536), "col", every),
        Kind("attention.wkv_a", (512 + 64, hidden), "", every),
        Kind("attention.wkv_b", (num_heads * 256, 512), "col", every),
        Kind("attention.wo", (hidden, num_heads * 128), "row", every),
        Kind("feed_forward.w1", (18432, hidden), "col", dense),
        Kind("feed_forward.w2", (hidden, 18432), "row", dense),
        Kind("feed_forward.w3", (18432, hidden), "col", dense),
        Kind("moe.experts.w1", (num_experts, inner, hidden), "col", moe),
        Kind("moe.experts.w2", (num_experts, hidden, inner), "row", moe),
        Kind("moe.experts.w3", (num_experts, inner, hidden), "col", moe),
        Kind("moe.shared_experts.w1", (inner, hidden), "col", moe),
        Kind("moe.shared_experts.w2", (hidden, inner), "row", moe),
        Kind("moe.shared_experts.w3", (inner, hidden), "col", moe),
        Kind("moe.router.gate", (num_experts, hidden), "", moe),
    )


def gpt2() -> tuple[Kind, ...]:
    """Return the weights of GPT-2 small, stored as torch.nn.Linear.

    12 layers of hidden size 768 (Radford et al. 2019, table 2).
    """
    sizes = [
        ("attn.c_attn", (2304, 768), "col"),
        ("attn.c_proj", (768, 768), "row"),
        ("mlp.c_fc", (3072, 768), "col"),
        ("mlp.c_proj", (768, 3072), "row"),
    ]
    return tuple(Kind(name, shape, tp, (0, 12)) for name, shape, tp in sizes)


MODELS: dict[str, tuple[Kind, ...]] = {
    "gpt2": gpt2(),
    "llama3-8b": llama3(32, 4096, 14336),
    "llama3-70b": llama3(80, 8192, 28672),
    "llama3-405b": llama3(126, 16384, 53248),
    # 61 layers, the first 3 dense, 128 heads, 256 routed experts (arXiv:2412.19437, section 4.2)
    "deepseek-v3": deepseek(61, 128, 3, 256),
    # 61 layers, the first dense, 64 heads, 384 routed experts (Kimi K2, arXiv:2507.20534, table 2)
    "kimi-k2": deepseek(61, 64, 1, 384),
}
"""By model, the weights that Muon steps. AdamW steps embeddings, heads, norms and biases."""


def specs_of(model: str, mesh: MeshSpec, *, shard_momentum: bool = False) -> list[ParamSpec]:
    """Return the Muon parameters of a model in `MODELS` on a mesh with torchtitan's dim names.

    tp cuts dim 0 ("col") or dim 1 ("row") of a matrix, the FSDP dims cut dim 0 after tp, and ep
    cuts the experts. Other dims replicate. Raises ValueError for an unknown model or mesh dim.
    """
    if model not in MODELS:
        raise ValueError(f"no model {model!r}: use one of {', '.join(MODELS)}, or pkg.mod:fn")
    supported = {*FSDP_DIMS, "dp_replicate", "tp", "ep"}
    if unknown := [name for name in mesh.dim_names if name not in supported]:
        raise ValueError(
            f"models by name have no mesh dims {', '.join(unknown)}, only "
            f"{', '.join(sorted(supported))}"
        )
    specs = _specs(MODELS[model], mesh)
    return [replace(spec, shards_momentum=shard_momentum) for spec in specs]


def _specs(kinds: tuple[Kind, ...], mesh: MeshSpec) -> Iterator[ParamSpec]:
    layouts = {kind: Layout(mesh, kind.shape, _cuts(kind, mesh)) for kind in kinds}
    matrices = {kind: matrices_of(kind.shape) for kind in kinds}
    for layer in range(max(kind.layers[1] for kind in kinds)):
        for kind in kinds:
            if kind.layers[0] <= layer < kind.layers[1]:
                fqn = f"layers.{layer}.{kind.name}.weight"
                yield ParamSpec(fqn, layouts[kind], "float32", matrices[kind])


def _cuts(kind: Kind, mesh: MeshSpec) -> tuple[tuple[str, ...], ...]:
    cuts: list[tuple[str, ...]] = [() for _ in kind.shape]
    fsdp = tuple(name for name in mesh.dim_names if name in FSDP_DIMS)
    is_experts = len(kind.shape) == 3
    if is_experts and "ep" in mesh.sizes:
        cuts[0] = ("ep",)
    if kind.tp and "tp" in mesh.sizes:
        cuts[len(kind.shape) - (2 if kind.tp == "col" else 1)] = ("tp",)
    cuts[0] = (*cuts[0], *fsdp)
    return tuple(cuts)
