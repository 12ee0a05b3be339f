"""`muon-dtensor validate`: exit status and output for correct and incorrect parallel setups."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import DistributedConfig, Muon, create_devicemesh_config, group_parameters
from muon_dtensor.cli.validate import TOLERANCES, compare, params_file
from tests.requirements.models import TinyTransformer, batch
from tests.support.commands import muon_dtensor
from tests.support.deadlines import run_program

pytestmark = pytest.mark.P1

ROOT = Path(__file__).parents[2]


def validate(out: Path, *flags: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Return the exit status and the output. `prefix`: of a program of its own; else a fork."""
    arguments = ("validate", "--num-steps", "3", "--ranks", "2", "--out", str(out), *flags)
    if not prefix:
        run = muon_dtensor(*arguments)
    else:
        env = {"COLUMNS": "120", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = run_program([*prefix, *arguments], 120, env=env)
    return run.returncode, run.stdout + run.stderr


def transformer() -> nn.Module:
    return TinyTransformer()


def tokens(model: nn.Module, step: int) -> torch.Tensor:
    return batch(step, 2, 6, 16)


def hsdp(model: nn.Module) -> tuple[nn.Module, DistributedConfig]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model, create_devicemesh_config(mesh)


def other_data(model: nn.Module) -> tuple[nn.Module, Any]:
    """A correct DDP setup that trains on other data than the baseline."""
    model.register_forward_pre_hook(lambda _, args: (args[0] + dist.get_rank() + 1,))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    return DistributedDataParallel(model), create_devicemesh_config(mesh)


USER_FUNCTIONS = (
    *("--model", "tests.cli.test_validate:transformer"),
    *("--batch", "tests.cli.test_validate:tokens"),
    *("--setup", "tests.cli.test_validate:hsdp"),
)


def odd_batch(model: nn.Module, step: int) -> torch.Tensor:
    return torch.ones(3, 48)


def no_pair(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> tuple[nn.Module, None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    fully_shard(model, mesh=mesh)
    return torch.compile(model, backend="eager"), None


def not_parallel(model: nn.Module) -> tuple[nn.Module, None]:
    return model, None


def not_averaged(model: nn.Module) -> tuple[nn.Module, DistributedConfig]:
    """Replicas whose ranks share the optimizer's work, but gradients are not averaged."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    return model, create_devicemesh_config(mesh)


class TokenModel(nn.Module):
    """Asserts integer token ids. AdamW steps the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.wqkv = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(24, 8, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        assert scale == 1.0, "values other than tensors are passed unchanged"
        assert tokens.dtype == targets.dtype == torch.int64
        return self.lm_head(self.out(self.wqkv(self.embed(tokens))))


def token_batch(model: nn.Module, step: int) -> dict[str, Any]:
    tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(step))
    return {"tokens": tokens, "targets": tokens.roll(-1, dims=1), "scale": 1.0}


def next_token_loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["targets"].flatten())


def tensor_parallel(model: nn.Module) -> tuple[nn.Module, None]:
    """Both ranks train on the same samples: the mesh dim is named tp."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plan = {"wqkv": ColwiseParallel(), "out": RowwiseParallel()}
    return parallelize_module(model, mesh, plan), None


def polar_express(model: nn.Module, config: DistributedConfig | None) -> Muon:
    groups = group_parameters(model, lr=0.02, rules=[("wqkv", {"split_sizes": (8, 8, 8)})])
    return Muon(
        groups,
        distributed_config=config,
        orthogonalizer="polar_express",
        ns_dtype=torch.float32,
    )


TOKENS = (
    *("--model", "tests.cli.test_validate:TokenModel"),
    *("--batch", "tests.cli.test_validate:token_batch"),
    *("--loss", "tests.cli.test_validate:next_token_loss"),
)


@pytest.mark.parametrize(
    ("flags", "num_params"),
    [
        pytest.param(USER_FUNCTIONS, 12, id="user-functions"),
        pytest.param((), 5, id="defaults", marks=pytest.mark.slow),
    ],
)
def test_the_three_modes_in_separate_commands(tmp_path, flags, num_params):
    program = (sys.executable, "-c", "from muon_dtensor.cli.main import main; main()")
    assert validate(tmp_path, "--mode", "baseline", *flags, prefix=program) == (
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
        pytest.param(("--setup", "fsdp", "--precision", "fp16"), id="fsdp-fp16"),
        pytest.param(USER_FUNCTIONS, id="user-functions"),
    ],
)
def test_correct_setups_pass(tmp_path, flags):
    status, text = validate(tmp_path, *flags)
    assert status == 0, text
    assert "FAIL" not in text


def test_a_setup_with_other_data_fails(tmp_path):
    status, text = validate(tmp_path, "--setup", "tests.cli.test_validate:other_data")
    assert status == 1
    assert "up.weight" in text
    assert "FAIL: 5 of 5 parameters differ by more than 1e-05." in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_setup_without_gradient_averaging_fails(tmp_path, precision):
    flags = ("--setup", "tests.cli.test_validate:not_averaged", "--precision", precision)
    status, text = validate(tmp_path, *flags)
    assert status == 1
    assert re.search(r"FAIL: [345] of 5 parameters", text), text


def test_a_setup_that_is_not_parallel_is_rejected(tmp_path):
    status, text = validate(tmp_path, "--setup", "tests.cli.test_validate:not_parallel")
    assert status == 2
    assert "the optimizer's plan has 'this rank alone' for every matrix" in text
    assert "PASS" not in text


def test_token_ids_with_a_user_s_loss_and_optimizer(tmp_path):
    flags = ("--optimizer", "tests.cli.test_validate:polar_express")
    status, text = validate(tmp_path, *TOKENS, *flags)
    assert status == 0, text
    assert "PASS: all 4 parameters match within 1e-05." in text


def test_parameters_of_a_compiled_model_are_matched_by_clean_names(tmp_path):
    status, text = validate(tmp_path, "--setup", "tests.cli.test_validate:compiled")
    assert status == 0, text
    assert "each batch is shared by 2 data ranks" in text


def test_a_config_file_and_ranks_with_the_same_data(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        "[optimizer]\nlr = 0.02\nns_dtype = 'float32'\n"
        "[[optimizer.rules]]\npattern = 'wqkv'\nsplit_sizes = [8, 8, 8]\n"
    )
    flags = ("--setup", "tests.cli.test_validate:tensor_parallel", "--optimizer", str(path))
    status, text = validate(tmp_path, *TOKENS, *flags)
    assert status == 0, text
    assert "PASS: all 4 parameters match within 1e-05." in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "tests.cli.test_validate:odd_batch"), "does not divide over 2 data ranks"),
        (("--setup", "tests.cli.test_validate:no_pair"), "must return (wrapped model, Distr"),
        (("--precision", "bf16", "--ranks", "3"), "needs a number of data ranks that is a power"),
        (("--model", "tests.cli.test_validate:missing"), "cannot import"),
        (("--model", "tests.cli.test_validate:transformer"), "has no input_dim"),
        (("--num-steps", "0"), "must be 1 or more"),
    ],
    ids=["odd-batch", "no-pair", "three-ranks", "no-function", "no-batch", "no-steps"],
)
def test_a_setup_that_cannot_run_is_reported(tmp_path, flags, message):
    status, text = validate(tmp_path, *flags)
    assert status == 2
    assert message in text


def test_tolerances_are_those_of_document_001():
    assert TOLERANCES == {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "mixed": 1e-4}


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_difference_below_the_tolerance_passes(precision, tmp_path, capsys):
    """Half of the tolerance passes, twice the tolerance fails."""
    tolerance = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "mixed": 1e-4}[precision]
    weight = torch.zeros(3, 2)
    torch.save({"w": weight}, params_file(tmp_path, "model", "baseline"))
    for factor, status in ((0.5, 0), (2.0, 1)):
        torch.save(
            {"w": weight + factor * tolerance}, params_file(tmp_path, "model", "distributed")
        )
        assert compare(tmp_path, "model", TOLERANCES[precision]) == status
        assert ("FAIL" in capsys.readouterr().out) == bool(status)
