"""000, "Test Matrix": every parallelism, trained five steps, compared with one process.

Ranks get the same batch (every fourth sample of it under context parallelism), so that averages
over a power of two of ranks are exact. Gradients and parameters are then bitwise those of one
process. With tensor parallelism torch computes differently, and with context parallelism it sums in
another order: there the iteration runs in float32, and parameters are equal to 1e-5. Rows named
bf16 iterate in bfloat16, where a difference in a gradient's last bit can grow to one of the
iteration's. The document's 1e-3 holds at its lr of 1e-3 (1.0e-4 was measured), but not at lr=0.02
(6e-3).
"""

import threading
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import (
    DistributedConfig,
    Muon,
    create_auto_config,
    create_devicemesh_config,
)
from tests.requirements.models import MoE, TinyTransformer, batch, differences, full_params
from tests.support.pool import run_processes

STEPS, DIM, LAYERS = 5, 16, 4
SAMPLES, SEQUENCE = 4, 8
TOLERANCE, NARROW = 1e-5, 1e-3  # the documents' table, float32 and bfloat16
DTYPES = {0.0: torch.bfloat16, TOLERANCE: torch.float32, NARROW: torch.bfloat16}


class Row(threading.local):
    """Settings of the row that runs on this thread."""

    dtype = torch.bfloat16


row = Row()


def make_optimizer(
    model: nn.Module, config: DistributedConfig | None, strategy: Literal["auto", "owned"] = "auto"
) -> Muon:
    return Muon(
        model.named_parameters(),
        lr=1e-3,
        distributed_config=config,
        ns_dtype=row.dtype,
        strategy=strategy,
    )


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


def data(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, SAMPLES, SEQUENCE, DIM), batch(100 + step, SAMPLES, SEQUENCE, DIM)


def one_process(tolerance: float, microbatches: int = 1) -> dict[str, Tensor]:
    model = TinyTransformer(DIM, LAYERS)
    optimizer: torch.optim.Optimizer = torch.optim.Muon(model.parameters(), lr=1e-3)
    if tolerance:
        optimizer = Muon(model.named_parameters(), lr=1e-3, ns_dtype=DTYPES[tolerance])
    for step in range(STEPS):
        parts = [t.chunk(microbatches) for t in data(step)]
        for x, target in zip(*parts, strict=True):
            loss_of(model(x), target).backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.div_(microbatches)
        optimizer.step()
        optimizer.zero_grad()
    return full_params(model)


def train(model: nn.Module, config: DistributedConfig | None, after_backward: Any = None) -> Muon:
    optimizer = make_optimizer(model, config)
    for step in range(STEPS):
        x, target = data(step)
        loss_of(model(x), target).backward()
        if after_backward is not None:
            after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, tensor_dim: int) -> None:
    """Cut every layer along one tensor dim, or with 2 as Megatron does: columns, then rows."""
    colwise: ParallelStyle = ColwiseParallel(output_layouts=Replicate())
    rowwise: ParallelStyle = RowwiseParallel(input_layouts=Replicate())
    kinds = {
        0: (colwise, colwise),
        1: (rowwise, rowwise),
        2: (ColwiseParallel(), RowwiseParallel()),
    }[tensor_dim]
    names = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "out_proj": 1}
    for layer in layers_of(model):
        parallelize_module(layer.attention, mesh, {n: kinds[i] for n, i in names.items()})
        parallelize_module(layer.ffn, mesh, {"w1": kinds[0], "w2": kinds[1]})


def shard_fully(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    """Return the layers of this rank: all, or those of its pipeline stage."""
    layers: Any = model.layers
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]


def check_no_redundancy(optimizer: Muon) -> None:
    """Assert that every matrix is orthogonalized once, also with replicas."""
    assert optimizer.plan.cost.redundancy == 1.0


def without_config() -> dict[str, Tensor]:
    model = TinyTransformer(DIM, LAYERS)
    train(model, None)
    return full_params(model)


def ddp() -> dict[str, Tensor]:
    model = DistributedDataParallel(TinyTransformer(DIM, LAYERS))
    check_no_redundancy(train(model, create_auto_config(ddp_process_group=dist.group.WORLD)))
    return full_params(model)


def ddp_without_config() -> dict[str, Tensor]:
    model = DistributedDataParallel(TinyTransformer(DIM, LAYERS))
    train(model, None)
    return full_params(model)


def fsdp2() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    model = shard_fully(TinyTransformer(DIM, LAYERS), mesh)
    check_no_redundancy(train(model, None))
    return full_params(model)


