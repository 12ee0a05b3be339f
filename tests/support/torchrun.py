"""Scripts under torchrun, as their users run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 120

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # else restarted ranks of gloo find the addresses of those before them (torch 2.13)
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def torchrun(script: Path, num_ranks: int, *arguments: str, max_restarts: int = 0) -> str:
    """What a script prints, on all ranks. It must end well, and without a warning."""
    # --standalone: 127.0.0.1 and a free port, torchrun's own choice
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert max_restarts or "Warning" not in done.stderr, done.stderr
    return done.stdout


def run_example(name: str, num_ranks: int, *arguments: str) -> str:
    """What the example prints, on all ranks. Its loss must fall."""
    output = torchrun(EXAMPLES / f"{name}.py", num_ranks, *arguments)
    losses = re.findall(r"^loss (\S+) -> (\S+)$", output, re.MULTILINE)
    assert losses, output
    assert all(float(last) < float(first) for first, last in losses)
    return output
