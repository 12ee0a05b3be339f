"""The benchmarks run; results that do not depend on the machine are checked."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.namespaces import launch, skip_reason
from tests.support.deadlines import run_program

pytestmark = pytest.mark.P1

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


def results_of(out: Path, *arguments: str) -> dict:
    run = run_program(
        [sys.executable, *arguments, "--json", str(out)],
        200,
        env={"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(out.read_text())


def test_scale_study(tmp_path):
    arguments = ("--models", "gpt2", "--ranks", "8", "--jobs", "1")
    results = results_of(tmp_path / "scale.json", "-m", "benchmarks.scale_study", *arguments)
    (row,) = results["rows"]
    assert row["matrices"] == 48
    assert 0 < row["orthogonalize_seconds"] < row["seconds"]
    assert row["strategies"] == "owned"


@pytest.mark.slow
def test_predicted_vs_measured(tmp_path):
    arguments = ("--topology", "gloo-local", "--models", "8 of 97", "--rounds", "2")
    module = ("-m", "benchmarks.predicted_vs_measured")
    results = results_of(tmp_path / "predicted.json", *TORCHRUN, *module, *arguments)
    assert results["bytes_exact"] == results["flops_exact"] == results["cells"] == 5
    assert results["largest_peak_error"] <= 0.05


@pytest.mark.slow
def test_bench_step_on_every_layout(tmp_path):
    arguments = (
        "--layers",
        "1",
        "--dim",
        "32",
        "--rounds",
        "2",
        "--baselines",
        "naive",
        "needed",
        "adamw",
    )
    module = ("-m", "benchmarks.bench_step")
    results = results_of(tmp_path / "step.json", *TORCHRUN, *module, *arguments)
    for cell in results["cells"]:
        is_batched = cell["layout"] == "experts_batched"  # which may round differently
        assert cell["is_exact"] or is_batched, cell["layout"]
        assert cell["sent_nbytes"] == cell["planned_nbytes"], cell["layout"]
        assert set(cell["ratios"]) == {"naive", "needed", "adamw"}, cell["refused"]


@pytest.mark.slow
def test_bench_scaling(tmp_path):
    arguments = ("--ranks", "1", "2", "--layers", "2", "--dim", "32", "--rounds", "2")
    results = results_of(tmp_path / "scaling.json", "-m", "benchmarks.bench_scaling", *arguments)
    assert results["ranks"]["1"]["fixed"]["sent_mb"] == 0
    assert results["ranks"]["2"]["fixed"]["sent_mb"] > 0
    assert results["ranks"]["2"]["growing"]["layers"] == 1


@pytest.mark.slow
def test_bench_iteration(tmp_path):
    arguments = ("--device", "cpu", "--batch", "2", "--rounds", "2")
    module = ("-m", "benchmarks.bench_iteration")
    results = results_of(tmp_path / "iteration.json", *module, *arguments)
    assert all(rate > 0 for row in results["rows"] for rate in row["tflops"].values())


@pytest.mark.slow
@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
def test_bench_overlap_between_two_nodes(tmp_path):
    arguments = ("--layers", "2", "--dim", "64", "--rounds", "3", "--bucket-mb", "0.1")
    results = results_of(tmp_path / "overlap.json", "-m", "benchmarks.bench_overlap", *arguments)
    fsdp, hsdp, _ = results["ways"].values()
    assert fsdp["prefetch 1"]["link_mb"] > 0, "half of all bytes cross the link"
    assert hsdp["no replica sharing"]["link_mb"] < 0.1 * hsdp["prefetch 1"]["link_mb"]


@pytest.mark.P1
@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
def test_bench_wan_sends_what_the_plan_says(tmp_path):
    arguments = ("--rate", "100mbit", "--steps", "10", "--seconds", "1", "--sync-every", "5")
    module = ("-m", "benchmarks.bench_wan", *arguments, "--only", "DiLoCo float32")
    row, delayed = results_of(tmp_path / "wan.json", *module)["rows"]
    assert row["planned"] <= row["megabytes"] <= 1.07 * row["planned"]
    assert delayed["loss_tokens"] > 0


def test_benchmarks_of_links_are_skipped_without_root(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert launch("benchmarks.bench_wan", "1gbit", 2, 1, 1.0) == 0
    assert "skipped: making network namespaces needs root" in capsys.readouterr().out


@pytest.mark.P1
def test_bench_host(tmp_path):
    arguments = ("--numbers", "10", "20", "--rounds", "2")
    results = results_of(tmp_path / "host.json", "-m", "benchmarks.bench_host", *arguments)
    assert [row["num_params"] for row in results["rows"]] == [10, 10, 20, 20]
    assert all(row["median_us"] > 0 for row in results["rows"])
