"""The config of training runs: keys, overrides, meshes, and the flags of the command. No extra."""

import importlib.util

import pytest

from muon_dtensor.cli import train as cli
from muon_dtensor.train.job import OUR_KEYS, TrainConfig, differences, read_values, shared_config
from tests.support.pool import run_processes

MINIMAL = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}}


def config(**sections):
    return TrainConfig.from_dict({**MINIMAL, **sections})


def test_defaults_and_round_trip():
    value = config(
        optimizer={"lr": 0.03, "rules": [{"pattern": "wq", "algorithm": "adamw"}]},
        training={"max_steps": 7, "warmup_steps": 2},
        evaluation={"metrics": ["bleu"]},
    )
    assert (value.task, value.engine, value.checkpoint.keep) == ("sft", "transformers", 2)
    assert value.data.on_bad_row == "raise"
    assert value.optimizer.rules[0].options == {"algorithm": "adamw"}
    assert TrainConfig.from_dict(value.to_dict()) == value
    assert value.to_dict()["evaluation"]["metrics"] == ["bleu"]


ROWS = [
    ({"modle": {}}, "unknown key 'modle'. Did you mean 'model'"),
    ({"model": {"path": "m", "lra": {}}}, "unknown key 'model.lra'. Did you mean 'lora'"),
    ({"model": {}}, "model needs either path, or config"),
    ({"model": {"path": "m", "config": {"model_type": "llama"}}}, "model needs either path"),
    ({"model": {"config": {"hidden_size": 3}, "tokenizer": "t"}}, "needs model_type"),
    ({"model": {"config": {"model_type": "llama"}}}, "model.tokenizer is needed"),
    ({"data": {}}, "data.train needs a file"),
    ({"data": {"train": "a", "test": 1.5}}, "share between 0 and 1, got 1.5"),
    ({"data": {"train": "a", "streaming": True}}, "needs training.max_steps"),
    ({"data": {"train": "a", "on_bad_row": "skp"}}, "Did you mean 'skip'"),
    ({"task": "mlm"}, "task mlm needs data.format: text"),
    ({"data": {"train": "a", "format": "text"}}, "set task: pretrain"),
    (
        {
            "task": "pretrain",
            "data": {"train": "a", "format": "text"},
            "evaluation": {"metrics": ["bleu", "rouge"]},
        },
        "evaluation.metrics bleu, rouge need task: sft",
    ),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep must be 1 or more, got 0"),
    ({"checkpoint": {"every": -1}}, "checkpoint.every must be 0 or more, got -1"),
    ({"training": {"learning_rate": 1e-3}}, "training.learning_rate is set by optimizer.lr"),
    ({"training": {"output_dir": "x"}}, "training.output_dir is set by output"),
    ({"parallelism": {"pp": 2}}, "parallelism.pp needs engine: torchtitan"),
    ({"islands": {"count": 2}}, "islands.lighthouse needs the address"),
    ({"islands": {"index": 3}}, "islands.index must be below 1, got 3"),
    (
        {"model": {"path": "m", "lora": {}}, "parallelism": {"tp": 2}},
        "model.lora needs parallelism.tp: 1",
    ),
]


@pytest.mark.parametrize(("sections", "message"), ROWS, ids=[row[1][:40] for row in ROWS])
def test_wrong_configs_name_the_key(sections, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        config(**sections)


def test_all_problems_are_listed():
    with pytest.raises(ValueError, match="model needs") as caught:
        TrainConfig.from_dict({"training": {"optim": "x"}})
    assert len(str(caught.value).splitlines()) == 3


def test_each_key_that_is_ours_is_refused():
    for key in OUR_KEYS:
        with pytest.raises(ValueError, match=f"training.{key} is set by"):
            config(training={key: 1})


def test_overrides_are_read_as_yaml(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: {path: m}\ndata: {train: a.jsonl}\ntraining: {max_steps: 3}\n")
    values = {"training.max_steps": "9", "evaluation.metrics": "[bleu]", "optimizer.lr": "3e-2"}
    value = TrainConfig.load(path, values)
    assert (value.training["max_steps"], value.optimizer.lr) == (9, 0.03)
    assert value.evaluation.metrics == ("bleu",)
    path.write_text(path.read_text() + "task: sft\n")
    with pytest.raises(ValueError, match=r"--task\.x: task is not a section"):
        read_values(path, {"task.x": "1"})


def test_toml_files_are_read_too(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "m"\n[data]\ntrain = ["a.jsonl", "b.jsonl"]\n')
    assert TrainConfig.load(path).data.train == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("parallelism", "ranks", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 6, (1, 6, 1)),
        ({"tp": 2}, 8, (1, 4, 2)),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 8, (2, 2, 2)),
        ({"dp_replicate": -1, "dp_shard": 1}, 3, (3, 1, 1)),
    ],
)
def test_mesh_sizes(parallelism, ranks, expected):
    sizes = config(parallelism=parallelism).mesh_sizes(ranks)
    assert (sizes["dp_replicate"], sizes["dp_shard"], sizes["tp"]) == expected


