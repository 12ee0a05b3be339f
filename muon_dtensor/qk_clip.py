"""QK-clip of MuonClip, a post-step hook: scales down query and key weights of heads with too large
logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_dtensor.runtime.collectives import maximum_of_all
from muon_dtensor.runtime.dtensors import LayoutCache, describe_layout
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, ordinary_mode, this_rank

TAU = 100.0
"""Largest allowed logit in the Kimi K2 report."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Rows of a weight [rows, ...] that belong to heads.

    Head h has the `size` rows from `start + h * stride` on. They are multiplied by the factor of
    the head to the power of `exponent`.
    """

    weight: Tensor
    num_heads: int
    stride: int
    size: int
    exponent: float
    start: int = 0

    def __post_init__(self) -> None:
        last = self.start + (self.num_heads - 1) * self.stride + self.size
        if min(self.num_heads, self.stride, self.size) < 1 or self.start < 0 or last > len(self):
            raise ValueError(
                f"{self.num_heads} heads of {self.size} rows, {self.stride} rows apart from row "
                f"{self.start} on, do not fit into a weight of {len(self)} rows"
            )

    def __len__(self) -> int:
        return int(self.weight.shape[0])

    def factors(self, of_heads: Tensor) -> Tensor:
        """Return one factor per row [rows]; 1 for rows that belong to no head."""
        rows = torch.ones(len(self), dtype=torch.float64, device=of_heads.device)
        first = self.start + self.stride * torch.arange(self.num_heads, device=rows.device)
        index = first[:, None] + torch.arange(self.size, device=rows.device)
        rows[index] = (of_heads.double() ** self.exponent)[:, None]
        return rows


def multi_head(query: Tensor, key: Tensor, head_dim: int) -> list[HeadRows]:
    """Return the rows of query weights [heads * head_dim, model] and key weights of one layer.

    With equal numbers of query and key heads, each is scaled by the root of the factor. With fewer
    key heads, several query heads share one: the query is scaled by the full factor and the key is
    unchanged, so that one head does not shrink another (as the report leaves MLA's shared rotary
    key).
    """
    heads, key_heads = len(query) // head_dim, len(key) // head_dim
    if heads * head_dim != len(query) or key_heads * head_dim != len(key) or heads % key_heads:
        raise ValueError(
            f"query and key have {len(query)} and {len(key)} rows, which do not divide into heads "
            f"of {head_dim} rows"
        )
    if key_heads < heads:
        return [HeadRows(query, heads, head_dim, head_dim, 1.0)]
    return [HeadRows(weight, heads, head_dim, head_dim, 0.5) for weight in (query, key)]


def fused(wqkv: Tensor, num_heads: int, num_key_heads: int, head_dim: int) -> list[HeadRows]:
    """Return the rows of a fused weight [(heads + 2 key heads) * head_dim, model].

    Its blocks are query, key and value, in this order.
    """
    if len(wqkv) != (num_heads + 2 * num_key_heads) * head_dim:
        raise ValueError(
            f"{len(wqkv)} rows are not {num_heads} query and twice {num_key_heads} key heads of "
            f"{head_dim} rows"
        )
    if num_key_heads < num_heads:
        return [HeadRows(wqkv, num_heads, head_dim, head_dim, 1.0)]
    starts = (0, num_heads * head_dim)
    return [HeadRows(wqkv, num_heads, head_dim, head_dim, 0.5, start) for start in starts]


def multi_head_latent(
    query: Tensor, key_value: Tensor, num_heads: int, nope_dim: int, rope_dim: int, value_dim: int
) -> list[HeadRows]:
    """Return the rows of MLA's up-projections.

    Query [heads * (nope + rope), q_rank], key and value [heads * (nope + value), kv_rank]. The
    shared rotary key is not scaled.
    """
    width = nope_dim + rope_dim
    return [
        HeadRows(query, num_heads, width, nope_dim, 0.5),
        HeadRows(query, num_heads, width, rope_dim, 1.0, nope_dim),
        HeadRows(key_value, num_heads, nope_dim + value_dim, nope_dim, 0.5),
    ]


class QKClip:
    """Clips attention logits after each step by scaling weights (Kimi K2, arXiv:2507.20534, 2.1).

    With S_h the largest logit q k / sqrt(d) of head h since the last step, over all ranks:

        gamma_h = min(1, tau / S_h),   W_q^h <- gamma_h^(1/2) W_q^h,   W_k^h <- gamma_h^(1/2) W_k^h

    so that the same inputs give no logit above tau. Rotary parts of MLA's query are scaled by
    gamma_h. Each rank scales its own shards; only the maxima are exchanged.

        clip = QKClip([multi_head(b.wq.weight, b.wk.weight, 128) for b in model.layers])
        optimizer.register_step_post_hook(clip)
        # in the forward of layer i, with logits [batch, heads, queries, keys]:
        clip.observe(i, logits.detach().amax((0, 2, 3)))
    """

    def __init__(
        self,
        layers: Sequence[Sequence[HeadRows]],
        *,
        tau: float = TAU,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """`layers`: of this rank's stage, in the same order on all ranks. `mesh`: all ranks that
        hold parts of them or process other data; default: that of the first DTensor weight.

        Raises ValueError if tau is not above 0, or the weights of a layer differ in heads.
        """
        if not tau > 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        if any(len({rows.num_heads for rows in layer}) != 1 for layer in layers):
            raise ValueError("the weights of a layer must have the same number of heads")
        self._layers, self._tau = [list(layer) for layer in layers], tau
        weights = [rows.weight for layer in self._layers for rows in layer]
        if mesh is None:
            mesh = next((w.device_mesh for w in weights if isinstance(w, DTensor)), None)
        self._layout_cache = LayoutCache()
        self._mesh = None if mesh is None else self._layout_cache.mesh(mesh)
        self._groups = Groups(self._layout_cache.device_meshes, this_rank())
        self._heads = [layer[0].num_heads for layer in self._layers]
        device = local_part(weights[0]).device if weights else torch.device("cpu")
        zeros = torch.zeros(len(layers), max(self._heads, default=0), device=device)
        if self._mesh is not None:
            zeros = self._groups.on_device(self._mesh, zeros)
        self._max_logits = zeros

    def observe(self, layer: int, max_logits: Tensor, first_head: int = 0) -> None:
        """Record the largest logits [heads] of a forward pass; the maximum over passes is kept.

        `first_head`: index of the first head that this rank computes, under tensor parallelism.
        """
        end = first_head + len(max_logits)
        if max_logits.ndim != 1 or not 0 <= first_head <= end <= self._heads[layer]:
            raise ValueError(
                f"layer {layer} has {self._heads[layer]} heads; got the logits of "
                f"{list(max_logits.shape)} from head {first_head} on"
            )
        maxima = self._max_logits[layer, first_head:end]
        torch.maximum(maxima, max_logits.detach().to(maxima), out=maxima)

    @property
    def max_logits(self) -> Tensor:
        """The largest logits since the last step on this rank [layers, heads]."""
        return self._max_logits

    @ordinary_mode()
    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        """Scale the weights, then reset the observed maxima. A collective of the mesh's ranks."""
        if self._mesh is not None:
            for group in self._groups.along_each_dim(self._mesh):
                maximum_of_all(self._max_logits.view(-1), group)
        gammas = (self._tau / self._max_logits.double().clamp(min=self._tau)).nan_to_num(nan=1.0)
        for layer, gamma in zip(self._layers, gammas, strict=True):
            for rows in layer:
                self._scale(rows, gamma[: rows.num_heads])
        self._max_logits.zero_()

    def _scale(self, rows: HeadRows, gamma: Tensor) -> None:
        factors = rows.factors(gamma)
        weight = rows.weight
        if isinstance(weight, DTensor):
            layout = describe_layout(weight, self._layout_cache.mesh(weight.device_mesh))
            region = layout.region(layout.mesh.position_of(this_rank()))
            factors = factors[region.start[0] : region.stop[0]]
        local = local_part(weight)
        local.mul_(factors.to(local).view(-1, *[1] * (local.ndim - 1)))
