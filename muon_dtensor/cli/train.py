"""`muon-dtensor train`, `evaluate`, `export` and `make-sample-data`; see `muon_dtensor.train`.

Checks the flags and the config, and starts the ranks, which run `muon_dtensor.train.worker`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from muon_dtensor import CheckpointError
from muon_dtensor.train.job import TrainConfig

PACKAGES = (
    *("accelerate", "datasets", "matplotlib", "peft", "pydantic", "rouge_score", "sacrebleu"),
    *("tokenizers", "transformers", "trl", "yaml"),
)
"""Of the extra `train`."""

TOP_LEVEL = ("engine", "output", "task")
"""Keys of the config that are not in a section."""

overrides: dict[str, str] = {}
"""Values by dotted key that the command line sets in the config; see `split_overrides`."""

Job = Annotated[Path, tyro.conf.Positional]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of the command, and values by dotted key.

    `--training.max_steps 200`, `--training.max_steps=200` and `--output folder` set keys of the
    config. Raises ValueError where the value is missing.
    """
    rest: list[str] = []
    values: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or ("." not in name and name not in TOP_LEVEL):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        values[name.replace("-", "_")] = value
    return rest, values


def train(
    job: Job,
    resume: str = "auto",
    nproc: int | None = None,
    dry_run: bool = False,
    print_config: bool = False,
) -> int:
    """Train a model as a YAML file says, on all ranks of this machine or of torchrun.

    Continues from the newest checkpoint of the output folder, so that the same command resumes a
    run that was stopped. --SECTION.KEY VALUE changes a value of the file, as in
    --training.max_steps 200; so do --output, --task and --engine. Exit status: 0 finished, 1
    failed, 2 cannot start, 143 stopped by SIGTERM after a checkpoint.

    Args:
        job: a YAML or TOML file; see docs/train.md.
        resume: auto, never, or the path of a checkpoint.
        nproc: number of processes to start; default: the size of the mesh, or one per GPU. Under
            torchrun its ranks are used.
        dry_run: print mesh, plan, memory and data, and train nothing.
        print_config: print the config with all defaults, and train nothing.
    """
    try:
        _check_installed()
        config = TrainConfig.load(job, overrides)
        ranks = num_ranks(config, nproc)
        if print_config:
            import yaml

            print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
            return 0
        if dry_run and config.engine == "torchtitan":
            raise ValueError("--dry-run needs engine: transformers")
        if dry_run and config.islands.compress_gradients is not None:
            raise ValueError("--dry-run does not plan islands.compress_gradients")
        if dry_run:
            from muon_dtensor.cli.train_dry_run import print_dry_run

            print_dry_run(config, ranks)
            return 0
    except (ValueError, OSError, ImportError) as error:
        return _refuse("train", error)
    return _launch(job, ranks, {"mode": "train", "resume": resume})


def evaluate(job: Job, checkpoint: str = "auto", nproc: int | None = None) -> int:
    """Print the metrics of a run's checkpoint as JSON, and write evaluation.json.

    Args:
        job: the file that the run was started with.
        checkpoint: auto (the newest), never (the model before training), or a path.
        nproc: as of `train`.
    """
    try:
        _check_installed()
        ranks = num_ranks(TrainConfig.load(job, overrides), nproc)
    except (ValueError, OSError, ImportError) as error:
        return _refuse("evaluate", error)
    return _launch(job, ranks, {"mode": "evaluate", "resume": checkpoint})


def export(job: Job, out: Path | None = None, checkpoint: str = "auto") -> int:
    """Write a checkpoint as a folder that transformers' `from_pretrained` loads.

    One process reads the checkpoint of any number of ranks.

    Args:
        job: the file that the run was started with.
        out: folder to write; default: model in the output folder.
        checkpoint: auto (the newest) or a path.
    """
    try:
        _check_installed()
        config = TrainConfig.load(job, overrides)
        if config.engine == "torchtitan":
            raise ValueError("export needs engine: transformers")
        from muon_dtensor.train.run import export_checkpoint

        folder = export_checkpoint(config, out or Path(config.output) / "model", checkpoint)
    except (ValueError, OSError, ImportError) as error:
        return _refuse("export", error)
    except CheckpointError as error:
        _refuse("export", error)
        return 1
    print(folder)
    return 0


def make_sample_data(out: Path = Path("sample-data")) -> int:
    """Write questions, conversations, texts, a tokenizer and three configs to train on them.

    They are made from the documentation of Python's standard library; nothing is downloaded.

    Args:
        out: folder; created if it does not exist.
    """
    try:
        _check_installed()
        from muon_dtensor.train.sample_data import make_sample_data as write

        folder = write(out)
    except (OSError, ImportError) as error:
        return _refuse("make-sample-data", error)
    print(f"muon-dtensor train {folder / 'sft.yaml'}")
    return 0


def num_ranks(config: TrainConfig, nproc: int | None) -> int:
    """Return the number of ranks to start, or of those that torchrun started.

    Raises ValueError where the mesh does not fit them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
    elif nproc is not None:
        ranks = nproc
    else:
        ranks = config.num_ranks() or _num_gpus() or 1
    if ranks < 1:
        raise ValueError(f"--nproc must be 1 or more, got {ranks}")
    config.mesh_sizes(ranks)
    return ranks


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _check_installed() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"needs {', '.join(missing)}: pip install 'muon_dtensor[train]'")


def _refuse(command: str, error: BaseException) -> int:
    print(f"muon-dtensor {command}: {error}", file=sys.stderr)
    return 2


def _launch(job: Path, ranks: int, settings: dict[str, Any]) -> int:
    """Run the worker on the ranks; return the exit status of the run.

    SIGTERM is passed on: the ranks then save a checkpoint and stop.
    """
    command = [sys.executable]
    if "TORCHELASTIC_RUN_ID" not in os.environ and ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = dict(os.environ)
    if ranks > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"path": str(job), "overrides": overrides, "status_folder": folder}
        command += ["-m", "muon_dtensor.train.worker", json.dumps(settings)]
        process = subprocess.Popen(command, env=environment)
        previous = signal.signal(
            signal.SIGTERM, lambda number, frame: process.send_signal(signal.SIGTERM)
        )
        try:
            returncode = process.wait()
        except KeyboardInterrupt:
            process.wait()
            return 128 + signal.SIGINT
        finally:
            signal.signal(signal.SIGTERM, previous)
        # torchrun's own status is 1 for every failure, after a page about it
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*"))]
    if not reports:
        return 1 if returncode else 0
    status, message = reports[0]
    if message:
        print(f"muon-dtensor {settings['mode']}: {message}", file=sys.stderr)
    return int(status)
