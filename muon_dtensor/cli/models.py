"""Weight shapes of published models, with sources, sharded as torchtitan shards them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.planning.plan import ParamSpec

FSDP_DIMS = ("dp_shard", "fsdp", "cp")
"""Mesh dims over which fully_shard cuts dim 0 (torchtitan folds cp into it)."""

EXPERT_FSDP_DIM = "efsdp"
"""Mesh dim over which fully_shard cuts experts: what `ep` leaves of dp_shard, cp and tp."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A weight that repeats over layers. Experts are 3-D.

    `tp`: "col", "row", or "" (replicated over tp). `layers`: first layer, and the layer after the
    last one. `projections`, `heads`: its matrices as `group_parameters` recognizes them, one for
    each projection or for each attention head; None: all of it, or one for each expert.
    """

    name: str
    shape: tuple[int, ...]
    tp: str
    layers: tuple[int, int]
    projections: Declaration | None = None
    heads: Declaration | None = None

    def declaration(self, recognize: str | None) -> Declaration:
        """Return the declaration of its matrices; `recognize`: "projections", "heads" or None."""
        declared = (self.heads or self.projections) if recognize == "heads" else self.projections
        return (declared if recognize else None) or Declaration()


def _by_head(size: int, *, in_rows: bool = True) -> Declaration:
    """Return the declaration of one matrix per head of this size, in its rows or columns."""
    stored, result = ("(head d) h", "head d h") if in_rows else ("h (head d)", "head h d")
    return Declaration(f"{stored} -> {result}", (("d", size),))


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
    heads = {f"attention.w{part}": _by_head(128) for part in "qkv"}
    heads["attention.wo"] = _by_head(128, in_rows=False)
    return tuple(
        Kind(name, shape, tp, all_layers, heads=heads.get(name)) for name, shape, tp in sizes
    )


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
        Kind("attention.wq_b", (num_heads * 192, 1536), "col", every, heads=_by_head(192)),
        Kind(
            "attention.wkv_a",
            (512 + 64, hidden),
            "",
            every,
            Declaration("row h -> row h", (), (512, 64), "row"),
        ),
        Kind(
            "attention.wkv_b",
            (num_heads * 256, 512),
            "col",
            every,
            Declaration("(head d) r -> (head d) r", (("d", 256),), (128, 128), "d"),
            Declaration("(head d) r -> head d r", (("d", 256),), (128, 128), "d"),
        ),
        Kind(
            "attention.wo",
            (hidden, num_heads * 128),
            "row",
            every,
            heads=_by_head(128, in_rows=False),
        ),
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
    declared = {
        "attn.c_attn": Declaration("(part h) i -> part h i", (("part", 3),)),
    }
    return tuple(Kind(name, shape, tp, (0, 12), declared.get(name)) for name, shape, tp in sizes)


def gpt_oss(num_layers: int, num_experts: int) -> tuple[Kind, ...]:
    """Return the weights of a gpt-oss model, as transformers stores them.

    Hidden and inner size 2880, 64 query and 8 key-value heads of 64 (gpt-oss model card,
    arXiv:2508.10925, section 2). Experts are stored [in, out], gate and up interleaved.
    """
    hidden, inner, every = 2880, 2880, (0, num_layers)
    gate_up = Declaration("e h (i part) -> e part i h", (("part", 2),))
    down = Declaration("e i h -> e h i")
    return (
        Kind("self_attn.q_proj", (4096, hidden), "col", every, heads=_by_head(64)),
        Kind("self_attn.k_proj", (512, hidden), "col", every, heads=_by_head(64)),
        Kind("self_attn.v_proj", (512, hidden), "col", every, heads=_by_head(64)),
        Kind("self_attn.o_proj", (hidden, 4096), "row", every, heads=_by_head(64, in_rows=False)),
        Kind("mlp.router", (num_experts, hidden), "", every),
        Kind("mlp.experts.gate_up_proj", (num_experts, hidden, 2 * inner), "row", every, gate_up),
        Kind("mlp.experts.down_proj", (num_experts, inner, hidden), "col", every, down),
    )


MODELS: dict[str, tuple[Kind, ...]] = {
    "gpt2": gpt2(),
    "llama3-8b": llama3(32, 4096, 14336),
    "llama3-70b": llama3(80, 8192, 28672),
    "llama3-405b": llama3(126, 16384, 53248),
    # 61 layers, the first 3 dense, 128 heads, 256 routed experts (arXiv:2412.19437, section 4.2)
    "deepseek-v3": deepseek(61, 128, 3, 256),
    # 61 layers, the first dense, 64 heads, 384 routed experts (Kimi K2, arXiv:2507.20534, table 2)
    "kimi-k2": deepseek(61, 64, 1, 384),
    # 24 and 36 layers, 32 and 128 experts (gpt-oss model card, arXiv:2508.10925, table 1)
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
}
"""By model, the weights that Muon steps. AdamW steps embeddings, heads, norms and biases."""

ACTIVE_PARAMETERS = {
    "gpt2": 0.124e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.6e9,
    "llama3-405b": 405.9e9,
    "deepseek-v3": 37e9,
    "kimi-k2": 32.6e9,
    "gpt-oss-20b": 3.6e9,
    "gpt-oss-120b": 5.1e9,
}
"""By model, the parameters that a token uses, embeddings and head included; sources as above."""


@dataclass(frozen=True)
class Meshes:
    """The meshes of one pipeline stage: of dense weights, and of experts if `ep` cuts them."""

    dense: MeshSpec
    experts: MeshSpec


def specs_of(
    model: str,
    sizes: Mapping[str, int],
    *,
    shard_momentum: bool = False,
    recognize: str | None = None,
) -> list[ParamSpec]:
    """Return the Muon parameters of a model in `MODELS`, sharded as torchtitan does.

    tp cuts dim 0 ("col") or dim 1 ("row") of a matrix, the FSDP dims cut dim 0 after tp. `ep` cuts
    the experts over ranks of dp_shard, cp and tp, which are not more ranks: `efsdp`, what ep leaves
    of these, cuts dim 0 of the experts too, or dim 1 if there are fewer experts than ranks. `pp`
    divides the layers into stages of about equal numbers. Other dims replicate.

    Args:
        model: its name.
        sizes: of the mesh dims, with torchtitan's names, outermost first.
        shard_momentum: see `ParamSpec`.
        recognize: "projections" or "heads", see `Kind`; None: weights as they are.

    Raises ValueError for an unknown model or mesh dim, or an ep that does not divide its ranks.
    """
    if model not in MODELS:
        raise ValueError(f"no model {model!r}: use one of {', '.join(MODELS)}, or pkg.mod:fn")
    if recognize not in (None, "projections", "heads"):
        raise ValueError(f"--recognize is projections or heads, got {recognize!r}")
    supported = {*FSDP_DIMS, "dp_replicate", "tp", "ep", "pp"}
    if unknown := [name for name in sizes if name not in supported]:
        raise ValueError(
            f"models by name have no mesh dims {', '.join(unknown)}, only "
            f"{', '.join(sorted(supported))}"
        )
    kinds = MODELS[model]
    num_layers, num_stages = max(kind.layers[1] for kind in kinds), sizes.get("pp", 1)
    if num_stages > num_layers:
        raise ValueError(f"{model} has {num_layers} layers, too few for {num_stages} stages of pp")
    specs: list[ParamSpec] = []
    for stage in range(num_stages):
        layers = range(num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages)
        specs += _specs(kinds, layers, _meshes(sizes, stage), recognize)
    return [replace(spec, shards_momentum=shard_momentum) for spec in specs]


def num_ranks_of(sizes: Mapping[str, int]) -> int:
    """Return the ranks of a mesh with torchtitan's names: `ep` is a part of the others."""
    return prod(size for name, size in sizes.items() if name != "ep")


