"""A rank dies, torchrun restarts all ranks, and training ends with the same result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchrun import EXAMPLES, forked_torchrun, torchrun

pytestmark = pytest.mark.P1

SCRIPT = Path(__file__).parents[1] / "support" / "killed_training.py"
CONFIG = {"steps": 60, "dim": 16, "layers": 1, "context": 8, "batch": 4, "val_batches": 1}


def trained(folder: Path, *, kill_at: int = 0, max_restarts: int = 0) -> tuple[dict[str, Any], str]:
    """Return the report of a training run, and its output. Only a killed one is a real torchrun."""
    folder.mkdir(exist_ok=True)
    arguments = {
        "script": str(EXAMPLES / "train_gpt.py"),
        "folder": str(folder),
        "config": CONFIG,
        "kill_at": kill_at,
    }
    if kill_at:
        output = torchrun(SCRIPT, 4, json.dumps(arguments), max_restarts=max_restarts)
    else:
        output = forked_torchrun(SCRIPT, 4, json.dumps(arguments))
    return json.loads((folder / "report.json").read_text()), output


def test_a_killed_run_ends_bitwise_like_an_uninterrupted_one(tmp_path):
    """SIGKILL to one of four ranks at step 37 of 60, under torchrun with restarts.

    Then it resumes twice: with the newest checkpoint damaged, and with the newest unfinished.
    """
    expected, _ = trained(tmp_path / "uninterrupted")
    folder = tmp_path / "killed"
    report, output = trained(folder, kill_at=37, max_restarts=2)
    assert (folder / "killed").exists()
    assert "resuming from step-30" in output
    assert report == expected
    assert len(report["losses"]) == 60

    saved = folder / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["step-50", "step-60"]
    for path in saved.glob("step-60/*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report, output = trained(folder)
    assert "step-60 cannot be read" in output
    assert "resuming from step-50" in output
    assert report == expected

    shutil.move(saved / "step-60", saved / "step-60.part")
    report, output = trained(folder)
    assert "resuming from step-50" in output
    assert report == expected
