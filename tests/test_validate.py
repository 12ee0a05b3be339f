"""`muon-dtensor validate`: a right setup passes, a wrong one fails, by exit status and by name."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import DistributedConfig, create_devicemesh_config
from muon_dtensor.cli.validate import TOLERANCES
from tests.requirements.models import TinyTransformer, batch

ROOT = Path(__file__).parents[1]


def validate(out: Path, *flags: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    code = "from muon_dtensor.cli.main import main; main()"
    command = prefix or (sys.executable, "-c", code)
    run = subprocess.run(
        [*command, "validate", "--num-steps", "3", "--ranks", "2", "--out", str(out), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return run.returncode, run.stdout + run.stderr


def transformer() -> nn.Module:
    return TinyTransformer()


def tokens(model: nn.Module, step: int) -> torch.Tensor:
    return batch(step, 2, 6, 16)


def hsdp(model: nn.Module) -> tuple[nn.Module, DistributedConfig]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model, create_devicemesh_config(mesh)


def forgets_to_synchronize(model: nn.Module) -> tuple[nn.Module, Any]:
    """Replicas that see other data than the baseline, and never average their gradients."""
    model.register_forward_pre_hook(lambda _, args: (args[0] + dist.get_rank() + 1,))
    return model, None


THE_USER_S_OWN = (
    *("--model", "tests.test_validate:transformer"),
    *("--batch", "tests.test_validate:tokens"),
    *("--setup", "tests.test_validate:hsdp", "--iteration-dtype", "bfloat16"),
)


@pytest.mark.parametrize(
    ("flags", "num_params"),
    [
        pytest.param(THE_USER_S_OWN, 12, id="the-user-s-own"),
        pytest.param((), 5, id="defaults", marks=pytest.mark.slow),
    ],
)
def test_the_three_modes_one_after_the_other(tmp_path, flags, num_params):
    assert validate(tmp_path, "--mode", "baseline", *flags) == (
        0,
        f"baseline: parameters saved to {tmp_path}/model_baseline_params.pt\n",
    )
    status, text = validate(tmp_path, "--mode", "compare", *flags)
    assert status == 2
    assert "run --mode distributed first" in text
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    prefix = (*torchrun, "--nproc-per-node", "2", "-m", "muon_dtensor.cli.main")
    status, text = validate(tmp_path, "--mode", "distributed", *flags, prefix=prefix)
    assert status == 0, text
    status, text = validate(tmp_path, "--mode", "compare", *flags)
    assert status == 0
    assert text.count("PASS") == num_params + 1
    assert f"PASS: all {num_params} parameters match within 1e-05." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--setup", "fsdp1", "--precision", "mixed"), id="fsdp1-mixed"),
        pytest.param(("--setup", "ddp", "--precision", "bf16"), id="ddp-bf16"),
        pytest.param(THE_USER_S_OWN, id="the-user-s-own"),
    ],
)
def test_right_setups_pass(tmp_path, flags):
    status, text = validate(tmp_path, *flags)
    assert status == 0, text
    assert "FAIL" not in text


def test_a_wrong_setup_fails(tmp_path):
    status, text = validate(tmp_path, "--setup", "tests.test_validate:forgets_to_synchronize")
    assert status == 1
    assert "up.weight" in text
    assert "FAIL: 5 of 5 parameters differ by more than 1e-05." in text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model", "tests.test_validate:nothing"), "names no function"),
        (("--model", "tests.test_validate:transformer"), "has no input_dim"),
        (("--num-steps", "0"), "must be 1 or more"),
    ],
    ids=["no-function", "no-batch", "no-steps"],
)
def test_what_cannot_run_is_told(tmp_path, flags, told):
    status, text = validate(tmp_path, *flags)
    assert status == 2
    assert told in text


def test_tolerances_are_the_document_s():
    assert TOLERANCES == {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "mixed": 1e-4}