def fsdp1(strategy: str) -> dict[str, Tensor]:
    model = TinyTransformer(DIM, LAYERS)
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if strategy == "HYBRID_SHARD":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        groups = mesh.get_group("shard"), mesh.get_group("replicate")
        options |= {"process_group": groups}
        config = create_auto_config(
            shard_process_group=groups[0], replicate_process_group=groups[1]
        )
    else:
        config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    options["sharding_strategy"] = ShardingStrategy[strategy]
    for index, layer in enumerate(model.layers):
        model.layers[index] = FullyShardedDataParallel(layer, **options)
    wrapped = FullyShardedDataParallel(model, **options)
    check_no_redundancy(train(wrapped, config))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return full_params(wrapped)


def tp(tensor_dim: int) -> dict[str, Tensor]:
    model = TinyTransformer(DIM, LAYERS)
    tensor_parallel(model, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), tensor_dim)
    check_no_redundancy(train(model, create_auto_config(tp_process_group=dist.group.WORLD)))
    return full_params(model)


def hsdp() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = shard_fully(TinyTransformer(DIM, LAYERS), mesh)
    check_no_redundancy(train(model, create_devicemesh_config(mesh)))
    return full_params(model)


def tp_and(names: tuple[str, ...], shape: tuple[int, ...], tensor_dim: int) -> dict[str, Tensor]:
    """Train with FSDP2 or HSDP over tensor parallelism."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = TinyTransformer(DIM, LAYERS)
    tensor_parallel(model, mesh["tp"], tensor_dim)
    data_dims = tuple(name for name in names if name != "tp")
    shard_fully(model, mesh[data_dims])
    check_no_redundancy(train(model, create_devicemesh_config(mesh)))
    return full_params(model)


def cp() -> dict[str, Tensor]:
    """Train with a part of the data on every rank, and gradients averaged over all ranks."""
    model = TinyTransformer(DIM, LAYERS)
    config = create_auto_config(cp_process_group=dist.group.WORLD)
    check_no_redundancy(train_on_parts(model, config, dist.group.WORLD))
    return full_params(model)


def train_on_parts(model: nn.Module, config: DistributedConfig, group: Any) -> Muon:
    optimizer = make_optimizer(model, config)
    index, count = dist.get_rank(group), dist.get_world_size(group)
    for step in range(STEPS):
        x, target = data(step)
        loss_of(model(x[index::count]), target[index::count]).backward()
        for param in model.parameters():
            grad = param.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            dist.all_reduce(local, group=group)
            local.div_(count)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def cp_in_fsdp() -> dict[str, Tensor]:
    """Train as torchtitan does: parameters are sharded over dp_shard x cp as one mesh dim."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    model = shard_fully(TinyTransformer(DIM, LAYERS), mesh._flatten("fsdp"))
    check_no_redundancy(train(model, create_devicemesh_config(mesh)))
    return full_params(model)


def cp_tp() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    model = TinyTransformer(DIM, LAYERS)
    tensor_parallel(model, mesh["tp"], 2)
    config = create_auto_config(
        cp_process_group=mesh.get_group("cp"), tp_process_group=mesh.get_group("tp")
    )
    optimizer = train_on_parts(model, config, mesh.get_group("cp"))
    check_no_redundancy(optimizer)
    assert str(optimizer.plan.meshes[0]) == "(cp=2, tp=2)"
    return full_params(model)


def run_row(body: Any, args: Any, tolerance: float) -> dict[str, Tensor]:
    """Run a row on one rank; its optimizers iterate in the dtype of its tolerance."""
    row.dtype = DTYPES[tolerance]
    params: dict[str, Tensor] = body(*args)
    return params


