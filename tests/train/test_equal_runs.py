"""Runs that must agree: one process and four, accumulated and whole batches, streams and files."""

import pytest

from tests.support.train_jobs import job, muon_dtensor, trained, write_job

pytestmark = [pytest.mark.train]


def steps(number: int, batch: int, accumulation: int = 1) -> dict[str, int]:
    return {
        "max_steps": number,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    }


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    return trained(job(data, folder, training=steps(20, 8), checkpoint={"every": 0}))


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param({"dp_shard": 2, "tp": 2}, id="fsdp=2 x tp=2"),
        pytest.param({"dp_replicate": 2, "dp_shard": 2}, id="hsdp=2 x 2"),
        pytest.param({"tp": 2}, id="tp=2"),
    ],
)
def test_several_processes_train_as_one(data, tmp_path, one_process, parallelism):
    ranks = {name: size for name, size in parallelism.items() if name != "tp"}
    data_ranks = 1
    for size in ranks.values():
        data_ranks *= size
    parallelism = {"dp_shard": 1, **parallelism}
    values = job(
        data,
        tmp_path / "run",
        parallelism=parallelism,
        training=steps(20, 8 // data_ranks),
        checkpoint={"every": 0},
    )
    run = trained(values)
    expected, losses = one_process.losses(), run.losses()
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-4)
    assert run.metrics["eval_loss"] == pytest.approx(one_process.metrics["eval_loss"], abs=1e-4)


def test_accumulation_4_is_a_batch_4_times_as_large(data, tmp_path):
    runs = [
        trained(
            job(
                data,
                tmp_path / f"{batch}",
                parallelism={"dp_shard": 2},
                training=steps(8, batch, accumulation),
            )
        ).losses()
        for batch, accumulation in ((1, 4), (4, 1))
    ]
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_perplexity_over_ranks_is_that_of_one_process(data, tmp_path, one_process):
    """Of the same checkpoint on other meshes; 21 test rows do not divide over the ranks."""
    values = job(data, one_process.folder, training=steps(20, 8))
    expected = one_process.metrics["eval_perplexity"]
    for name, parallelism in {
        "fsdp=3": {"dp_shard": 3},
        "fsdp=2 x tp=2": {"dp_shard": 2, "tp": 2},
        "ddp=2": {"dp_replicate": 2, "dp_shard": 1},
    }.items():
        path = write_job({**values, "parallelism": parallelism}, tmp_path / "job.yaml")
        done = muon_dtensor("evaluate", str(path), folder=one_process.folder)
        assert done.status == 0, done.stderr[-3000:]
        (line,) = (line for line in done.stdout.splitlines() if "eval_perplexity" in line)
        perplexity = float(line.split(":")[1].strip(" ,"))
        assert perplexity == pytest.approx(expected, rel=1e-6), name
