"""`muon-dtensor demo`: real training on this machine, several gloo processes, Muon and AdamW.

Checks the flags and starts the ranks; `demo_worker` is what they run.
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
    """Train a small GPT with Muon, then with AdamW alone, on gloo processes of this machine.

    Ends with a table, and writes demo.json and a plot of the losses.

    Args:
        steps: training steps of each run.
        ranks: processes to start; by default the product of the mesh sizes.
        dp_replicate: replicas (HSDP), 1 by default.
        dp_shard: FSDP shards; by default 2, or what ranks leave.
        tp: tensor-parallel ranks, 2 by default.
        out: folder for demo.json and losses.png; made if it does not exist.
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
    told = {"steps": steps, **sizes, "out": str(out.resolve()), "script": str(script)}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(prod(sizes.values()))),
        *("-m", "muon_dtensor.cli.demo_worker", json.dumps(told)),
    ]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    return 0 if status == 0 else 1


def mesh_sizes(
    ranks: int | None, dp_replicate: int | None, dp_shard: int | None, tp: int | None
) -> dict[str, int]:
    """Sizes of the mesh from what was said and what was not. Raises ValueError."""
    said = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
    for name, size in (*said.items(), ("ranks", ranks)):
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {size}")
    sizes = {name: DEFAULT_SIZES[name] if size is None else size for name, size in said.items()}
    if ranks is not None and ranks != prod(sizes.values()):
        if tp is None and ranks % sizes["tp"]:
            sizes["tp"] = 1
        others = sizes["dp_replicate"] * sizes["tp"]
        if dp_shard is not None or ranks % others:
            text = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{ranks} ranks do not make a mesh {text}; leave some of them out")
        sizes["dp_shard"] = ranks // others
    if HEADS % sizes["tp"]:
        raise ValueError(f"--tp must divide the {HEADS} attention heads, got {sizes['tp']}")
    if BATCH % (sizes["dp_replicate"] * sizes["dp_shard"]):
        raise ValueError(
            f"--dp-replicate x --dp-shard must divide the batch of {BATCH}, "
            f"got {sizes['dp_replicate']} x {sizes['dp_shard']}"
        )
    return sizes


def train_script() -> Path:
    """examples/train_gpt.py of this checkout, or of the installed wheel."""
    checkout = Path(__file__).parents[2] / "examples" / "train_gpt.py"
    installed = Path(sysconfig.get_path("data")) / "share/muon_dtensor/examples/train_gpt.py"
    for path in (checkout, installed):
        if path.exists():
            return path
    raise ValueError(f"examples/train_gpt.py is neither at {checkout} nor at {installed}")