def pipeline(
    names: tuple[str, ...], shape: tuple[int, ...], empty_stage: bool = False
) -> dict[str, Tensor]:
    """Train with 1F1B over the first mesh dim, and each stage over the other mesh dims."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    stage_id, num_stages = mesh.get_local_rank("pp"), shape[0]
    model = TinyTransformer(DIM, LAYERS)
    num_busy = num_stages - empty_stage
    for index in range(LAYERS):
        if index * num_busy // LAYERS != stage_id:
            model.layers[index] = nn.Identity()
    stage_names = {name for name, _ in model.named_parameters()}
    groups = {f"{name}_process_group": mesh.get_group(name) for name in names}
    if "tp" in names:
        tensor_parallel(model, mesh["tp"], 2)
    if data_dims := tuple(name for name in names if name in ("replicate", "shard")):
        shard_fully(model, mesh[data_dims])
    stage = PipelineStage(
        model, stage_id, num_stages, torch.device("cpu"), group=groups["pp_process_group"]
    )
    schedule = Schedule1F1B(stage, n_microbatches=SAMPLES, loss_fn=loss_of)
    config = create_auto_config(pp_stage_id=stage_id, pp_num_stages=num_stages, **groups)
    optimizer = make_optimizer(model, config)
    for step in range(STEPS):
        x, target = data(step)
        arguments, keywords = (x,) if stage_id == 0 else (), {}
        if stage_id == num_stages - 1:
            keywords = {"target": target}
        schedule.step(*arguments, **keywords)
        optimizer.step()
        optimizer.zero_grad()
    assert {spec.fqn for spec in optimizer.plan.params} == stage_names
    check_no_redundancy(optimizer)
    return full_params(model)


P0, P1, P2 = pytest.mark.P0, pytest.mark.P1, pytest.mark.P2
ROWS = [
    pytest.param(1, without_config, (), 0.0, id="none", marks=P0),
    pytest.param(4, ddp, (), 0.0, id="ddp", marks=P0),
    pytest.param(4, ddp_without_config, (), 0.0, id="ddp-without-config", marks=P0),
    pytest.param(4, fsdp2, (), 0.0, id="fsdp2", marks=P0),
    pytest.param(4, fsdp1, ("FULL_SHARD",), 0.0, id="fsdp1", marks=P0),
    pytest.param(4, fsdp1, ("SHARD_GRAD_OP",), 0.0, id="fsdp1-grad-op", marks=P1),
    pytest.param(4, fsdp1, ("HYBRID_SHARD",), 0.0, id="fsdp1-hybrid", marks=P1),
    pytest.param(4, tp, (0,), TOLERANCE, id="tp-dim-0", marks=P0),
    pytest.param(4, tp, (1,), TOLERANCE, id="tp-dim-1", marks=P0),
    pytest.param(4, tp, (2,), TOLERANCE, id="tp-mixed", marks=P0),
    pytest.param(4, hsdp, (), 0.0, id="hsdp", marks=P1),
    pytest.param(4, tp_and, (("dp_shard", "tp"), (2, 2), 2), TOLERANCE, id="tp-fsdp", marks=P1),
    pytest.param(4, tp_and, (("dp_shard", "tp"), (2, 2), 0), TOLERANCE, id="tp0-fsdp", marks=P1),
    pytest.param(
        *(8, tp_and, (("dp_replicate", "dp_shard", "tp"), (2, 2, 2), 2), TOLERANCE),
        id="tp-hsdp",
        marks=P1,
    ),
    pytest.param(4, cp, (), TOLERANCE, id="cp", marks=P1),
    pytest.param(4, cp_in_fsdp, (), 0.0, id="cp-in-fsdp", marks=P1),
    pytest.param(4, cp_tp, (), TOLERANCE, id="cp-tp", marks=P2),
    *(pytest.param(4, tp, (dim,), NARROW, id=f"tp-{dim}-bf16", marks=P1) for dim in range(3)),
    *(
        pytest.param(
            4, tp_and, (("dp_shard", "tp"), (2, 2), d), NARROW, id=f"tp{d}-fsdp-bf16", marks=P1
        )
        for d in (0, 2)
    ),
    pytest.param(
        *(8, tp_and, (("dp_replicate", "dp_shard", "tp"), (2, 2, 2), 2), NARROW),
        id="tp-hsdp-bf16",
        marks=P1,
    ),
    pytest.param(4, cp, (), NARROW, id="cp-bf16", marks=P1),
    pytest.param(4, cp_tp, (), NARROW, id="cp-tp-bf16", marks=P2),
]


@pytest.mark.parametrize(("num_ranks", "body", "args", "tolerance"), ROWS)
def test_row_equals_one_process(num_ranks, body, args, tolerance):
    expected = one_process(tolerance)
    for params in run_processes(num_ranks, run_row, body, args, tolerance):
        assert params.keys() == expected.keys()
        assert differences(params, expected, tolerance) == []


NUM_EXPERTS = 4


def train_experts(
    model: MoE,
    config: DistributedConfig | None,
    ep_group: Any,
    strategy: Literal["auto", "owned"] = "auto",
) -> Muon:
    """Train each rank's experts on their own tokens; the gate's gradient is summed."""
    optimizer = make_optimizer(model, config, strategy)
    for step in range(STEPS):
        x, target = (batch(seed + step, 4 * NUM_EXPERTS, DIM) for seed in (0, 100))
        held = [int(name) for name in model.experts]
        tokens = [i for i in range(len(x)) if i % NUM_EXPERTS in held]
        ((model(x)[tokens] - target[tokens]).square().sum() / target.numel()).backward()
        if ep_group is not None:
            dist.all_reduce(model.gate.weight.grad, group=ep_group)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def ep() -> dict[str, Tensor]:
    """Train full experts without distributed_config; nothing is sent."""
    rank = dist.get_rank()
    model = MoE(DIM, NUM_EXPERTS, [rank])
    optimizer = train_experts(model, None, dist.group.WORLD)
    assert optimizer.plan.cost.total_nbytes == 0
    return full_params(model)


def ep_with_group() -> dict[str, Tensor]:
    model = MoE(DIM, NUM_EXPERTS, [dist.get_rank()])
    config = create_auto_config(ep_process_group=dist.group.WORLD)
    assert train_experts(model, config, dist.group.WORLD).plan.cost.total_nbytes == 0
    return full_params(model)


def ep_tp(tensor_dim: int) -> dict[str, Tensor]:
    """Train two experts per pair of ranks, cut over the pair; matrices stay within the pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    index = mesh.get_local_rank("ep")
    model = MoE(DIM, NUM_EXPERTS, [2 * index, 2 * index + 1])
    for expert in model.experts.values():
        style: ParallelStyle = ColwiseParallel(output_layouts=Replicate())
        if tensor_dim:
            style = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(expert, mesh["tp"], style)
    config = create_auto_config(
        tp_process_group=mesh.get_group("tp"),
        tp_shard_dim={"gate.weight": None},
        ep_process_group=mesh.get_group("ep"),
    )
    # With "auto" both ranks of a pair orthogonalize, which costs less than an exchange.
    check_no_redundancy(train_experts(model, config, mesh.get_group("ep"), strategy="owned"))
    return full_params(model)


