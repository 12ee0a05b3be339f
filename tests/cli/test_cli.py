"""The `muon-dtensor` command in a subprocess: demo, version, bad flags."""

import json
import subprocess
import sys

import pytest
from matplotlib import image

from muon_dtensor.cli import demo
from muon_dtensor.cli.demo import mesh_sizes, train_script
from muon_dtensor.cli.demo_worker import load_script
from tests.support.commands import muon_dtensor
from tests.support.deadlines import run_program

pytestmark = pytest.mark.P1


def program(*flags: str) -> subprocess.CompletedProcess[str]:
    code = "from muon_dtensor.cli.main import main; main()"
    return run_program([sys.executable, "-c", code, *flags], 200, env={"COLUMNS": "120"})


def test_the_demo_trains_and_writes_results_and_plot(tmp_path):
    flags = ("--steps", "3", "--dp-replicate", "2", "--dp-shard", "1", "--tp", "2")
    run = muon_dtensor("demo", *flags, "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "demo.json").read_text())
    assert summary["steps"] == 3
    assert set(summary["val_loss"]) == {"muon", "adamw"}
    assert all(4 < loss < 6 for loss in summary["val_loss"].values())
    assert summary["losses"]["muon"][0] == summary["losses"]["adamw"][0]
    assert sum(summary["orthogonalizations_per_rank"]) == 24
    sent = summary["sent_nbytes_per_step"]
    assert sent["total"] == sent["lower_bound_total"] > 0
    pixels = image.imread(tmp_path / "losses.png")[..., :3]
    colored = pixels[(pixels.max(-1) - pixels.min(-1)) > 0.3]
    assert len({tuple(color) for color in colored.round(1).tolist()}) >= 2, "two colored curves"
    for words in ("bucket 0  owned", "after 3 steps", "validation loss", "all ranks gather"):
        assert words in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "--steps must be 1 or more, got 0"),
        (("--tp", "3"), "--tp must divide the 4 attention heads"),
        (("--dp-shard", "3"), "must divide the batch of 16"),
        (("--ranks", "3", "--dp-shard", "2"), "3 ranks do not make a mesh"),
        (("--ranks", "-1"), "--ranks must be 1 or more"),
        (("--out", "/dev/null/x"), "Not a directory"),
    ],
    ids=str,
)
def test_bad_flags_are_reported_on_one_line(flags, message):
    run = muon_dtensor("demo", *flags)
    assert run.returncode == 2
    assert message in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_version_and_unknown_commands():
    assert "torch" in program("version").stdout
    assert muon_dtensor("--version").stdout == muon_dtensor("version").stdout
    assert muon_dtensor("dance").returncode == 2


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ((None, None, None, None), (1, 2, 2)),
        ((8, None, None, None), (1, 4, 2)),
        ((1, None, None, None), (1, 1, 1)),
        ((None, 2, None, 1), (2, 2, 1)),
        ((4, 2, None, None), (2, 1, 2)),
        ((None, None, 1, 1), (1, 1, 1)),
    ],
)
def test_mesh_sizes(flags, sizes):
    assert tuple(mesh_sizes(*flags).values()) == sizes


def test_flag_checks_use_the_sizes_of_the_script():
    config = load_script(str(train_script())).Config()
    sizes = {name: getattr(config, name) for name in demo.DEFAULT_SIZES}
    assert (config.batch, config.heads, sizes) == (demo.BATCH, demo.HEADS, demo.DEFAULT_SIZES)
