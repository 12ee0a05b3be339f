"""`muon-dtensor validate`: does this parallel setup train as one process does?

Trains a model on one process, trains it in parallel, compares the parameters. The three can run
apart, on different machines; files in a folder are all they share.
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
"""Relative and absolute; requirement document 001, "Expected Tolerances"."""


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
    """Check a parallel setup: the same training on one process and in parallel, compared.

    Exit status 0 if all parameters match, 1 if any does not, 2 if it cannot run. Under torchrun
    `--mode distributed` takes the ranks that torchrun started; else it starts `--ranks` gloo
    processes here.

    Args:
        mode: baseline (one process), distributed, compare, or all three one after the other.
        model: `pkg.mod:fn` that returns the model; called with no arguments, seed 42.
        setup: fsdp (fully_shard), fsdp1, ddp, or `pkg.mod:fn` that takes the model and returns
            (wrapped model, DistributedConfig or None), and as a third value, where not all ranks
            see other data, the DeviceMesh of those that do. Without it these are all ranks, but
            those along mesh dims called tp, cp, ep, pp, tensor, model, context, expert or pipe.
        batch: `pkg.mod:fn` that takes (model, step) and returns the whole batch, the same on every
            rank: a tensor, or a tuple or dict, samples along dim 0 of its tensors. In parallel
            each data rank trains on its share of it, so that gradients nobody averages show. In
            narrow precisions each trains on all of it, with a loss weight of 0 or 2, and the number
            of data ranks must be a power of two.
        model_name: begins the names of the files.
        num_steps: optimizer steps.
        lr: learning rate of all parameters, unless `optimizer` is given.
        precision: of the model, and with it the tolerance; mixed is float32 under bf16 autocast.
        iteration_dtype: of Newton-Schulz. bfloat16, as training uses it, may turn a difference in
            a gradient's last bit (its sum over ranks) into one over the tolerance.
        loss: `pkg.mod:fn` that takes (output, batch) and returns a scalar, the mean over samples;
            default: the mean square of the output.
        optimizer: `pkg.mod:fn` that takes (model, DistributedConfig or None) and returns the
            optimizer; or a TOML or YAML file of MuonConfig, with rules and options.
        ranks: processes to start.
        out: folder for the parameters.
    """
    if num_steps < 1 or ranks < 1:
        print("muon-dtensor validate: --num-steps and --ranks must be 1 or more", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    told = [model, setup, batch, model_name, str(num_steps), str(lr), precision, iteration_dtype]
    told += [loss, optimizer or ""]
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
            status = subprocess.run([*command, *told, str(out)], env=environment).returncode
            if status != 0:
                return 2
    return compare(out, model_name, TOLERANCES[precision]) if mode in ("compare", "all") else 0


def params_file(out: Path, model_name: str, mode: str) -> Path:
    """Where a mode leaves its parameters."""
    return out / f"{model_name}_{mode}_params.pt"


def compare(out: Path, model_name: str, tolerance: float) -> int:
    """Print a line for each parameter, PASS or FAIL; the exit status."""
    import torch

    found = {}
    for mode in ("baseline", "distributed"):
        path = params_file(out, model_name, mode)
        if not path.exists():
            print(f"muon-dtensor validate: no {path}; run --mode {mode} first", file=sys.stderr)
            return 2
        found[mode] = torch.load(path, weights_only=True)
    baseline, distributed = found["baseline"], found["distributed"]
    table = Table("parameter", "shape", "largest difference", "result")
    num_failed = 0
    for name in {**baseline, **distributed}:
        if name not in baseline or name not in distributed:
            where = "baseline" if name not in baseline else "distributed"
            shape, difference, passes = "", f"missing in {where}", False
        else:
            ours, theirs = distributed[name], baseline[name]
            shape = str(list(theirs.shape))
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                difference, passes = f"{list(ours.shape)} {ours.dtype}", False
            else:
                largest = (ours.double() - theirs.double()).abs().max() if ours.numel() else 0.0
                difference = "none" if largest == 0 else f"{float(largest):.2e}"
                passes = torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
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