def _meshes(sizes: Mapping[str, int], stage: int) -> Meshes:
    dims = {name: size for name, size in sizes.items() if name not in ("ep", "pp")}
    num_ranks = prod(dims.values())
    ranks = tuple(range(stage * num_ranks, (stage + 1) * num_ranks))
    dense = MeshSpec(tuple(dims), tuple(dims.values()), ranks)
    ep = sizes.get("ep", 1)
    if ep == 1:
        return Meshes(dense, dense)
    replicas = dims.get("dp_replicate", 1)
    if num_ranks // replicas % ep:
        raise ValueError(
            f"ep={ep} does not divide {num_ranks // replicas}, the product of dp_shard, cp and tp: "
            "its ranks are among these, as in torchtitan"
        )
    of_experts = {"dp_replicate": replicas, EXPERT_FSDP_DIM: num_ranks // replicas // ep, "ep": ep}
    if replicas == 1:
        del of_experts["dp_replicate"]
    return Meshes(dense, MeshSpec(tuple(of_experts), tuple(of_experts.values()), ranks))


def _specs(
    kinds: tuple[Kind, ...], layers: range, meshes: Meshes, recognize: str | None
) -> Iterator[ParamSpec]:
    layouts = {kind: _layout(kind, meshes) for kind in kinds}
    matrices = {kind: kind.declaration(recognize).matrices(kind.shape) for kind in kinds}
    for layer in layers:
        for kind in kinds:
            if kind.layers[0] <= layer < kind.layers[1]:
                fqn = f"layers.{layer}.{kind.name}.weight"
                yield ParamSpec(fqn, layouts[kind], "float32", matrices[kind])


def _layout(kind: Kind, meshes: Meshes) -> Layout:
    cuts: list[tuple[str, ...]] = [() for _ in kind.shape]
    is_experts = len(kind.shape) == 3
    mesh = meshes.experts if is_experts else meshes.dense
    if "ep" in mesh.sizes:
        cuts[0] = ("ep",)
        is_many = mesh.sizes["ep"] * mesh.sizes[EXPERT_FSDP_DIM] > kind.shape[0]
        cuts[is_many] = (*cuts[is_many], EXPERT_FSDP_DIM)
        return Layout(mesh, kind.shape, tuple(cuts))
    fsdp = tuple(name for name in mesh.dim_names if name in FSDP_DIMS)
    if kind.tp and "tp" in mesh.sizes:
        cuts[len(kind.shape) - (2 if kind.tp == "col" else 1)] = ("tp",)
    is_many = is_experts and mesh.num_ranks_along(fsdp) > kind.shape[0]
    cuts[is_many] = (*cuts[is_many], *fsdp)
    return Layout(mesh, kind.shape, tuple(cuts))
