"""Recognizes the logical matrices of known model families: which weights are fused, and how.

Classes of modules and names of weights decide. Sizes come from the module and its `config`, which
are those of the whole model, also under tensor parallelism.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout.declarations import Declaration

GRANULARITIES = ("projections", "heads")
"""What one matrix is: a projection (query, gate, ...), or one head of an attention projection."""


class Sizes:
    """Sizes of a module, by the names that its library uses. Raises AttributeError for others."""

    def __init__(self, module: nn.Module) -> None:
        self._places = (module, getattr(module, "config", None))

    def __getattr__(self, name: str) -> Any:
        for place in self._places:
            value = getattr(place, name, None)
            if value is not None:
                return value
        raise AttributeError(name)

    def first(self, *names: str) -> int:
        """Return the size with the first of these names that is known."""
        for name in names:
            value = getattr(self, name, None)
            if value is not None:
                return int(value)
        raise AttributeError(", ".join(names))

    @property
    def head(self) -> int:
        """Elements per head."""
        size: int | None = getattr(self, "head_dim", None)
        return size or self.first("hidden_size") // self.first("num_attention_heads")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and one value head."""
        known: int | None = getattr(self, "heads_per_kv", None)
        return known or self.first("num_heads", "num_attention_heads", "n_heads") // self.first(
            "num_kv_heads", "num_key_value_heads", "n_kv_heads"
        )


@dataclass(frozen=True)
class Weight:
    """How a weight of a module stores its matrices.

    `names`: regex of its name in the module, without ".weight". `holds`: what it holds, for the
    table. `stored`: left side of an einops pattern. `matrices`: right side, one matrix per
    projection; "" if the weight is one matrix as it is stored. `heads`: right side, one matrix per
    head; "" if heads do not divide it. `axes`: lengths of axes. `split`: an axis, and the sizes of
    its blocks.
    """

    names: str
    holds: str
    stored: str = ""
    matrices: str = ""
    heads: str = ""
    axes: Callable[[Sizes], Mapping[str, int]] = field(default=lambda sizes: {})
    split: tuple[str, Callable[[Sizes], Sequence[int]]] | None = None

    def declaration(self, sizes: Sizes, granularity: str) -> dict[str, Any]:
        """Return options of a param group. Raises AttributeError if a size is unknown."""
        right = self.heads if granularity == "heads" and self.heads else self.matrices
        if not right:
            return {}
        options: dict[str, Any] = {"matrix": f"{self.stored} -> {right}"}
        if axes := dict(self.axes(sizes)):
            options["matrix_axes"] = axes
        if self.split is not None:
            axis, blocks = self.split
            options |= {"split_dim": axis, "split_sizes": tuple(blocks(sizes))}
        return options


@dataclass(frozen=True)
class Modules:
    """Modules of a family by the regex of their class names in a package, and their weights.

    `when`: whether a module is one of them, by its sizes.
    """

    family: str
    package: str
    classes: str
    weights: tuple[Weight, ...]
    when: Callable[[Sizes], bool] = field(default=lambda sizes: True)


def _head(sizes: Sizes) -> dict[str, int]:
    return {"d": sizes.head}


def _rows(names: str, holds: str, axes: Callable[[Sizes], Mapping[str, int]] = _head) -> Weight:
    """Return a weight [out, in] with whole heads in its rows."""
    return Weight(names, holds, "(head d) h", "", "head d h", axes)


def _cols(names: str, holds: str, axes: Callable[[Sizes], Mapping[str, int]] = _head) -> Weight:
    """Return a weight [out, in] with whole heads in its columns."""
    return Weight(names, holds, "h (head d)", "", "head h d", axes)


def _grouped(names: str) -> Weight:
    """Return a weight of groups: the queries that share a key and a value, that key, that value."""
    return Weight(
        names,
        "query, key, value by group",
        "(group part d) h",
        "(group part d) h",
        "group part d h",
        _head,
        ("part", lambda sizes: (sizes.queries_per_group, 1, 1)),
    )


def _by_head(names: str) -> Weight:
    """Return a weight that holds query, key and value of each head together."""
    return Weight(
        names,
        "query, key, value by head",
        "(head part d) h",
        "part (head d) h",
        "part head d h",
        lambda sizes: {"part": 3, "d": sizes.first("head_dim", "head_size")},
    )


