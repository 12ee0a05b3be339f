"""Muon in Hugging Face's Trainer: `Trainer(optimizer_cls_and_kwargs=(MuonFactory, {...}))`.

Does not import transformers. The Trainer calls the factory with its prepared model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.config import create_devicemesh_config
from muon_dtensor.grouping import group_parameters
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.options import DEFAULTS


class MuonFactory:
    """Builds the optimizer after the Trainer has sharded the model.

    Keywords are those of `group_parameters` (`lr`, `weight_decay`, `adamw`, `rules`, `recognize`)
    and of `Muon`. Under DDP (several ranks, no DTensor) the ranks share the orthogonalizations.
    `recognize=True` declares the matrices of fused and of transposed weights (GPT-2's Conv1D).
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float = DEFAULTS["lr"],
        weight_decay: float | Mapping[str, float] | None = None,
        adamw: Mapping[str, Any] | None = None,
        rules: Sequence[tuple[str, Mapping[str, Any]]] = (),
        recognize: bool | str = False,
        **options: Any,
    ) -> Muon:
        """Return the optimizer. Raises the errors of `group_parameters` and `Muon`."""
        is_single_rank = not dist.is_initialized() or dist.get_world_size() == 1
        if not is_single_rank and not any(isinstance(p, DTensor) for p in model.parameters()):
            options.setdefault("distributed_config", create_devicemesh_config(dp_replicate=-1))
        groups = group_parameters(
            model,
            lr=lr,
            weight_decay=weight_decay,
            adamw=adamw,
            rules=rules,
            recognize=recognize,
        )
        return Muon(groups, **options)
