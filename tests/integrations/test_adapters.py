"""Muon in axolotl and NeMo AutoModel, against their code where it is installed (see .ci/train)."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon
from tests.support.pool import run_processes

pytestmark = [pytest.mark.train]

OPTIONS = {"lr": 0.03, "adamw": {"lr": 1e-3}}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 16, bias=False), nn.LayerNorm(16))


def lrs(optimizer):
    return {group["algorithm"]: group["lr"] for group in optimizer.param_groups}


def automodel(sharded):
    from nemo_automodel.components.optim.optimizer import build_optimizer

    name = "muon_dtensor.integrations.automodel.MuonDTensorConfig"
    mesh = None
    built = model()
    if sharded:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        fully_shard(built[1], mesh=mesh)  # beside plain parameters
    (optimizer,) = build_optimizer(built, (name, OPTIONS), device_mesh=mesh)
    ids = torch.arange(4)
    before = [p.detach().clone() for p in built.parameters()]
    built(ids).square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True)]
    return type(optimizer).__module__, lrs(optimizer), all(changed[:2])


@pytest.mark.parametrize("sharded", [False, True])
def test_automodel_builds_our_muon(sharded):
    pytest.importorskip("nemo_automodel")
    for result in run_processes(2, automodel, True) if sharded else [automodel(False)]:
        assert result == ("muon_dtensor.optimizer.muon", {"adamw": 1e-3, "muon": 0.03}, True)


def test_automodel_s_overrides_are_refused():
    pytest.importorskip("nemo_automodel")
    from nemo_automodel.components.optim.optimizer import ParamGroupOverride

    from muon_dtensor.integrations.automodel import MuonDTensorConfig

    fields = ParamGroupOverride.__dataclass_fields__
    values = dict.fromkeys(list(fields)[:1], "x")
    config = MuonDTensorConfig()
    config.param_group_overrides = [ParamGroupOverride(**values)]
    with pytest.raises(ValueError, match="use rules"):
        config.build(model())


def trainer_mixin(axolotl):
    """Return axolotl's mixin without the packages that the rest of its trainers need."""
    path = Path(axolotl.__file__).parent / "core/trainers/mixins/optimizer.py"
    spec = importlib.util.spec_from_file_location("axolotl_optimizer_mixin", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OptimizerMixin


def test_axolotl_s_trainer_builds_our_muon():
    axolotl = pytest.importorskip("axolotl")
    from axolotl.utils.dict import DictDefault

    from muon_dtensor.integrations.axolotl import MuonArgs, MuonPlugin

    plugin = MuonPlugin()
    assert plugin.get_input_args() == "muon_dtensor.integrations.axolotl.MuonArgs"
    assert MuonArgs(muon_dtensor=OPTIONS).muon_dtensor == OPTIONS
    mixin = trainer_mixin(axolotl)
    trainer = mixin.__new__(mixin)  # its constructor needs a training job
    trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model(), None, None
    names = ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups")
    trainer.args = SimpleNamespace(**dict.fromkeys(names))
    plugin.post_trainer_create(DictDefault({"muon_dtensor": OPTIONS}), trainer)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Muon)
    assert lrs(optimizer) == {"adamw": 1e-3, "muon": 0.03}
    assert plugin.create_optimizer(DictDefault({}), trainer) is None
    again = plugin.create_optimizer(DictDefault({"muon_dtensor": OPTIONS}), trainer)
    assert lrs(again) == lrs(optimizer)
    untouched = SimpleNamespace(optimizer_cls_and_kwargs=None)
    plugin.post_trainer_create(DictDefault({}), untouched)
    assert untouched.optimizer_cls_and_kwargs is None
