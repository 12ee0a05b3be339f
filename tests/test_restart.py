"""A rank dies, torchrun starts all anew, and training ends where it would have ended."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchrun import EXAMPLES, torchrun

SCRIPT = Path(__file__).parent / "support" / "killed_training.py"
CONFIG = {"steps": 60, "dim": 32, "layers": 2, "context": 16, "batch": 8, "warmup": 5}


def trained(folder: Path, *, kill_at: int = 0, max_restarts: int = 0) -> tuple[dict[str, Any], str]:
    """The report of a training, and what it printed."""
    folder.mkdir(exist_ok=True)
    told = {
        "script": str(EXAMPLES / "train_gpt.py"),
        "folder": str(folder),
        "config": CONFIG,
        "kill_at": kill_at,
    }
    output = torchrun(SCRIPT, 4, json.dumps(told), max_restarts=max_restarts)
    return json.loads((folder / "report.json").read_text()), output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Any]:
    return trained(tmp_path_factory.mktemp("whole"))[0]


def test_a_killed_run_ends_bitwise_where_the_uninterrupted_one_ends(uninterrupted, tmp_path):
    """SIGKILL to one of four ranks at step 37 of 60, under torchrun with restarts."""
    report, output = trained(tmp_path, kill_at=37, max_restarts=2)
    assert (tmp_path / "killed").exists()
    assert "going on from step-30" in output
    assert report == uninterrupted
    assert len(report["losses"]) == 60


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(uninterrupted, tmp_path):
    trained(tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-50", "step-60"]
    for path in folder.glob("step-60/*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report, output = trained(tmp_path)
    assert "step-60 cannot be read" in output
    assert "going on from step-50" in output
    assert report == uninterrupted


def test_a_checkpoint_that_was_not_finished_is_left_alone(uninterrupted, tmp_path):
    trained(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.move(folder / "step-60", folder / "step-60.part")
    report, output = trained(tmp_path)
    assert "going on from step-50" in output
    assert report == uninterrupted
