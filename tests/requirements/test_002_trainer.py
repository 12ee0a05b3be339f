"""Requirement document 002, by `muon-dtensor train` in real processes. Names are the document's.

`test_002_components.py` has those that need no trainer. MLX, gRPC and serving are not here; see
docs/train.md.
"""

import json
import math
import signal

import pytest

from tests.support.train_jobs import interrupted, job, muon_dtensor, train, trained, write_job

pytestmark = [pytest.mark.train]

EVALUATION = {
    "metrics": ["perplexity", "bleu", "rouge"],
    "max_new_tokens": 8,
    "samples": 6,
    "every": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from muon_dtensor.train.sample_data import make_sample_data

    return make_sample_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return a run on 4 devices with everything that is logged."""
    values = job(
        data,
        tmp_path_factory.mktemp("002") / "run",
        parallelism={"dp_shard": 2, "tp": 2},
        evaluation=EVALUATION,
        logging={"every": 1, "to": ["wandb", "tensorboard"], "artifacts": True},
        optimizer={"metrics_every": 1},
        training={"gradient_accumulation_steps": 2, "bf16": True, "activation_checkpointing": True},
    )
    del values["training"]["gradient_checkpointing"]
    return trained(values)


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """Return a run on one device with the same batches."""
    values = job(
        data,
        tmp_path_factory.mktemp("002s") / "run",
        evaluation=EVALUATION,
        training={"per_device_train_batch_size": 8},
    )
    return trained(values)


@pytest.fixture(scope="module")
def double(data, tmp_path_factory):
    """Return the run of `single` on two devices."""
    folder = tmp_path_factory.mktemp("002d") / "run"
    return trained(job(data, folder, parallelism={"dp_shard": 2}, evaluation=EVALUATION))


def history(run):
    newest = max((run.folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    notes = json.loads((newest / "manifest.json").read_text())["notes"]
    return notes["trainer"]["log_history"]


def test_trainer_initialization(run):
    assert "14 matrices on (fsdp=2, tp=2)" in run.stdout


def test_forward_backward_pass(run):
    losses = run.losses()
    assert len(losses) == 9
    assert losses[9] < losses[1]
    assert all(entry["grad_norm"] > 0 for entry in history(run) if "grad_norm" in entry)


def test_gradient_accumulation(data, tmp_path, double):
    """Two batches of half the size, accumulated, are one batch: losses to 1e-4."""
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values = job(data, tmp_path / "run", parallelism={"dp_shard": 2}, training=training)
    assert trained(values).losses() == pytest.approx(double.losses(), abs=1e-4)


def test_mixed_precision_training(run):
    """The run of four devices is in bf16: its losses are finite and decrease."""
    assert json.loads((run.folder / "config.json").read_text())["training"]["bf16"]
    assert all(math.isfinite(loss) for loss in run.losses().values())


def test_memory_efficiency(run):
    text = (run.folder / "report.html").read_text()
    assert "peak memory of rank 0" in text
    dry = muon_dtensor(
        "train", str(run.folder.with_suffix(".yaml")), "--dry-run", folder=run.folder
    )
    assert "memory of rank 0" in dry.stdout


def test_gradient_compression(data, tmp_path):
    values = job(
        data,
        tmp_path / "run",
        parallelism={"dp_replicate": 2, "dp_shard": 1},
        islands={"compress_gradients": "int8"},
    )
    losses = trained(values).losses()
    assert losses[9] < losses[1]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """Return a job of which one of two devices died in step 6, and that run."""
    folder = tmp_path_factory.mktemp("002k") / "run"
    values = job(data, folder, parallelism={"dp_shard": 2}, evaluation=EVALUATION)
    return values, interrupted(values, "step 5/9", signal.SIGKILL)


def test_sync_failure_handling(killed):
    """The device that is left does not wait for the dead one: the run ends."""
    _, run = killed
    assert run.status == 1
    assert not (run.folder / "metrics.json").exists()


def test_device_failure_during_training(killed, double):
    """The same command finishes the run with the metrics of one without a failure."""
    values, _ = killed
    assert trained(values).metrics == double.metrics


def test_data_sharding(tmp_path):
    """Rows of the ranks are disjoint, and together all rows."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader, SequentialSampler

    from muon_dtensor.train.data import load_data
    from muon_dtensor.train.job import DataSection

    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": f"question {i}", "output": "x"}) for i in range(101)]
    path.write_text("\n".join(lines))
    for streaming in (False, True):
        section = DataSection(train=str(path), streaming=streaming, shuffle_buffer=0)
        rows = load_data(section).train
        seen = []
        for rank in range(4):
            sampler = {} if streaming else {"sampler": SequentialSampler(rows)}
            loader = DataLoader(
                rows, batch_size=3, collate_fn=lambda batch: batch, drop_last=True, **sampler
            )
            prepared = prepare_data_loader(
                loader, num_processes=4, process_index=rank, put_on_device=False
            )
            part = [row["prompt"][0]["content"] for batch in prepared for row in batch]
            assert len(part) == len(set(part))
            seen.append(part)
        sizes = {len(part) for part in seen}
        assert len(sizes) == 1  # balanced
        together = [text for part in seen for text in part]
        count = sum(1 for _ in rows)
        assert len(set(together)) == len(together) >= count - 12


def test_data_loader_efficiency(data, tmp_path):
    """Worker processes load batches ahead, with the losses of no workers."""
    plain = job(data, tmp_path / "plain", training={"max_steps": 3})
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "max_steps": 3}
    ahead = job(data, tmp_path / "ahead", training=workers)
    assert trained(plain).losses() == trained(ahead).losses()


