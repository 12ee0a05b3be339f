"""Faults of training runs: a clear message, the right exit status, and nothing lost."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.deadlines import run_program
from tests.support.train_jobs import (
    ENVIRONMENT,
    SECONDS,
    interrupted,
    job,
    muon_dtensor,
    train,
    trained,
    write_job,
)

pytestmark = [pytest.mark.train]


def last_line(run):
    return run.stderr.strip().splitlines()[-1]


def write_questions(data, path, *bad):
    lines = (data / "questions.jsonl").read_text().splitlines()[:60]
    for number, line in bad:
        lines.insert(number - 1, line)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


BAD = [
    (5, '{"instruction": "no output"}'),
    (9, "{not json"),
    (12, '{"instruction": 3, "output": "x"}'),
    (20, '{"instruction": "empty", "output": "  "}'),
]


def test_bad_rows_are_named_by_file_and_line(data, tmp_path):
    path = write_questions(data, tmp_path / "rows.jsonl", *BAD)
    values = job(
        data, tmp_path / "run", data={"train": path, "test": 0.05}, parallelism={"dp_shard": 2}
    )
    run = train(values)
    assert run.status == 1
    message = last_line(run)
    for text in ("rows.jsonl:5: 'output' is missing", ":9: not JSON", ":12: 'instruction' is int"):
        assert text in message
    assert "on_bad_row: skip" in message
    assert not (run.folder / "checkpoints").exists()


def test_bad_rows_can_be_left_out(data, tmp_path):
    path = write_questions(data, tmp_path / "rows.jsonl", *BAD)
    rows = {"train": path, "test": 0.05, "on_bad_row": "skip"}
    values = job(data, tmp_path / "run", data=rows, training={"max_steps": 2})
    run = trained(values)
    assert "bad rows skipped" in run.stderr
    assert run.metrics["step"] == 2


def test_a_bad_row_of_a_stream_ends_the_run_when_it_is_reached(data, tmp_path):
    path = write_questions(data, tmp_path / "rows.jsonl", (50, "{not json"))
    rows = {"train": path, "streaming": True, "shuffle_buffer": 0, "test": None}
    values = job(
        data, tmp_path / "run", data=rows, checkpoint={"every": 1}, training={"max_steps": 30}
    )
    run = train(values)
    assert run.status == 1
    assert "rows.jsonl:50: not JSON" in last_line(run)
    assert list((run.folder / "checkpoints").glob("step-*"))


def test_a_full_disk_loses_nothing(data, tmp_path):
    values = job(data, tmp_path / "disk" / "run", parallelism={"dp_shard": 2})
    (tmp_path / "disk").mkdir()
    path = write_job(values, tmp_path / "job.yaml")
    script = (
        f"mount -t tmpfs -o size=4m tmpfs {tmp_path}/disk || exit 77\n"
        f"{sys.executable} -m muon_dtensor.cli.main train {path}\n"
        f"echo status $?; ls {tmp_path}/disk/run/checkpoints\n"
        f"mount -o remount,size=64m {tmp_path}/disk\n"
        f"{sys.executable} -m muon_dtensor.cli.main train {path}\n"
        "echo status $?\n"
    )
    done = run_program(["unshare", "-rm", "sh", "-c", script], 2 * SECONDS, env=ENVIRONMENT)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine does not allow mounts")
    first, listing, second = done.stdout.partition("status 1\n")
    assert listing, done.stdout + done.stderr
    assert "step 9/9" in first
    assert second.startswith("step-3\n")
    assert "could not be written" in done.stderr
    assert re.search(r"No space left|its disk has [0-3]\.\d MB free", done.stderr)
    assert "resuming from" in second
    assert second.endswith("status 0\n")


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    values = job(data, tmp_path / "run", parallelism={"dp_shard": 2})
    whole = trained({**values, "output": str(tmp_path / "whole")})
    stopped = interrupted(values, "step 7/9", signal.SIGKILL)
    newest, before = sorted((stopped.folder / "checkpoints").glob("step-[0-9]"), reverse=True)
    file = next(newest.glob("*.distcp"))
    data_bytes = bytearray(file.read_bytes())
    data_bytes[len(data_bytes) // 2] ^= 1
    file.write_bytes(data_bytes)
    resumed = trained(values)
    assert f"warning: {newest.name} cannot be read" in resumed.stdout
    assert f"resuming from {before}" in resumed.stdout
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_gradients_that_are_not_finite(data, tmp_path, policy):
    """An infinite learning rate of the embeddings makes the second batch NaN."""
    values = job(
        data,
        tmp_path / "run",
        parallelism={"dp_shard": 2},
        optimizer={"adamw": {"lr": 1e30}, "nonfinite": policy},
        checkpoint={"every": 1, "keep": 9},
        training={"max_steps": 4},
        evaluation={"every": 0},
    )
    run = train(values)
    if policy == "raise":
        assert run.status == 1
        assert "A gradient holds NaN or Inf" in last_line(run)
        assert (run.folder / "checkpoints" / "step-1").is_dir()
    else:
        assert run.status == 0
        assert run.metrics["step"] == 4


STARTS = [
    pytest.param(
        {"parallelism": {"dp_shard": 3, "tp": 2}}, ["--nproc", "4"], "does not fit 4 ranks"
    ),
    pytest.param({"training": {"max_step": 3}}, [], "Did you mean 'max_steps'?"),
    pytest.param({"training": {"max_steps": "three"}}, [], "expected a value as -1, got 'three'"),
    pytest.param({"data": {"train": "missing.jsonl"}}, [], "missing.jsonl"),
    pytest.param({"data": {"train": "rows.csv"}}, [], "data files are .jsonl"),
    pytest.param({"model": {"config": {"model_type": "lama"}}}, [], "model.config"),
    pytest.param({"model": {"path": "/nowhere", "config": {}}}, [], "/nowhere"),
    pytest.param(
        {"model": {"config": {"model_type": "llama", "hiden_size": 3}}},
        [],
        "Did you mean 'hidden_size'?",
    ),
]


@pytest.mark.parametrize(("sections", "arguments", "message"), STARTS)
def test_what_cannot_start_says_why(data, tmp_path, sections, arguments, message):
    run = train(job(data, tmp_path / "run", **sections), *arguments)
    assert run.status == 2
    assert message in last_line(run)


def test_a_tokenizer_without_a_template_needs_one(data, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(data / "tokenizer", tokenizer)
    (tokenizer / "chat_template.jinja").unlink()
    values = job(data, tmp_path / "run", model={"tokenizer": str(tokenizer)})
    run = train(values, "--training.max_steps", "2")
    assert run.status == 2
    assert "has no chat template: set training.chat_template_path" in last_line(run)
    template = data / "tokenizer" / "chat_template.jinja"
    values["training"] |= {"chat_template_path": str(template), "max_steps": 2}
    assert trained(values).metrics["step"] == 2


def test_an_error_in_training_has_its_traceback(data, tmp_path, monkeypatch, capsys):
    """A ValueError there is not one of the config: status 1, and the place where it was raised."""
    from muon_dtensor.train import trainer, worker

    def training_step(*args):
        raise ValueError("raised in a step")

    monkeypatch.setattr(trainer.MuonSFTTrainer, "training_step", training_step)
    values = job(data, tmp_path / "run", checkpoint={"asynchronous": False})
    path = write_job(values, tmp_path / "job.yaml")
    settings = {"path": str(path), "overrides": {}, "resume": "auto", "mode": "train"}
    previous = signal.getsignal(signal.SIGTERM)
    try:
        status = worker.main({**settings, "status_folder": str(tmp_path)})
    finally:
        signal.signal(signal.SIGTERM, previous)
    message = "after step 0: ValueError: raised in a step"
    assert status == 1
    assert json.loads((tmp_path / "rank-00000000").read_text()) == [1, message]
    assert "in training_step" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    values = job(data, tmp_path / "run", training={"max_steps": 2})
    first = trained(values)
    second = trained(values)
    assert "step-2 is the last step of this run" in second.stdout
    assert second.metrics == first.metrics
    longer = trained(values, "--training.max_steps", "3")
    assert longer.metrics["step"] == 3
    fresh = trained(values, "--resume", "never")
    assert "resuming" not in fresh.stdout


def test_dry_run_trains_nothing(data, tmp_path):
    values = job(data, tmp_path / "run", parallelism={"dp_shard": 2, "tp": 2})
    run = train(values, "--dry-run")
    assert run.status == 0, run.stderr
    for text in ("dp_shard=2 x tp=2", "muon, lr 0.02: 14 parameters", "mesh (fsdp=2, tp=2)"):
        assert text in run.stdout
    assert "memory of rank 0" in run.stdout
    assert not run.folder.exists()
    path = write_job({**values, "output": "/proc/run"}, tmp_path / "job.yaml")
    blocked = muon_dtensor("train", str(path), "--dry-run", folder=tmp_path)
    assert (blocked.status, "cannot be written" in blocked.stderr) == (2, True)


def test_torchrun_starts_the_command(data, tmp_path):
    """An outer torchrun: its ranks join, and its exit status is the command's."""
    values = job(data, tmp_path / "run", parallelism={"dp_shard": 2}, training={"max_steps": 2})
    path = write_job(values, tmp_path / "job.yaml")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *ranks, "-m", "muon_dtensor.cli.main", "train", str(path)]
    done = run_program(command, SECONDS, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 2


def test_make_sample_data_names_the_next_command(tmp_path):
    command = [sys.executable, "-m", "muon_dtensor.cli.main", "make-sample-data", "--out"]
    done = subprocess.run([*command, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"muon-dtensor train {tmp_path / 's' / 'sft.yaml'}"
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"questions.jsonl", "text.txt", "tokenizer", "lora.yaml", "pretrain.yaml"} <= names