def _in_blocks(names: str, num_kv: Callable[[Sizes], int]) -> Weight:
    """Return a weight that holds all queries, then all keys, then all values."""
    return Weight(
        names,
        "query, key, value",
        "(head d) h",
        "(head d) h",
        "head d h",
        _head,
        (
            "head",
            lambda sizes: (
                sizes.first("num_attention_heads", "num_heads"),
                num_kv(sizes),
                num_kv(sizes),
            ),
        ),
    )


def _latent(q: str, kv_a: str, kv_b: str, o: str) -> tuple[Weight, ...]:
    """Return the weights of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1)."""
    return (
        _rows(q, "query", lambda sizes: {"d": sizes.qk_nope_head_dim + sizes.qk_rope_head_dim}),
        Weight(
            kv_a,
            "latent, rotary key",
            "row h",
            "row h",
            split=("row", lambda sizes: (sizes.kv_lora_rank, sizes.qk_rope_head_dim)),
        ),
        Weight(
            kv_b,
            "key, value by head",
            "(head d) r",
            "(head d) r",
            "head d r",
            lambda sizes: {"d": sizes.qk_nope_head_dim + sizes.v_head_dim},
            ("d", lambda sizes: (sizes.qk_nope_head_dim, sizes.v_head_dim)),
        ),
        _cols(o, "output", lambda sizes: {"d": sizes.v_head_dim}),
    )


def _two(sizes: Sizes) -> dict[str, int]:
    return {"part": 2}


GATE_UP = Weight("gate_up_proj", "gate, up", "(part i) h", "part i h", axes=_two)
GATE_UP_OF_EXPERTS = Weight("gate_up_proj", "gate, up", "e (part i) h", "e part i h", axes=_two)
TRANSPOSED = Weight("c_fc|c_proj", "stored transposed", "i o", "o i")
SEPARATE = (_rows("q_proj", "query"), _rows("k_proj", "key"), _rows("v_proj", "value"))

