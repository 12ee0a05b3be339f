"""Engine torchtitan of `muon-dtensor train`: its config, its rows, and a run on CPUs."""

import json
import sys
from pathlib import Path

import pytest

from muon_dtensor.train.job import TrainConfig
from tests.support.deadlines import run_program

pytestmark = [pytest.mark.train]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from muon_dtensor.train.sample_data import make_sample_data

    return make_sample_data(tmp_path_factory.mktemp("data"), vocab_size=512)


@pytest.fixture(scope="module")
def titan():
    pytest.importorskip("torchtitan")
    import tests.integrations.titan_trainer  # torchtitan on a CPU
    from muon_dtensor.train import titan

    del tests
    return titan


def job(data, folder, /, **sections):
    values = {
        "engine": "torchtitan",
        "output": str(folder),
        "model": {
            "config": {"recipe": "torchtitan.models.llama3.config_registry:llama3_debugmodel"},
            "tokenizer": str(data / "tokenizer"),
        },
        "data": {"train": str(data / "conversations.jsonl"), "format": "sharegpt"},
        "optimizer": {"lr": 0.02, "adamw": {"lr": 3e-3}, "ns_dtype": "float32"},
        "training": {"max_steps": 4, "max_length": 64, "per_device_train_batch_size": 2},
        "checkpoint": {"every": 2},
        "logging": {"every": 1},
    }
    return {**values, **sections}


def test_sections_become_torchtitan_s_config(titan, data, tmp_path):
    sizes = {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2, "pp": 2}
    training = {"max_steps": 7, "max_length": 32, "gradient_accumulation_steps": 3, "seed": 5}
    values = job(data, tmp_path, parallelism=sizes, training=training)
    config = titan.titan_config(TrainConfig.from_dict(values))
    parallelism = config.parallelism
    assert (parallelism.pipeline_parallel_degree, parallelism.context_parallel_degree) == (2, 2)
    assert (config.training.steps, config.training.seq_len, config.debug.seed) == (7, 32, 5)
    assert config.training.global_batch_size == 4 * 1 * 3
    muon = [group for group in config.optimizer.param_groups if group.optimizer_name == "Muon"]
    assert muon
    assert muon[-1].optimizer_kwargs["lr"] == 0.02
    assert config.checkpoint.interval == 2
    assert config.dump_folder == str(tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"tokenizer": "t"}}, "needs model.config: {recipe"),
        ({"training": {"packing": True}}, "training.packing is not a key of engine torchtitan"),
        ({"evaluation": {"every": 3}}, "does not evaluate"),
        ({"islands": {"compress_gradients": "int8"}}, "islands need engine: transformers"),
    ],
)
def test_what_the_engine_does_not_have(data, tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(job(data, tmp_path, **sections))


def test_a_recipe_that_does_not_exist(titan, data, tmp_path):
    values = job(data, tmp_path)
    values["model"]["config"]["recipe"] = "torchtitan.models.llama3.config_registry:llama9"
    with pytest.raises(ValueError, match=r"recipe .*llama9"):
        titan.titan_config(TrainConfig.from_dict(values))


def rows(titan, data, folder, rank, ranks, /, **sections):
    config = TrainConfig.from_dict(job(data, folder, **sections))
    tokenizer = titan.Tokenizer.Config(path=config.model.tokenizer).build()
    loader = titan.Rows.Config(job=config.to_dict())
    return loader.build(
        dp_world_size=ranks, dp_rank=rank, tokenizer=tokenizer, seq_len=16, local_batch_size=2
    )


def test_only_answers_have_labels_in_every_turn(titan, data, tmp_path):
    tokenizer = titan.Tokenizer.Config(path=str(data / "tokenizer")).build().of_transformers
    lines = (data / "conversations.jsonl").read_text().splitlines()[:20]
    for line in lines:
        messages = [
            {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
            for turn in json.loads(line)["conversations"]
        ]
        rendered = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        document = titan._document({"messages": messages}, tokenizer, 10_000)
        ids = [token for token, _, _ in document]
        assert ids == rendered["input_ids"][:-1]
        trained = [label != -100 for _, label, _ in document]
        # the markers of the template, and the line end that the template puts after an answer
        marked = [bool(bit) for bit in rendered["assistant_masks"][1:]]
        assert all(t for t, m in zip(trained, marked, strict=True) if m)
        assert sum(trained) - sum(marked) == 2


def first_rows(loader, count):
    """Return the first ids of rows as the loader reads them."""
    texts = []
    for row in loader._examples():
        texts.append(row["messages"][0]["content"])
        loader._num_rows += 1
        if len(texts) == count:
            return texts


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_read_disjoint_rows_and_all_of_them(titan, data, tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    lines = (data / "conversations.jsonl").read_text().splitlines()[:12]
    path.write_text("\n".join(lines))
    section = {"train": str(path), "format": "sharegpt", "streaming": streaming}
    parts = [first_rows(rows(titan, data, tmp_path, rank, 3, data=section), 4) for rank in range(3)]
    texts = [text for part in parts for text in part]
    assert len(set(texts)) == 12


def test_state_continues_at_the_next_batch(titan, data, tmp_path):
    loader = rows(titan, data, tmp_path, 1, 2)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    expected = [next(batches) for _ in range(3)]
    resumed = rows(titan, data, tmp_path, 1, 2)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    for (inputs, labels), (want_inputs, want_labels) in zip(iter(resumed), expected, strict=False):
        assert inputs["input"].equal(want_inputs["input"])
        assert inputs["positions"].equal(want_inputs["positions"])
        assert labels.equal(want_labels)
        assert inputs["input"].shape == (2, 16)
    first = rows(titan, data, tmp_path, 0, 2)
    next(iter(first))
    other = rows(titan, data, tmp_path, 0, 1)
    other.load_state_dict(first.state_dict())
    assert other._num_rows == 2 * first._num_rows > 0


def test_a_run_on_cpus_resumes(data, tmp_path):
    script = Path(__file__).parent / "titan_job.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(script)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def losses(folder, steps):
        values = job(data, tmp_path / folder, parallelism={"dp_shard": 2, "tp": 2})
        values["training"]["max_steps"] = steps
        path = tmp_path / f"{folder}-{steps}.json"
        path.write_text(json.dumps(values))
        done = run_program([*command, str(path)], 200, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(path.with_suffix(".losses").read_text())

    whole = losses("whole", 4)
    assert whole["4"] < whole["1"]
    first = losses("resumed", 2)
    second = losses("resumed", 4)
    assert {**first, **second} == pytest.approx(whole, abs=1e-5)