def test_dynamic_batching(data, tmp_path):
    """Packing fills batches with as many rows as fit."""
    training = {"packing": True, "max_steps": 3, "max_length": 64}
    section = {"train": str(data / "text.txt"), "format": "text"}
    values = job(data, tmp_path / "run", task="pretrain", data=section, training=training)
    assert trained(values).losses()[3] > 0
    values["training"]["auto_find_batch_size"] = True
    assert "ranks would disagree" in train(values).stderr


def test_activation_checkpointing(run):
    """The run of four devices recomputes activations."""
    assert json.loads((run.folder / "config.json").read_text())["training"][
        "activation_checkpointing"
    ]


def test_mlx_train_command(run):
    """Here it is `muon-dtensor train`."""
    assert run.status == 0
    assert (run.folder / "model" / "config.json").exists()


def test_cli_resume(data, tmp_path):
    values = job(data, tmp_path / "run", training={"max_steps": 4}, checkpoint={"every": 2})
    whole = trained(values)
    path = write_job(values, tmp_path / "run.yaml")
    step = whole.folder / "checkpoints" / "step-2"
    again = muon_dtensor("train", str(path), "--resume", str(step), folder=whole.folder)
    assert f"resuming from {step}" in again.stdout
    assert again.metrics == whole.metrics


def test_cli_distributed_launch(double):
    assert "14 matrices on (fsdp=2)" in double.stdout


def test_sft_initialization(run):
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["task"], config["data"]["format"]) == ("sft", "alpaca")


def tokenized(data, lines):
    """Return ids, labels and texts of answers, as the trainer sees questions."""
    from transformers import AutoModelForCausalLM

    from muon_dtensor.train.data import load_data
    from muon_dtensor.train.evaluation import Part
    from muon_dtensor.train.job import TrainConfig
    from muon_dtensor.train.models import load_tokenizer, model_config
    from muon_dtensor.train.trainer import Job, build_trainer

    values = job(data, data / "unused", data={"train": str(lines), "test": None})
    config = TrainConfig.from_dict(values)
    tokenizer = load_tokenizer(config)
    model = AutoModelForCausalLM.from_config(model_config(config, tokenizer))
    split = load_data(config.data)
    trainer = build_trainer(Job(config, model, tokenizer, split, Part()))
    return trainer, tokenizer


