"""The private names of torch that this package reads: all in one file, and still present.

If a release of torch moves one, the test of that name fails and says what it is for.
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
    "torch._C._is_alias_of": "whether a matrix is a copy or a view of its buffer",
    "torch._disable_dynamo": "keeps optimizer.step out of torch.compile",
    "torch.autograd._profiler_enabled": "no cost of named ranges where no profiler runs",
    "torch.distributed._composable_state._module_state_mapping": "parameters of fully_shard",
    "torch.distributed.distributed_c10d._get_default_group": "the timeout of the default group",
    "torch.distributed.distributed_c10d._get_default_store": "how ranks report failed configs",
    "torch.distributed.tensor.placement_types._StridedShard": "the order in which dims were cut",
    "torch.distributed.tensor._utils._compute_local_shape_and_global_offset": (
        "which shards distributed checkpoints would misplace"
    ),
    "torch.testing._internal.distributed.fake_pg.FakeStore": "plans without the devices",
}
"""Dotted names that are imported or called, and what for."""

ATTRIBUTES = {
    "_local_tensor": "a DTensor's shard without a graph",
    "_spec": "a pinned shard as a DTensor",
}
"""Attributes of a DTensor."""

OF_FSDP1 = {"_is_flat_param", "_fsdp_flattened", "_params", "_shapes", "_param_extensions"}
OF_FSDP1 |= {"_shard_param_infos"}
"""Attributes of FSDP1's flat parameters; test_from_groups.py shards with FSDP1."""

OF_FSDP2 = {"_orig_size", "_unsharded_param", "_fsdp_param_group", "_fsdp_param_groups"}
"""FSDP2's attributes of a parameter; used by tests in optimizer/test_misuse.py."""

OF_GROUPS = {"_get_backend", "_timeout"}
"""The timeout of a gloo process group; it ends in tests/runtime/test_deaths.py."""


@pytest.mark.parametrize("name", USED)
def test_a_private_name_of_torch_exists(name):
    module, _, attribute = name.rpartition(".")
    home = importlib.import_module(module)
    assert hasattr(home, attribute), (
        f"torch {torch.__version__} has moved {name} ({USED[name]}): change "
        "muon_dtensor/runtime/torch_private.py"
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_of_dtensors_exists(name):
    slots = {*getattr(DTensor, "__slots__", ()), *DTensor.__annotations__, *vars(DTensor)}
    assert name in slots, f"torch {torch.__version__} has moved DTensor.{name} ({ATTRIBUTES[name]})"


def test_the_list_is_complete():
    """The list has every underscored name of torch in the file that may read them."""
    source = inspect.getsource(torch_private)
    code = "\n".join(line.partition("#")[0] for line in source.splitlines())
    code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
    underscored = set(re.findall(r"(?<![\w.])(?:\w+\.)*(_[a-z]\w+)", code))
    underscored |= set(re.findall(r"\b(_StridedShard|FakeStore)\b", code))
    defined = {name for name in vars(torch_private) if name.startswith("_")}
    defined |= {
        name for cls in vars(torch_private).values() if inspect.isclass(cls) for name in vars(cls)
    }
    defined |= set(re.findall(r"self\.(_\w+)", code))
    listed = {name.rpartition(".")[2] for name in USED} | ATTRIBUTES.keys() | OF_FSDP1 | OF_FSDP2
    listed |= OF_GROUPS | {"_internal", "_utils", "_composable_state"}
    assert underscored - defined - listed == set()


def test_no_other_file_uses_private_names():
    root = Path(torch_private.__file__).parents[1]
    names = [name.rpartition(".")[2] for name in USED if "FakeStore" not in name]
    for path in root.rglob("*.py"):
        if path.name != "torch_private.py":
            text = path.read_text()
            assert not [name for name in names if re.search(rf"\b{name}\b", text)], path


def test_flat_parameters_of_fsdp1_have_these_attributes():
    from torch.distributed.fsdp import _flat_param

    text = inspect.getsource(_flat_param)
    absent = [name for name in OF_FSDP1 if name not in text]
    assert not absent, f"torch {torch.__version__} has moved {absent} of FSDP1's flat parameters"
    for attributes in run_processes(2, attributes_of_a_flat_parameter):
        assert attributes == OF_FSDP1


def attributes_of_a_flat_parameter() -> set[str]:
    model = FullyShardedDataParallel(
        nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu")
    )
    flat = model._flat_param
    assert all(hasattr(param, "_fsdp_flattened") for param in model.parameters())
    return {name for name in OF_FSDP1 if hasattr(flat, name)}
