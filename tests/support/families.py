"""Small models of the known families, and what their own forward passes do with their weights.

A probe runs a model and takes gradients of the tensors that its code splits off: the rows (or
columns) of a fused weight that a tensor depends on are those of one matrix. Nothing here reads the
patterns under test. Imports transformers or torchtitan in the functions that need them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 8}
NO_PADDING = {"pad_token_id": 0}
LATENT = {
    **SIZES,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "intermediate_size": 24,
    "moe_intermediate_size": 10,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "decoder_sparse_step": 1}

HF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen3-moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 3}),
    "mistral": ("MistralConfig", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", GROUPED),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 24}),
    "falcon": ("FalconConfig", {**SIZES, "multi_query": False, "new_decoder_architecture": False}),
    "falcon-one-key": (
        "FalconConfig",
        {**SIZES, "multi_query": True, "new_decoder_architecture": False},
    ),
    "falcon-new-decoder": (
        "FalconConfig",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "phi3": ("Phi3Config", {**{k: v for k, v in GROUPED.items() if k != "head_dim"}, **NO_PADDING}),
    "deepseek-v2": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, "q_lora_rank": 10}),
    "gpt-oss": ("GptOssConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
}


def hf_model(name: str) -> nn.Module:
    """Return a family of transformers, small, with random weights and its experts' own code."""
    import transformers

    torch.manual_seed(0)
    if name == "vit":
        config: Any = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
        model = transformers.ViTForImageClassification(config)
    else:
        class_name, sizes = HF[name]
        config = getattr(transformers, class_name)(**sizes)
        config._experts_implementation = "eager"
        if name == "gpt-oss":  # its own attention has sinks, which torch's does not take
            transformers.AttentionInterface.register("without_sinks", _attention_without_sinks)
            config._attn_implementation = "without_sinks"
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn(param.shape))
    return model.eval()


def _attention_without_sinks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return output.transpose(1, 2), None


@dataclass
class Taps:
    """Tensors that a forward pass splits off.

    `attention`: (query, key, value) of each attention, [batch, heads, tokens, head dim]. `gates`:
    the inputs of gated activations.
    """

    attention: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Records the inputs of attention and of activations."""

    ACTIVATIONS = ("silu", "gelu", "sigmoid")

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self._taps = taps

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            self._taps.attention.append((query, key, value))
        elif name in self.ACTIVATIONS:
            self._taps.gates.append(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[Taps]:
    """Record the tensors of forward passes in this context."""
    taps = Taps()
    with _Recorder(taps):
        yield taps


def elements_of(outputs: Tensor, weight: Tensor) -> frozenset[int]:
    """Return the elements of a weight that a tensor depends on, numbered in row-major order."""
    elements: set[int] = set()
    for _ in range(2):  # the gradient of one element may be zero by rounding, but not twice
        probe = (outputs * torch.randn(outputs.shape)).sum()
        (grad,) = torch.autograd.grad(probe, weight, retain_graph=True, allow_unused=True)
        if grad is not None:
            elements |= set(grad.flatten().nonzero().flatten().tolist())
    return frozenset(elements)


def is_transposed(output: Tensor, weight: Tensor) -> bool:
    """Whether a weight is stored [in, out]: one output depends on a column of it."""
    elements = sorted(elements_of(output, weight))
    return elements[1] - elements[0] > 1


TITAN = (
    *("titan-llama3", "titan-qwen3", "titan-qwen3-separate", "titan-deepseek-v3"),
    "titan-gpt-oss",
)


def titan_taps(name: str) -> tuple[nn.Module, Taps]:
    """Return a layer of a family of torchtitan, and what its modules split off their weights."""
    import dataclasses

    from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3

    configs = {
        "titan-llama3": lambda: llama3.llama3_configs["debugmodel"]("flex"),
        "titan-qwen3": lambda: qwen3.qwen3_configs["debugmodel"]("flex"),
        "titan-qwen3-separate": lambda: qwen3.qwen3_configs["debugmodel_non_fused_qkv"]("flex"),
        "titan-deepseek-v3": lambda: deepseek_v3.deepseekv3_configs["debugmodel"](
            "flex", "standard"
        ),
        "titan-gpt-oss": lambda: gpt_oss.gptoss_configs["debugmodel"]("standard", "flex"),
    }
    config = configs[name]()
    model = dataclasses.replace(config, layers=config.layers[-1:]).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    attention, taps = model.layers["0"].attention, Taps()
    x = torch.randn(1, 6, 256, generator=generator)

    class Recorder(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            taps.attention.append((query, key, value))
            return value

    if name == "titan-deepseek-v3":
        attention.inner_attention = Recorder()
        attention(x, None, torch.arange(6)[None])
    else:
        taps.attention.append(attention.qkv_linear(x))
    taps.attention = [tuple(t.transpose(1, 2) for t in split) for split in taps.attention]  # type: ignore[misc]
    if name == "titan-gpt-oss":
        experts = model.layers["0"].moe.routed_experts.inner_experts
        with _Recorder(taps):
            experts(x[0], torch.tensor([2, 3, 0, 0, 0, 0, 0, 1]))
    return model, taps