@pytest.fixture(scope="module")
def few(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    rows = [
        {"instruction": "What is the capital of France?", "input": "", "output": "It is Paris."},
        {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_instruction_following_loss(data, few):
    """Only the answer and its end have labels."""
    trainer, tokenizer = tokenized(data, few)
    for row, answer in zip(trainer.train_dataset, ("It is Paris.", "3"), strict=True):
        labels = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(labels).startswith(f"{answer}<|im_end|>")


def test_sft_data_preprocessing(data, few):
    """The chat template is applied; context follows the instruction."""
    trainer, tokenizer = tokenized(data, few)
    text = tokenizer.decode(trainer.train_dataset[1]["input_ids"])
    assert text.startswith("<|im_start|>user\nAdd the numbers.\n\n1 and 2<|im_end|>\n")
    assert "<|im_start|>assistant\n3<|im_end|>" in text


def test_sft_evaluation(run):
    answers = [json.loads(line) for line in (run.folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(6))
    assert all(answer["reference"] for answer in answers)


def test_alpaca_format_loading(few):
    from muon_dtensor.train.data import load_data
    from muon_dtensor.train.job import DataSection

    rows = list(load_data(DataSection(train=str(few))).train)
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "It is Paris."}]


def test_sharegpt_format_loading(tmp_path):
    from muon_dtensor.train.data import load_data
    from muon_dtensor.train.job import DataSection

    path = tmp_path / "chat.json"
    turns = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi there!"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    (row,) = load_data(DataSection(train=str(path), format="sharegpt")).train
    assert row["messages"] == [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi there!"},
    ]


def test_dataset_tokenization(data, few):
    """Rows of a batch are padded to the longest; padding has no label and no attention."""
    trainer, tokenizer = tokenized(data, few)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    padding = batch["input_ids"] == tokenizer.pad_token_id
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["attention_mask"][padding] == 0).all()


def test_dataset_streaming(data, tmp_path, single):
    """A stream in the order of the file trains as the file does without shuffling."""
    section = {"streaming": True, "shuffle_buffer": 0}
    stream = job(data, tmp_path / "stream", data=section, parallelism={"dp_shard": 2})
    losses = trained(stream).losses()
    assert len(losses) == 9
    assert losses[9] < losses[1]


def test_perplexity_calculation(single):
    metrics = single.metrics
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_tokens"] > 100


def test_bleu_score(run):
    import sacrebleu

    answers = [json.loads(line) for line in (run.folder / "answers.jsonl").read_text().splitlines()]
    score = sacrebleu.corpus_bleu(
        [answer["answer"] for answer in answers], [[answer["reference"] for answer in answers]]
    )
    assert run.metrics["eval_bleu"] == score.score


def test_rouge_score():
    from muon_dtensor.train.evaluation import Answer, text_scores

    same = [Answer(0, "q", "the cat sat down", "the cat sat down")]
    half = [Answer(0, "q", "the dog", "the cat")]
    assert text_scores(same, ["bleu", "rouge"])["rougeL"] == 1.0
    assert text_scores(same, ["bleu"])["bleu"] == pytest.approx(100)
    assert text_scores(half, ["rouge"]) == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5}


def test_distributed_metric_aggregation(single, double):
    """Of models that differ by rounding, on one and two devices."""
    for name in ("eval_loss", "eval_tokens"):
        assert double.metrics[name] == pytest.approx(single.metrics[name], abs=1e-4)


def test_wandb_initialization(run):
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 1


def wandb_log(run):
    return next((run.folder / "wandb").glob("offline-run-*/*.wandb")).read_bytes()


def test_metric_logging(run):
    for name in (b"train/loss", b"train/grad_norm", b"eval/perplexity", b"optimizer/grad_norm"):
        assert name in wandb_log(run)


def test_distributed_wandb(run):
    """Four devices, one run: rank 0 logs."""
    assert len(list((run.folder / "wandb").glob("*run-*"))) == 1


def test_artifact_tracking(run):
    assert b"model.safetensors" in wandb_log(run)


def test_full_training_pipeline(run):
    """Load, prepare, train, save, evaluate: the files of a finished run."""
    names = {path.name for path in run.folder.iterdir()}
    assert {"checkpoints", "model", "metrics.json", "report.html", "config.json"} <= names
    assert run.metrics["step"] == 9


def test_distributed_training_convergence(single, double):
    assert double.losses() == pytest.approx(single.losses(), abs=1e-4)


def test_communication_overhead(run):
    """The report has the bytes that the optimizer sends, and its share of the time."""
    text = (run.folder / "report.html").read_text()
    assert "sent per step" in text
    assert "optimizer.step()" in text


def test_recovery_scenarios(data, tmp_path, double):
    """SIGTERM: a checkpoint, exit status 143, and the same end afterwards."""
    values = job(data, tmp_path / "run", parallelism={"dp_shard": 2}, evaluation=EVALUATION)
    stopped = interrupted(values, "step 4/9", signal.SIGTERM)
    assert stopped.status == 143
    assert trained(values).metrics == double.metrics


def test_data_loading_errors(data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n')
    run = train(job(data, tmp_path / "run", data={"train": str(path), "test": None}))
    assert (run.status, f"{path}:2: 'output' is missing" in run.stderr) == (1, True)


def test_gradient_explosion_handling(data, tmp_path):
    """Large rates without a policy would train on NaN: the run stops, and names the parameter."""
    optimizer = {"adamw": {"lr": 1e30}, "nonfinite": "raise"}
    run = train(job(data, tmp_path / "run", optimizer=optimizer, checkpoint={"every": 1}))
    assert run.status == 1
    assert "A gradient holds NaN or Inf" in run.stderr