@pytest.mark.parametrize(
    ("parallelism", "ranks"),
    [
        ({"tp": 2}, 3),
        ({"dp_shard": 2, "tp": 2}, 8),
        ({"dp_shard": -1, "tp": -1}, 4),
        ({"ep": 4}, 2),
    ],
)
def test_meshes_that_do_not_fit(parallelism, ranks):
    with pytest.raises(ValueError, match="does not"):
        config(parallelism=parallelism).mesh_sizes(ranks)


def test_differences_name_the_keys():
    before = config(training={"max_steps": 3, "seed": 1}).to_dict()
    after = config(training={"max_steps": 5}, optimizer={"lr": 0.5}).to_dict()
    assert differences(before, after) == [
        "optimizer.lr: 0.001 -> 0.5",
        "training.max_steps: 3 -> 5",
        "training.seed: 1 -> None",
    ]


def read_shared(folder):
    import torch.distributed as dist

    path = folder / f"{dist.get_rank()}.yaml"  # only that of rank 0 exists and is read
    try:
        value = shared_config(path if dist.get_rank() else folder / "job.yaml")
    except ValueError as error:
        return str(error)
    return value.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output: here\nmodel: {path: m}\ndata: {train: a.jsonl}\n", "here"),
        ("output: here\nmodel: {pth: m}\n", "unknown key 'model.pth'. Did you mean 'path'?"),
        ("output: [\n", "not YAML"),
    ],
    ids=["good", "unknown key", "not YAML"],
)
def test_rank_0_reads_for_all_ranks(tmp_path, text, expected):
    (tmp_path / "job.yaml").write_text(text)
    results = run_processes(3, read_shared, tmp_path)
    assert len(set(results)) == 1
    assert results[0].startswith(expected)


def test_dotted_flags_are_overrides():
    text = "train job.yaml --training.max_steps 200 --nproc 4 --data.test=0.1"
    rest, values = cli.split_overrides([*text.split(), "--output", "here", "--resume", "never"])
    assert values.pop("output") == "here"
    assert (rest.pop(), rest.pop()) == ("never", "--resume")
    assert rest == ["train", "job.yaml", "--nproc", "4"]
    assert values == {"training.max_steps": "200", "data.test": "0.1"}
    with pytest.raises(ValueError, match=r"--a\.b needs a value"):
        cli.split_overrides(["train", "--a.b", "--nproc", "4"])
    with pytest.raises(ValueError, match=r"--a\.b needs a value"):
        cli.split_overrides(["train", "--a.b"])


def test_number_of_ranks(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert cli.num_ranks(config(parallelism={"dp_shard": 2, "tp": 3}), None) == 6
    assert cli.num_ranks(config(), 5) == 5
    with pytest.raises(ValueError, match="--nproc must be 1 or more, got 0"):
        cli.num_ranks(config(), 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.num_ranks(config(parallelism={"tp": 2}), None) == 4


@pytest.mark.parametrize("command", [cli.train, cli.evaluate, cli.export, cli.make_sample_data])
def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trl" else find_spec("json")
    )
    assert command(tmp_path / "job.yaml") == 2
    error = capsys.readouterr().err
    assert "needs trl: pip install 'muon_dtensor[train]'" in error


def test_print_config(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "_check_installed", lambda: None)
    monkeypatch.setattr(cli, "overrides", {"output": "elsewhere"})
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    path = tmp_path / "job.yaml"
    path.write_text("model: {path: m}\ndata: {train: a.jsonl}\nparallelism: {tp: 2, dp_shard: 1}\n")
    assert cli.train(path, print_config=True) == 0
    path.write_text(capsys.readouterr().out)
    assert TrainConfig.load(path).output == "elsewhere"
    assert cli.train(tmp_path / "missing.yaml") == 2
    assert "missing.yaml" in capsys.readouterr().err
