"""The private names of torch that this package reads: all in one file, and still there.

When a release of torch moves one, the test of that name says so, and what it is for.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from muon_dtensor.runtime import torch_private
from tests.support.pool import run_processes

USED = {
    "torch._disable_dynamo": "keeps optimizer.step out of torch.compile",
    "torch.autograd._profiler_enabled": "no cost of named ranges where no profiler runs",
    "torch.distributed._composable_state._module_state_mapping": "parameters of fully_shard",
    "torch.distributed.distributed_c10d._get_default_group": "the timeout of the default group",
    "torch.distributed.distributed_c10d._get_default_store": "how ranks tell of failed configs",
    "torch.distributed.tensor.placement_types._StridedShard": "the order in which dims were cut",
    "torch.distributed.tensor._utils._compute_local_shape_and_global_offset": (
        "which shards distributed checkpoints would misplace"
    ),
    "torch.testing._internal.distributed.fake_pg.FakeStore": "plans of clusters one does not have",
}
"""Dotted names that are imported or called, and what for."""

ATTRIBUTES = {
    "_local_tensor": "a DTensor's shard without a graph",
    "_spec": "a pinned shard as a DTensor",
}
"""Attributes of a DTensor."""

OF_FSDP1 = {"_is_flat_param", "_fsdp_flattened", "_params", "_shapes", "_param_extensions"}
OF_FSDP1 |= {"_shard_param_infos"}
"""Marks of FSDP1's flat parameters; test_from_groups.py shards by it for real."""

OF_FSDP2 = {"_orig_size", "_unsharded_param", "_fsdp_param_group", "_fsdp_param_groups"}
"""What FSDP2 keeps of a parameter; optimizer/test_misuse.py makes optimizers at the wrong time."""

OF_GROUPS = {"_get_backend", "_timeout"}
"""Of a gloo process group; tests/runtime/test_deaths.py lets it run out."""


@pytest.mark.parametrize("name", USED)
def test_a_private_name_of_torch_is_still_there(name):
    module, _, attribute = name.rpartition(".")
    home = importlib.import_module(module)
    assert hasattr(home, attribute), (
        f"torch {torch.__version__} has moved {name} ({USED[name]}): follow it in "
        "muon_dtensor/runtime/torch_private.py"
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_of_dtensors_is_still_there(name):
    slots = {*getattr(DTensor, "__slots__", ()), *DTensor.__annotations__, *vars(DTensor)}
    assert name in slots, f"torch {torch.__version__} has moved DTensor.{name} ({ATTRIBUTES[name]})"


def test_the_list_is_complete():
    """Every underscored name of somebody else in the one file that may read them is listed."""
    source = inspect.getsource(torch_private)
    code = "\n".join(line.partition("#")[0] for line in source.splitlines())
    code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
    found = set(re.findall(r"(?<![\w.])(?:\w+\.)*(_[a-z]\w+)", code))
    found |= set(re.findall(r"\b(_StridedShard|FakeStore)\b", code))
    own = {name for name in vars(torch_private) if name.startswith("_")}
    own |= {
        name for cls in vars(torch_private).values() if inspect.isclass(cls) for name in vars(cls)
    }
    own |= set(re.findall(r"self\.(_\w+)", code))
    listed = {name.rpartition(".")[2] for name in USED} | ATTRIBUTES.keys() | OF_FSDP1 | OF_FSDP2
    listed |= OF_GROUPS | {"_internal", "_utils", "_composable_state"}
    assert found - own - listed == set()


def test_no_other_file_names_them():
    root = Path(torch_private.__file__).parents[1]
    names = [name.rpartition(".")[2] for name in USED if "FakeStore" not in name]
    for path in root.rglob("*.py"):
        if path.name != "torch_private.py":
            text = path.read_text()
            assert not [name for name in names if re.search(rf"\b{name}\b", text)], path


def test_flat_parameters_of_fsdp1_are_marked_as_they_were():
    from torch.distributed.fsdp import _flat_param

    text = inspect.getsource(_flat_param)
    gone = [name for name in OF_FSDP1 if name not in text]
    assert not gone, f"torch {torch.__version__} has moved {gone} of FSDP1's flat parameters"
    for marks in run_processes(2, marks_of_a_real_one):
        assert marks == OF_FSDP1


def marks_of_a_real_one() -> set[str]:
    model = FullyShardedDataParallel(
        nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu")
    )
    flat = model._flat_param
    assert all(hasattr(param, "_fsdp_flattened") for param in model.parameters())
    return {name for name in OF_FSDP1 if hasattr(flat, name)}
