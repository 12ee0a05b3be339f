"""`muon-dtensor train` from YAML: losses, metrics, resume after faults, other meshes, export."""

import json
import signal

import pytest

from tests.support.train_jobs import interrupted, job, muon_dtensor, trained

pytestmark = [pytest.mark.train]

FSDP_TP = {"dp_shard": 2, "tp": 2}
METRICS = {"metrics": ["perplexity", "bleu", "rouge"], "max_new_tokens": 8, "samples": 6}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return an uninterrupted run on fsdp=2 x tp=2."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return trained(job(data, folder, parallelism=FSDP_TP, evaluation={**METRICS, "every": 3}))


def test_sft_on_4_ranks_from_yaml_alone(whole):
    losses = whole.losses()
    assert losses[9] < losses[1] - 0.3
    metrics = whole.metrics
    assert metrics["step"] == 9
    assert {"eval_perplexity", "eval_bleu", "eval_rouge1", "eval_rouge2", "eval_rougeL"} <= set(
        metrics
    )
    assert metrics["eval_perplexity"] < 2048
    assert "28 matrices" not in whole.stdout
    assert "14 matrices on (fsdp=2, tp=2)" in whole.stdout
    assert (whole.folder / "report.html").stat().st_size > 10_000


def test_sigkill_and_the_same_command_give_the_same_metrics(data, tmp_path, whole):
    values = job(data, tmp_path / "run", parallelism=FSDP_TP, evaluation={**METRICS, "every": 3})
    killed = interrupted(values, "step 7/9", signal.SIGKILL)
    assert killed.status == 1
    assert not (killed.folder / "metrics.json").exists()
    resumed = trained(values)
    assert "resuming from" in resumed.stdout
    assert resumed.metrics == whole.metrics
    assert resumed.losses() == whole.losses()


def test_resumes_on_another_mesh(data, tmp_path, whole):
    values = job(data, tmp_path / "run", parallelism=FSDP_TP, evaluation=METRICS)
    stopped = interrupted(values, "step 4/9", signal.SIGTERM)
    assert stopped.status == 143
    assert "stopped by SIGTERM" in stopped.stdout
    other = {**values, "parallelism": {"dp_replicate": 2, "dp_shard": 1, "tp": 1}}
    resumed = trained(other, "--training.per_device_train_batch_size", "4")
    assert "changed since: parallelism.tp: 2 -> 1" in resumed.stdout
    assert "another number of ranks" in resumed.stdout
    assert resumed.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-4)


def test_the_exported_model_generates_the_same_text(data, tmp_path, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = tmp_path / "exported"
    path = whole.folder.with_suffix(".yaml")
    exported = muon_dtensor("export", str(path), "--out", str(out), folder=out)
    assert exported.status == 0, exported.stderr
    lines = (whole.folder / "answers.jsonl").read_text().splitlines()
    for folder in (out, whole.folder / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for line in lines:
            answer = json.loads(line)
            inputs = tokenizer(answer["prompt"], return_tensors="pt", add_special_tokens=False)
            ids = model.generate(input_ids=inputs["input_ids"], generation_config=config)
            text = tokenizer.decode(ids[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)
            assert text.strip() == answer["answer"]


def test_evaluate_prints_the_metrics_of_the_checkpoint(whole):
    path = whole.folder.with_suffix(".yaml")
    done = muon_dtensor("evaluate", str(path), folder=whole.folder)
    assert done.status == 0, done.stderr
    metrics = json.loads((whole.folder / "evaluation.json").read_text())
    expected = {name: v for name, v in whole.metrics.items() if name.startswith("eval_")}
    assert metrics == expected