def one_process_experts(tolerance: float) -> dict[str, Tensor]:
    model = MoE(DIM, NUM_EXPERTS, range(NUM_EXPERTS))
    row.dtype = DTYPES[tolerance]
    train_experts(model, None, None)
    row.dtype = torch.bfloat16
    return full_params(model)


@pytest.mark.parametrize(
    ("body", "args"),
    [
        pytest.param(ep, (), id="ep", marks=P1),
        pytest.param(ep_with_group, (), id="ep-with-group", marks=P1),
        pytest.param(ep_tp, (0,), id="ep-tp-dim-0", marks=P2),
        pytest.param(ep_tp, (1,), id="ep-tp-dim-1", marks=P2),
    ],
)
def test_experts_equal_one_process(body, args):
    expected = one_process_experts(TOLERANCE)
    ranks = run_processes(4, run_row, body, args, TOLERANCE)
    assert set().union(*ranks) == expected.keys()
    for params in ranks:
        assert differences(params, expected, TOLERANCE) == []


def stacked_experts() -> tuple[list[bool], int]:
    """Step experts as one parameter [e, m, n] cut over ep: each rank has full matrices."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    weight = nn.Parameter(distribute_tensor(batch(0, 8, DIM, 6), mesh, [Shard(0)]))
    optimizer = Muon([("experts.weight", weight)])
    expert_params = [nn.Parameter(m.clone()) for m in batch(0, 8, DIM, 6)]
    reference = torch.optim.Muon(expert_params)
    for step in range(STEPS):
        grad = batch(1 + step, 8, DIM, 6)
        weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
        for expert, part in zip(expert_params, grad, strict=True):
            expert.grad = part.clone()
        optimizer.step()
        reference.step()
    first = 2 * dist.get_rank()
    local = weight.to_local()
    same = [torch.equal(local[i], expert_params[first + i]) for i in range(2)]
    return same, optimizer.plan.cost.total_nbytes


@P1
def test_stacked_experts_are_bitwise_and_send_nothing():
    assert run_processes(4, stacked_experts) == [([True, True], 0)] * 4


STAGE_ROWS = [
    pytest.param(("pp",), (2,), 0.0, id="pp-2", marks=P1),
    pytest.param(("pp",), (4,), 0.0, id="pp-4", marks=P2),
    pytest.param(("pp", "tp"), (2, 2), TOLERANCE, id="pp-tp", marks=P2),
    pytest.param(("pp", "shard"), (2, 2), 0.0, id="pp-fsdp", marks=P2),
    pytest.param(
        *(("pp", "replicate", "shard", "tp"), (2, 2, 2, 2), TOLERANCE), id="pp-tp-hsdp", marks=P2
    ),
]


@pytest.mark.parametrize("empty_stage", [False, True], ids=["", "a-stage-without-matrices"])
@pytest.mark.parametrize(("names", "shape", "tolerance"), STAGE_ROWS)
def test_stages_equal_one_process(names, shape, tolerance, empty_stage):
    expected = one_process(tolerance, microbatches=SAMPLES)
    num_ranks = torch.Size(shape).numel()
    stages = run_processes(num_ranks, run_row, pipeline, (names, shape, empty_stage), tolerance)
    assert set().union(*stages) == expected.keys()
    for params in stages:
        assert differences(params, expected, tolerance) == []
