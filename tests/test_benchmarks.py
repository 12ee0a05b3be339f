"""The benchmarks run, and hold what does not depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


def figures(out: Path, *arguments: str) -> dict:
    run = subprocess.run(
        [sys.executable, *arguments, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(out.read_text())


def test_the_study_of_scale(tmp_path):
    arguments = ("--models", "gpt2", "--ranks", "8", "--jobs", "1")
    found = figures(tmp_path / "scale.json", "-m", "benchmarks.scale_study", *arguments)
    (row,) = found["rows"]
    assert row["matrices"] == 48
    assert 0 < row["orthogonalize_seconds"] < row["seconds"]
    assert row["strategies"] == "owned"


@pytest.mark.slow
def test_predictions_are_held_against_steps(tmp_path):
    arguments = ("--topology", "gloo-local", "--models", "8 of 97", "--rounds", "2")
    module = ("-m", "benchmarks.predicted_vs_measured")
    found = figures(tmp_path / "predicted.json", *TORCHRUN, *module, *arguments)
    assert found["bytes_exact"] == found["flops_exact"] == found["cells"] == 13
    assert found["largest_peak_error"] <= 0.05


@pytest.mark.slow
def test_steps_are_compared_on_every_layout(tmp_path):
    arguments = ("--layers", "1", "--dim", "32", "--rounds", "2", "--baselines", "naive", "adamw")
    module = ("-m", "benchmarks.bench_step")
    found = figures(tmp_path / "step.json", *TORCHRUN, *module, *arguments)
    for cell in found["cells"]:
        assert cell["is_exact"], cell["layout"]
        assert cell["sent_nbytes"] == cell["planned_nbytes"], cell["layout"]
        assert set(cell["ratios"]) == {"naive", "adamw"}, cell["refused"]
