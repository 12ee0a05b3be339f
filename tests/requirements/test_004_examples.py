"""004: every section of the document is a script in examples/, which is run as users run it.

Each script trains under torchrun's agent on gloo. It must succeed, the loss must fall, and the
output must contain the facts of the section.
"""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from muon_dtensor import Muon, create_auto_config
from tests.integrations import test_stacks
from tests.requirements.models import batch, create_dummy_model, differences, full_params
from tests.support.pool import run_processes
from tests.support.torchrun import EXAMPLES, run_example

P0, P1, P2 = pytest.mark.P0, pytest.mark.P1, pytest.mark.P2


ROWS = [
    pytest.param(
        "single_gpu",
        1,
        [
            "mesh this rank alone: 12 matrices",
            "embed.weight                        [64, 32]  adamw",
        ],
        marks=P0,
    ),
    pytest.param(
        "ddp",
        2,
        ["mesh this rank alone", "mesh (ddp=2)", "shared by replicas", "same parameters: True"],
        marks=P0,
    ),
    pytest.param("fsdp", 2, ["rows over dim0=2", "2 owners", "done 1.00 times"], marks=P0),
    pytest.param("fsdp1", 2, ["elements over fsdp=2", "done 1.00 times"], marks=P1),
    pytest.param(
        "tensor_parallel",
        2,
        [
            "attention.q_proj.weight  [32, 32]  rows over tp=2",
            "attention.out_proj.weight  [32, 32]  cols over tp=2",
        ],
        marks=P0,
    ),
    pytest.param(
        "hsdp",
        4,
        ["mesh (dp_replicate=2, dp_shard=2)", "shared by replicas", "done 1.00 times", "4 owners"],
        marks=P1,
    ),
    pytest.param("tp_fsdp", 4, ["rows over tp=2 then dp_shard=2", "4 owners"], marks=P1),
    pytest.param(
        "tp_hsdp",
        8,
        ["mesh (dp_replicate=2, dp_shard=2, tp=2)", "in 4 pieces on each of 2 replicas"],
        marks=P1,
    ),
    pytest.param(
        "expert_parallel",
        2,
        ["experts.{0..1}.w1.weight  [96, 32]  whole", "sent per step 0 B"],
        marks=P1,
    ),
    pytest.param(
        "expert_tensor_parallel",
        4,
        ["mesh (tp=2)", "gate.weight  [4, 32]  replicated over tp=2", "[96, 32]  rows over tp=2"],
        marks=P1,
    ),
    pytest.param(
        "context_parallel",
        2,
        ["mesh (cp=2)", "shared by replicas", "done 1.00 times", "2 owners"],
        marks=P1,
    ),
    pytest.param(
        "pipeline_parallel", 2, ["layers.{0..1}.ffn.w1.weight", "sent per step 0 B"], marks=P1
    ),
    pytest.param(
        "four_d",
        16,
        ["mesh (dp_replicate=2, dp_shard=2, tp=2)", "8 owners", "done 1.00 times"],
        marks=P2,
    ),
    pytest.param(
        "custom_framework",
        2,
        ["elements per rank: [6144, 6144]", "mesh (fsdp=2)", "same parameters: True"],
        marks=P1,
    ),
]


@pytest.mark.parametrize(("name", "num_ranks", "facts"), ROWS)
def test_example_trains(name, num_ranks, facts):
    printed = run_example(name, num_ranks)
    assert [fact for fact in facts if fact not in printed] == [], printed


@P1
def test_debug_mode_runs_one_rank_at_a_time(tmp_path):
    printed = run_example("debug_mode", 4, "--out", str(tmp_path))
    assert "groups of rank 0: {'dp_shard': [0, 2], 'tp': [0, 1]}" in printed
    assert "[16, 16] -> [32, 32] -> the same shard" in printed
    by_step: dict[int, list[tuple[float, float, int]]] = {}
    for rank in range(4):
        trace = json.loads((tmp_path / f"trace_{rank}.json").read_text())
        for event in trace["traceEvents"]:
            if event["cat"] == "orthogonalize":
                start = event["ts"]
                spans = by_step.setdefault(event["args"]["step"], [])
                spans.append((start, start + event["dur"], event["pid"]))
    assert len(by_step) == 5
    for spans in by_step.values():
        spans.sort()
        assert [rank for _, _, rank in spans] == [0, 1, 2, 3]


def test_every_example_is_run_and_documents_its_command():
    names = {row.values[0]: row.values[1] for row in ROWS} | {"debug_mode": 4}
    names |= {"islands": 4, "private": 2}  # by islands/test_examples
    in_test_stacks = {row.values[0] for row in test_stacks.ROWS}
    not_run = {"common", "train_gpt", "islands_torchft"} | in_test_stacks
    assert {path.stem for path in EXAMPLES.glob("*.py")} == names.keys() | not_run
    for name, num_ranks in names.items():
        line = f"torchrun --nproc-per-node {num_ranks} examples/{name}.py"
        assert line in (EXAMPLES / f"{name}.py").read_text()


STEPS, DIM = 5, 12


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    for step in range(STEPS):
        loss = (model(batch(step, 4, DIM)) - batch(100 + step, 4, DIM)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not isinstance(model, FullyShardedDataParallel):
        return full_params(model)
    with FullyShardedDataParallel.summon_full_params(model):
        return full_params(model)


def migrated() -> dict[str, torch.Tensor]:
    """Train the document's "After" of "From Non-Distributed to FSDP"."""
    model = FullyShardedDataParallel(
        create_dummy_model(), use_orig_params=True, device_id=torch.device("cpu")
    )
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.parameters(), lr=1e-3, distributed_config=config)
    return train(model, optimizer)


@P1
def test_migrating_from_one_process_to_fsdp_is_bitwise():
    model = create_dummy_model()
    expected = train(model, Muon(model.parameters(), lr=1e-3))
    for params in run_processes(2, migrated):
        assert differences(params, expected, 0.0) == []


def overlapping_groups() -> str:
    """The tp group of the document's 4-D example is its replicate group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "replicate"))
    try:
        create_auto_config(
            tp_process_group=mesh.get_group("replicate"),
            shard_process_group=mesh.get_group("shard"),
            replicate_process_group=mesh.get_group("replicate"),
            tp_shard_dim=0,
        )
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    dist.barrier()  # if a rank exited while another connects, that one would hang
    return message


@P1
def test_groups_that_are_not_orthogonal_raise_with_their_names():
    for message in run_processes(4, overlapping_groups):
        assert "tp_process_group" in message
        assert "replicate_process_group" in message