HF, TITAN = "transformers", "torchtitan"
KNOWN = (
    Modules(
        "Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma, gpt-oss, ViT",
        HF,
        "(Llama|Qwen2|Qwen3|Qwen3Moe|Mistral|Mixtral|Gemma|GptOss|ViT)Attention",
        (*SEPARATE, _cols("o_proj", "output")),
    ),
    Modules(
        "GPT-2",
        HF,
        "GPT2Attention",
        (
            Weight(
                "c_attn",
                "query, key, value, stored transposed",
                "h (part head d)",
                "part (head d) h",
                "part head d h",
                lambda s: {"part": 3, "d": s.head},
            ),
            Weight(
                "c_proj", "output, stored transposed", "(head d) h", "h (head d)", "head h d", _head
            ),
        ),
        when=lambda sizes: not sizes.is_cross_attention,
    ),
    Modules("GPT-2", HF, "GPT2MLP", (TRANSPOSED,)),
    Modules(
        "GPT-NeoX",
        HF,
        "GPTNeoXAttention",
        (_by_head("query_key_value"), _cols("dense", "output", lambda s: {"d": s.head_size})),
    ),
    Modules(
        "Falcon, new decoder",
        HF,
        "FalconAttention",
        (_grouped("query_key_value"), _cols("dense", "output")),
        when=lambda sizes: bool(sizes.new_decoder_architecture),
    ),
    Modules(
        "Falcon, one key",
        HF,
        "FalconAttention",
        (_in_blocks("query_key_value", lambda sizes: 1), _cols("dense", "output")),
        when=lambda sizes: bool(sizes.multi_query) and not sizes.new_decoder_architecture,
    ),
    Modules(
        "Falcon",
        HF,
        "FalconAttention",
        (_by_head("query_key_value"), _cols("dense", "output")),
        when=lambda sizes: not (sizes.multi_query or sizes.new_decoder_architecture),
    ),
    Modules(
        "Phi-3",
        HF,
        "Phi3Attention",
        (_in_blocks("qkv_proj", lambda s: s.num_key_value_heads), _cols("o_proj", "output")),
    ),
    Modules("Phi-3", HF, "Phi3MLP", (GATE_UP,)),
    Modules(
        "DeepSeek-V2, DeepSeek-V3",
        HF,
        "DeepseekV[23]Attention",
        _latent("q_proj|q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
    Modules(
        "Mixtral, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3",
        HF,
        "(Mixtral|Qwen3Moe|DeepseekV2|DeepseekV3)Experts",
        (GATE_UP_OF_EXPERTS,),
    ),
    Modules(
        "gpt-oss",
        HF,
        "GptOssExperts",
        (
            Weight(
                "gate_up_proj",
                "gate, up, interleaved and stored transposed",
                "e h (i part)",
                "e part i h",
                axes=_two,
            ),
            Weight("down_proj", "stored transposed", "e i h", "e h i"),
        ),
    ),
    Modules(
        "Llama 3, Qwen3, gpt-oss",
        TITAN,
        "QKVLinear",
        (_rows("wq", "query"), _rows("wk", "key"), _rows("wv", "value")),
    ),
    Modules(
        "Llama 3, Qwen3, gpt-oss",
        TITAN,
        "FusedQKVLinear",
        (_grouped("wqkv"),),
    ),
    Modules("Llama 3, Qwen3", TITAN, "GQAttention", (_cols("wo", "output"),)),
    Modules(
        "gpt-oss",
        TITAN,
        "Attention",
        (_cols("wo", "output"),),
        when=lambda sizes: hasattr(sizes, "sinks"),
    ),
    Modules(
        "DeepSeek-V3",
        TITAN,
        "Attention",
        _latent("wq|wq_b", "wkv_a", "wkv_b", "wo"),
        when=lambda sizes: hasattr(sizes, "kv_lora_rank"),
    ),
    Modules(
        "gpt-oss",
        TITAN,
        "GptOssGroupedExperts",
        (
            Weight(
                "mlp1_weight_EGD", "gate, up, interleaved", "e (i part) h", "e part i h", axes=_two
            ),
        ),
    ),
    Modules(
        "torch",
        "torch",
        "MultiheadAttention",
        (
            Weight(
                "in_proj_weight",
                "query, key, value",
                "(part head d) h",
                "part (head d) h",
                "part head d h",
                lambda sizes: {"part": 3, "d": sizes.head_dim},
            ),
        ),
    ),
)
"""The families. Each has a test that splits its weights by the model's own forward pass:
tests/integrations/test_recognition.py."""


@dataclass(frozen=True)
class Recognized:
    """What a weight holds: options of a param group that declare its matrices, and the reason."""

    options: dict[str, Any]
    why: str


def recognized_in(
    path: Sequence[nn.Module], names: Sequence[str], shape: tuple[int, ...], granularity: str
) -> Recognized | None:
    """Return what a weight of a known family holds; None if it is of none.

    A weight is also of none if its shape is not that of the family.

    Args:
        path: the modules that contain the weight, outermost first.
        names: the name of each of them in the one before, and of the weight in the last.
        shape: of the whole weight.
        granularity: one of GRANULARITIES.
    """
    # the weight of a Linear is named by the Linear
    depth = -2 if names[-1] == "weight" and len(path) > 1 else -1
    module, name = path[depth], names[depth]
    classes = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(module).__mro__]
    sizes = Sizes(module)
    for known in KNOWN:
        if not any(
            package == known.package and re.fullmatch(known.classes, cls)
            for package, cls in classes
        ):
            continue
        for weight in known.weights:
            if not re.fullmatch(weight.names, name):
                continue
            try:
                if not known.when(sizes):
                    continue
                options = weight.declaration(sizes, granularity)
                _check(options, shape)
            except (AttributeError, RefusalError):
                continue
            unit = ", one matrix per head" if granularity == "heads" and weight.heads else ""
            return Recognized(options, f"{weight.holds}{unit} ({known.package}: {known.family})")
    return None


def _check(options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Raise RefusalError if a declaration does not fit the shape of a weight."""
    if options:
        axes = tuple(sorted(options.get("matrix_axes", {}).items()))
        sizes = options.get("split_sizes")
        Declaration(options["matrix"], axes, sizes, options.get("split_dim", 0)).matrices(shape)
