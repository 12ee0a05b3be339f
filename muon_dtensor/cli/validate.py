"""`muon-dtensor validate`: compares parallel training with training on one process.

Trains a model on one process, trains it in parallel, compares the parameters. Each of the three
modes can run on a different machine; they share only files in a folder.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

Mode = Literal["baseline", "distributed", "compare", "all"]
Precision = Literal["fp32", "bf16", "fp16", "mixed"]

TOLERANCES: dict[str, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "mixed": 1e-4}
"""Relative and absolute tolerances; requirement document 001, "Expected Tolerances"."""


def validate(
    mode: Mode = "all",
    model: str = "muon_dtensor.cli.validate_worker:tiny_model",
    setup: str = "fsdp",
    batch: str = "muon_dtensor.cli.validate_worker:random_batch",
    model_name: str = "model",
    num_steps: int = 100,
    lr: float = 0.02,
    precision: Precision = "fp32",
    iteration_dtype: Literal["float32", "bfloat16"] = "float32",
    loss: str = "muon_dtensor.cli.validate_worker:mean_square",
    optimizer: str | None = None,
    ranks: int = 4,
    out: Path = Path("validate-out"),
) -> int:
    """Check a parallel setup: train on one process and in parallel, and compare the parameters.

    Exit status 0 if all parameters match, 1 if any differs, 2 if it cannot run. Under torchrun
    `--mode distributed` uses the ranks that torchrun started. Without torchrun it starts `--ranks`
    gloo processes on this machine.

    Args:
        mode: baseline (one process), distributed, compare, or all (these three in order).
        model: `pkg.mod:fn` that returns the model; called without arguments under seed 42.
        setup: fsdp (fully_shard), fsdp1, ddp, or `pkg.mod:fn` that takes the model and returns
            (wrapped model, DistributedConfig or None). A third value may be the DeviceMesh of the
            data ranks, that is of the ranks that see different samples. Default: all ranks, except
            along mesh dims named tp, cp, ep, pp, tensor, model, context, expert or pipe.
        batch: `pkg.mod:fn` that takes (model, step) and returns the full batch, the same on every
            rank: a tensor, or a tuple or dict of tensors, samples along dim 0. In parallel each
            data rank trains on its share, so that gradients without an average are detected. In
            bf16, fp16 and mixed precision each data rank trains on the full batch with a loss
            weight of 0 or 2, and the number of data ranks must be a power of two.
        model_name: prefix of the file names.
        num_steps: number of optimizer steps.
        lr: learning rate of all parameters; not used with `optimizer`.
        precision: dtype of the model, which also sets the tolerance; mixed is float32 under bf16
            autocast.
        iteration_dtype: dtype of Newton-Schulz. Training uses bfloat16, but its rounding may
            amplify a last-bit difference of a gradient (summed over ranks) beyond the tolerance.
        loss: `pkg.mod:fn` that takes (output, batch) and returns a scalar, the mean over samples;
            default: the mean square of the output.
        optimizer: `pkg.mod:fn` that takes (model, DistributedConfig or None) and returns the
            optimizer; or a TOML or YAML file of MuonConfig, with rules and options.
        ranks: number of processes to start.
        out: folder for the parameter files.
    """
    if num_steps < 1 or ranks < 1:
        print("muon-dtensor validate: --num-steps and --ranks must be 1 or more", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    arguments = [model, setup, batch, model_name, str(num_steps), str(lr), precision]
    arguments += [iteration_dtype, loss, optimizer or ""]
    worker = ("-m", "muon_dtensor.cli.validate_worker")
    runs: dict[str, list[str]] = {"baseline": [sys.executable, *worker, "baseline"]}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        runs["distributed"] = [sys.executable, *worker, "distributed"]
    else:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        runs["distributed"] = [sys.executable, *torchrun, *worker, "distributed"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    paths = [str(Path.cwd()), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name, command in runs.items():
        if mode in (name, "all"):
            status = subprocess.run([*command, *arguments, str(out)], env=environment).returncode
            if status != 0:
                return 2
    return compare(out, model_name, TOLERANCES[precision]) if mode in ("compare", "all") else 0


def params_file(out: Path, model_name: str, mode: str) -> Path:
    """Return the path of the parameters that a mode saves."""
    return out / f"{model_name}_{mode}_params.pt"


def compare(out: Path, model_name: str, tolerance: float) -> int:
    """Print PASS or FAIL for each parameter and return the exit status."""
    import torch

    params_by_mode = {}
    for mode in ("baseline", "distributed"):
        path = params_file(out, model_name, mode)
        if not path.exists():
            print(f"muon-dtensor validate: no {path}; run --mode {mode} first", file=sys.stderr)
            return 2
        params_by_mode[mode] = torch.load(path, weights_only=True)
    baseline, distributed = params_by_mode["baseline"], params_by_mode["distributed"]
    table = Table("parameter", "shape", "largest difference", "result")
    num_failed = 0
    for name in {**baseline, **distributed}:
        if name not in baseline or name not in distributed:
            missing_mode = "baseline" if name not in baseline else "distributed"
            shape, difference, passes = "", f"missing in {missing_mode}", False
        else:
            value, expected = distributed[name], baseline[name]
            shape = str(list(expected.shape))
            if value.shape != expected.shape or value.dtype != expected.dtype:
                difference, passes = f"{list(value.shape)} {value.dtype}", False
            else:
                largest = (value.double() - expected.double()).abs().max() if value.numel() else 0.0
                difference = "none" if largest == 0 else f"{float(largest):.2e}"
                passes = torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
        num_failed += not passes
        table.add_row(name, shape, difference, "PASS" if passes else "FAIL")
    Console().print(table, markup=False)
    if num_failed:
        print(
            f"FAIL: {num_failed} of {table.row_count} parameters differ by more than {tolerance:g}."
        )
        return 1
    print(f"PASS: all {table.row_count} parameters match within {tolerance:g}.")
    return 0
