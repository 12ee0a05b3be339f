"""Islands of training runs, compressed gradients, logs of W&B and TensorBoard, other tasks."""

import json
import subprocess
import sys
import threading

import pytest

from tests.support.train_jobs import LLAMA, SECONDS, job, muon_dtensor, train, trained

pytestmark = [pytest.mark.train]


def test_two_islands_train_one_model(data, tmp_path):
    torchft = pytest.importorskip("torchft.coordination")
    lighthouse = torchft.LighthouseServer(
        bind="0.0.0.0:0", min_replicas=2, join_timeout_ms=60_000, heartbeat_timeout_ms=5000
    )
    runs = {}

    def island(index):
        values = job(
            data,
            tmp_path / f"island{index}",
            islands={"count": 2, "lighthouse": lighthouse.address(), "sync_every": 3},
            training={"max_steps": 9},
            evaluation={"every": 0},
        )
        runs[index] = train(values, "--islands.index", str(index))

    threads = [threading.Thread(target=island, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lighthouse.shutdown()
    for run in runs.values():
        assert run.status == 0, run.stdout[-1000:] + run.stderr[-2000:]
    losses = [run.losses() for run in runs.values()]
    assert losses[0][1] != losses[1][1]  # other rows
    assert losses[0][9] < losses[0][1]
    # after the round of step 9 both islands have the same model
    metrics = [run.metrics["eval_loss"] for run in runs.values()]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)


def test_compressed_gradients_train_as_whole_ones(data, tmp_path):
    runs = [
        trained(
            job(
                data,
                tmp_path / f"{wire}",
                parallelism={"dp_replicate": 2, "dp_shard": 2},
                islands={"compress_gradients": wire},
                training={"gradient_accumulation_steps": 2},
            )
        ).losses()
        for wire in (None, "float32", "int8")
    ]
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)
    assert runs[2] == pytest.approx(runs[0], abs=0.05)
    assert runs[2] != runs[1]


def test_wandb_and_tensorboard_get_metrics_and_the_model(data, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    values = job(
        data,
        tmp_path / "run",
        parallelism={"dp_shard": 2},
        optimizer={"metrics_every": 1},
        logging={"every": 1, "to": ["wandb", "tensorboard"], "artifacts": True},
        training={"max_steps": 3},
    )
    run = trained(values)
    (folder,) = (run.folder / "wandb").glob("offline-run-*")
    log = next(folder.glob("*.wandb")).read_bytes()
    assert b"model" in log
    assert b"train/loss" in log
    assert b"optimizer/" in log
    events = event_accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "eval/perplexity"} <= tags
    assert "train/optimizer/group0/update_rms" in tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}

TASKS = {
    "pretrain": {
        "task": "pretrain",
        "data": {"train": "text.txt", "format": "text"},
        "training": {"packing": True},
        "parallelism": {"dp_shard": 2},
    },
    "mlm": {
        "task": "mlm",
        "data": {"train": "text.txt", "format": "text"},
        "model": {"config": BERT},
        "training": {"max_length": None, "num_train_epochs": 3.0},
        "parallelism": {"dp_replicate": 2, "dp_shard": 1},
    },
    "conversations": {
        "data": {"train": "conversations.jsonl", "format": "sharegpt"},
        "training": {"assistant_only_loss": True},
        "parallelism": {"dp_shard": 1, "tp": 2},
    },
    "stream": {
        "data": {"streaming": True},
        "training": {"gradient_checkpointing": True},
        "parallelism": {"dp_shard": 2},
    },
    "experts": {
        "model": {"config": MOE},
        "parallelism": {"dp_shard": 2, "ep": 2},
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_resume_where_they_stopped(data, tmp_path, name):
    """Six steps, and three steps continued to six, end with the same metrics."""
    sections = {key: dict(v) if isinstance(v, dict) else v for key, v in TASKS[name].items()}
    sections["training"] = {"max_steps": 6, **sections.get("training", {})}
    if "train" in sections.get("data", {}):
        sections["data"]["train"] = str(data / sections["data"]["train"])
    values = job(data, tmp_path / "whole", **sections)
    if name == "mlm":
        del values["training"]["max_length"]
    whole = trained(values)
    losses = whole.losses()
    assert losses[6] < losses[1]
    values["output"] = str(tmp_path / "resumed")
    values["training"]["lr_scheduler_type"] = "constant"
    trained(values, "--training.max_steps", "3")
    resumed = trained(values)
    assert "resuming from" in resumed.stdout
    expected = dict(whole.metrics)
    assert resumed.metrics == expected


def test_adapters_of_the_exported_model(data, tmp_path):
    base = trained(job(data, tmp_path / "base", training={"max_steps": 2}))
    values = job(
        data,
        tmp_path / "lora",
        parallelism={"dp_shard": 2},
        training={"max_steps": 8},
        optimizer={"lr": 0.1},
        checkpoint={"every": 2},
    )
    values["model"] = {"path": str(base.folder / "model"), "lora": {"r": 4}}
    values["model"]["lora"]["target_modules"] = "all-linear"
    whole = trained(values)
    assert whole.metrics["eval_loss"] < base.metrics["eval_loss"] - 0.01
    other = {**values, "output": str(tmp_path / "resumed")}
    trained(other, "--training.max_steps", "2")
    resumed = trained(other)
    assert resumed.metrics == whole.metrics
    (step,) = (whole.folder / "checkpoints").glob("step-8")
    size = sum(path.stat().st_size for path in step.glob("*.distcp"))
    assert size < 300_000  # adapters and their state only
    out = tmp_path / "exported"
    path = whole.folder.with_suffix(".yaml")
    assert muon_dtensor("export", str(path), "--out", str(out), folder=out).status == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "models = [A.from_pretrained(path) for path in sys.argv[1:]]\n"
        "ids = torch.arange(12)[None]\n"
        "a, b, c = (model(ids).logits for model in models)\n"
        "print(torch.equal(a, b), torch.equal(a, c))"
    )
    folders = [str(out), str(whole.folder / "model"), str(base.folder / "model")]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders],
        capture_output=True,
        text=True,
        timeout=SECONDS * 4,
    )
    assert done.stdout.strip() == "True False", done.stderr[-2000:]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4
