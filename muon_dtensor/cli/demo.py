"""`muon-dtensor demo`: trains a small GPT with Muon and with AdamW on gloo processes.

Checks the flags and starts the ranks, which run `demo_worker`.
"""

import json
import os
import subprocess
import sys
import sysconfig
from math import prod
from pathlib import Path

DEFAULT_SIZES = {"dp_replicate": 1, "dp_shard": 2, "tp": 2}
BATCH, HEADS = 16, 4


def demo(
    steps: int = 120,
    ranks: int | None = None,
    dp_replicate: int | None = None,
    dp_shard: int | None = None,
    tp: int | None = None,
    out: Path = Path("demo-out"),
) -> int:
    """Train a small GPT with Muon, then with AdamW only, on gloo processes of this machine.

    Prints a table of the results. Writes demo.json and a plot of the losses.

    Args:
        steps: number of training steps of each run.
        ranks: number of processes to start; default: the product of the mesh sizes.
        dp_replicate: number of replicas (HSDP); default: 1.
        dp_shard: number of FSDP shards; default: 2, or with `ranks` the size that fills the mesh.
        tp: number of tensor-parallel ranks; default: 2.
        out: folder for demo.json and losses.png; created if it does not exist.
    """
    try:
        sizes = mesh_sizes(ranks, dp_replicate, dp_shard, tp)
        if steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {steps}")
        script = train_script()
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"muon-dtensor demo: {error}", file=sys.stderr)
        return 2
    settings = {"steps": steps, **sizes, "out": str(out.resolve()), "script": str(script)}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(prod(sizes.values()))),
        *("-m", "muon_dtensor.cli.demo_worker", json.dumps(settings)),
    ]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    return 0 if status == 0 else 1


def mesh_sizes(
    ranks: int | None, dp_replicate: int | None, dp_shard: int | None, tp: int | None
) -> dict[str, int]:
    """Return the mesh sizes; None is a flag without a value. Raises ValueError."""
    requested = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
    for name, size in (*requested.items(), ("ranks", ranks)):
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {size}")
    sizes = {
        name: DEFAULT_SIZES[name] if size is None else size for name, size in requested.items()
    }
    if ranks is not None and ranks != prod(sizes.values()):
        if tp is None and ranks % sizes["tp"]:
            sizes["tp"] = 1
        ranks_per_shard = sizes["dp_replicate"] * sizes["tp"]
        if dp_shard is not None or ranks % ranks_per_shard:
            text = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{ranks} ranks do not make a mesh {text}; omit some of these flags")
        sizes["dp_shard"] = ranks // ranks_per_shard
    if HEADS % sizes["tp"]:
        raise ValueError(f"--tp must divide the {HEADS} attention heads, got {sizes['tp']}")
    if BATCH % (sizes["dp_replicate"] * sizes["dp_shard"]):
        raise ValueError(
            f"--dp-replicate x --dp-shard must divide the batch of {BATCH}, "
            f"got {sizes['dp_replicate']} x {sizes['dp_shard']}"
        )
    return sizes


def train_script() -> Path:
    """Return the path of examples/train_gpt.py in this checkout or in the installed wheel.

    Raises ValueError if neither exists.
    """
    checkout = Path(__file__).parents[2] / "examples" / "train_gpt.py"
    installed = Path(sysconfig.get_path("data")) / "share/muon_dtensor/examples/train_gpt.py"
    for path in (checkout, installed):
        if path.exists():
            return path
    raise ValueError(f"examples/train_gpt.py is neither at {checkout} nor at {installed}")
