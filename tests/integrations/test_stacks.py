"""The examples with Hugging Face, Accelerate, Lightning, TensorBoard and Weights & Biases."""

import re
import sys

import pytest

from tests.support.deadlines import run_program
from tests.support.torchrun import ENVIRONMENT, EXAMPLES, SECONDS

pytestmark = [pytest.mark.integrations]

ROWS = [
    pytest.param("hf_trainer", 1, "mesh this rank alone: 14 matrices"),
    pytest.param("hf_trainer", 2, "mesh (dp_replicate=2): 14 matrices"),
    pytest.param("accelerate_fsdp2", 4, "rows over dim0=4"),
    pytest.param("lightning_module", 1, "mesh this rank alone: 12 matrices"),
    pytest.param("lightning_module", 2, "mesh (dp_replicate=2): 12 matrices"),
]


def run(name: str, num_ranks: int, *arguments: str) -> str:
    """Return the output of an example. Warnings are allowed: these packages log some."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    if num_ranks > 1:
        ranks = ["--standalone", "--nproc-per-node", str(num_ranks)]
        command[1:1] = ["-m", "torch.distributed.run", *ranks]
    done = run_program(command, SECONDS, env={**ENVIRONMENT, "WANDB_SILENT": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("name", "num_ranks", "text"), ROWS)
def test_the_example_trains(name, num_ranks, text):
    output = run(name, num_ranks)
    assert text in output
    (losses,) = re.findall(r"^loss (\S+) -> (\S+)$", output, re.MULTILINE)
    assert float(losses[1]) < float(losses[0])
    if "resumed" in (EXAMPLES / f"{name}.py").read_text():
        assert "resumed from step 3: bitwise equal" in output


def test_tensorboard_and_wandb_get_the_metrics(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    small = ["--steps", "6", "--dim", "32", "--layers", "1", "--context", "16", "--log-every", "2"]
    folders = ["--tensorboard", str(tmp_path / "board"), "--wandb", str(tmp_path / "wandb")]
    run("train_gpt", 4, *small, *folders)
    events = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "grad_norm", "group0/update_rms", "group0/effective_lr", "sent_nbytes"} <= tags
    assert [event.step for event in events.Scalars("grad_norm")] == [1, 3, 5]
    assert list((tmp_path / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
