"""Muon in axolotl: a plugin.

plugins: [muon_dtensor.integrations.axolotl.MuonPlugin]
muon_dtensor: {lr: 0.02, adamw: {lr: 3.0e-4}}
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from muon_dtensor.integrations.transformers import MuonFactory
from muon_dtensor.optimizer.muon import Muon


class MuonArgs(BaseModel):  # type: ignore[misc]
    """Keys that the plugin adds to axolotl's config: `muon_dtensor`, keywords of `MuonFactory`."""

    muon_dtensor: dict[str, Any] | None = None


class AxolotlFactory:
    """Builds the optimizer; axolotl passes its training arguments to factories."""

    def __call__(self, model: nn.Module, args: Any = None, **options: Any) -> Muon:
        """Return the optimizer of a prepared model. `options`: keywords of `MuonFactory`."""
        return MuonFactory()(model, **options)


class MuonPlugin(BasePlugin):  # type: ignore[misc]
    """Lets axolotl's trainer build Muon after it has sharded the model.

    axolotl 0.19 does not call `create_optimizer` of plugins (it is called by earlier versions), but
    its trainer takes a factory. Without the key `muon_dtensor` the plugin does nothing.
    """

    def get_input_args(self) -> str:
        """Return the path of the keys that the plugin reads."""
        return f"{__name__}.MuonArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer the factory."""
        if cfg.muon_dtensor is not None:
            trainer.optimizer_cls_and_kwargs = (AxolotlFactory, dict(cfg.muon_dtensor))

    def create_optimizer(self, cfg: Any, trainer: Any) -> Muon | None:
        """Return the optimizer, for versions of axolotl that ask plugins for it."""
        if cfg.muon_dtensor is None:
            return None
        return AxolotlFactory()(trainer.model, **cfg.muon_dtensor)
