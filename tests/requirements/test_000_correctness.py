"""000, "Correctness Tests": equality with one process, accumulation, debug mode, wrong groups."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dtensor import Muon, create_auto_config, create_devicemesh_config
from muon_dtensor.planning.plan import Phase
from tests.requirements.models import TinyTransformer, batch, differences, full_params
from tests.support.meter import counting, installed
from tests.support.pool import run_processes

DIM, LAYERS, LR = 16, 2, 1e-3


def fsdp1(model: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def full_params_of(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return full_params(model)
    with FullyShardedDataParallel.summon_full_params(model):
        return full_params(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 10) -> list[float]:
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = model(batch(step, 8, 12, DIM)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_fsdp(**debug: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = fsdp1(TinyTransformer(DIM, LAYERS))
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    for name, value in debug.items():
        setattr(config, name, value)
    optimizer = Muon(model.named_parameters(), lr=LR, momentum=0.95, distributed_config=config)
    return train(model, optimizer), full_params_of(model)


def trained_tp() -> tuple[list[float], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    model = TinyTransformer(DIM, LAYERS)
    for layer in model.layers:
        names = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "out_proj": 1}
        styles = [ColwiseParallel, RowwiseParallel]
        parallelize_module(layer.attention, mesh, {n: styles[i]() for n, i in names.items()})
        parallelize_module(layer.ffn, mesh, {"w1": styles[0](), "w2": styles[1]()})
    config = create_auto_config(tp_process_group=dist.group.WORLD, tp_shard_dim=1)
    optimizer = Muon(
        model.named_parameters(), lr=LR, distributed_config=config, ns_dtype=torch.float32
    )
    return train(model, optimizer), full_params_of(model)


def trained_hsdp() -> tuple[list[float], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(TinyTransformer(DIM, LAYERS), mesh=mesh)
    config = create_auto_config(
        shard_process_group=mesh.get_group("shard"),
        replicate_process_group=mesh.get_group("replicate"),
    )
    optimizer = Muon(model.named_parameters(), lr=LR, distributed_config=config)
    return train(model, optimizer), full_params_of(model)


class TestMuonCorrectness:
    def must_match(self, body: Any, tolerance: float, **options: Any) -> None:
        single = TinyTransformer(DIM, LAYERS)
        losses = train(single, Muon(single.named_parameters(), lr=LR, **options))
        for rank_losses, params in run_processes(4, body):
            torch.testing.assert_close(rank_losses, losses, rtol=tolerance, atol=tolerance)
            assert differences(params, full_params(single), tolerance) == []

    @pytest.mark.P0
    def test_fsdp_matches_single_gpu(self):
        self.must_match(trained_fsdp, 0)

    @pytest.mark.P0
    def test_tp_matches_single_gpu(self):
        self.must_match(trained_tp, 1e-5, ns_dtype=torch.float32)

    @pytest.mark.P1
    def test_hsdp_matches_single_gpu(self):
        self.must_match(trained_hsdp, 0)


def accumulated(num_microbatches: int, wrap: str) -> tuple[dict[str, Tensor], int, int]:
    """Step with one large batch or its parts.

    Returns the parameters, and the numbers of matrices that this rank and all ranks orthogonalize.
    """
    with installed(), counting() as count:
        model: nn.Module = TinyTransformer(DIM, LAYERS)
        model = fsdp1(model) if wrap == "fsdp1" else fully_shard(model)
        config = create_auto_config(fsdp_process_group=dist.group.WORLD)
        optimizer = Muon(
            model.named_parameters(),
            lr=LR,
            distributed_config=config,
            ns_dtype=torch.float32,
            # "auto" would let all ranks orthogonalize such small matrices
            strategy="owned",
        )
        for part in batch(0, 32, 12, DIM).chunk(num_microbatches):
            model(part).square().sum().backward()
        optimizer.step()
    return full_params_of(model), count.num_matrices, optimizer.plan.cost.num_matrices


class TestGradientAccumulation:
    @pytest.mark.P1
    @pytest.mark.parametrize("wrap", ["fsdp1", "fsdp2"])
    def test_grad_accumulation_matches_single_batch(self, wrap):
        large = run_processes(4, accumulated, 1, wrap)
        small = run_processes(4, accumulated, 4, wrap)
        for (expected, *_), (params, *_) in zip(large, small, strict=True):
            assert differences(params, expected, 1e-5) == []
        assert sum(num_local for _, num_local, _ in small) == small[0][2] == 6 * LAYERS


def train_with_trace(
    async_gpu_parallelism: bool, folder: str
) -> tuple[list[Any], dict[str, Tensor]]:
    model = fsdp1(TinyTransformer(DIM, LAYERS))
    config = create_auto_config(
        fsdp_process_group=dist.group.WORLD,
        async_gpu_parallelism=async_gpu_parallelism,
        prefetch_count=int(async_gpu_parallelism),
    )
    optimizer = Muon(
        model.named_parameters(), lr=LR, distributed_config=config, bucket_mb=4e-3, trace=True
    )
    train(model, optimizer, 3)
    assert optimizer.trace is not None
    optimizer.trace.save(Path(folder) / f"rank{dist.get_rank()}.json")
    sequential = "ranks orthogonalize one after the other" in str(optimizer.plan)
    assert sequential != async_gpu_parallelism
    return optimizer.trace.spans, full_params_of(model)


class TestDebugMode:
    @pytest.mark.P0
    def test_sequential_execution(self, tmp_path):
        """No rank orthogonalizes before the previous rank has finished.

        The document compares calls of step(). With collectives inside, no rank can end a call
        before another begins it. Only the computation can run one rank after the other.
        """
        ranks = [spans for spans, _ in run_processes(4, train_with_trace, False, str(tmp_path))]
        for spans in ranks:
            assert {span.phase for span in spans} == {*Phase} - {Phase.PASS_ON}  # no second hop
            assert [span.step for span in spans] == sorted(span.step for span in spans)
        computes = [s for spans in ranks for s in spans if s.phase is Phase.ORTHOGONALIZE]
        num_buckets = len({span.bucket for span in computes})
        assert num_buckets > 1
        assert len(computes) == 3 * 4 * num_buckets
        for before, after in pairwise(sorted(computes, key=lambda s: s.start)):
            assert before.stop <= after.start
            if (before.step, before.bucket) == (after.step, after.bucket):
                assert before.rank < after.rank

    @pytest.mark.P1
    def test_the_trace_is_chrome_s(self, tmp_path):
        spans = run_processes(4, train_with_trace, True, str(tmp_path))[2][0]
        events = json.loads((tmp_path / "rank2.json").read_text())["traceEvents"]
        assert len(events) == len(spans) > 0
        assert {event["ph"] for event in events} == {"X"}
        assert {event["pid"] for event in events} == {2}
        assert all(event["dur"] >= 0 for event in events)
        assert {"unshard 0", "orthogonalize 0", "apply 0"} <= {event["name"] for event in events}

    @pytest.mark.P0
    def test_parallel_vs_sequential_same_result(self, tmp_path):
        parallel = run_processes(4, train_with_trace, True, str(tmp_path))
        sequential = run_processes(4, train_with_trace, False, str(tmp_path))
        for (_, params), (_, expected) in zip(parallel, sequential, strict=True):
            assert differences(params, expected, 0) == []


def error_of(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def overlapping_fsdp_tp() -> str:
    fsdp_pg = dist.new_group([0, 1, 2, 3])
    tp_pg = dist.new_group([0, 1, 2, 3])
    return error_of(lambda: create_auto_config(fsdp_process_group=fsdp_pg, tp_process_group=tp_pg))


def invalid_stages() -> list[str]:
    return [
        error_of(
            lambda stage, stages: create_auto_config(
                pp_process_group=dist.group.WORLD, pp_stage_id=stage, pp_num_stages=stages
            ),
            *pair,
        )
        for pair in [(4, 4), (-1, 4), (0, None), (None, 4)]
    ]


def groups_without_this_rank() -> str:
    pair = dist.new_group([0, 1])
    return error_of(lambda: create_auto_config(fsdp_process_group=pair))


def no_grid() -> str:
    """Each rank's two groups share only this rank, but those of all ranks do not form a grid."""
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = {0: [0, 2], 2: [0, 2], 1: [1, 3], 3: [1, 3]}
    twisted = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    straight = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    rank = dist.get_rank()
    assert rank in columns[rank]
    good = create_auto_config(
        fsdp_process_group=straight[rank % 2], tp_process_group=rows[rank // 2]
    )
    assert good.plain_rule is not None
    return error_of(
        lambda: create_auto_config(
            fsdp_process_group=twisted[int(rank in (1, 2))], tp_process_group=rows[rank // 2]
        )
    )


def foreign_mesh() -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Replicate()]))
    too_small = create_devicemesh_config(mesh["tp"])
    return (
        error_of(lambda: Muon([("w", weight)], distributed_config=too_small)),
        error_of(lambda: create_devicemesh_config(mesh, ["dp", "ep"])),
    )


class TestProcessGroupValidation:
    """Every rank raises ValueError."""

    @pytest.mark.P0
    def test_reject_overlapping_fsdp_tp(self):
        for text in run_processes(4, overlapping_fsdp_tp):
            assert "both hold ranks [0, 1, 2, 3]" in text
            assert "Make them from one DeviceMesh" in text

    @pytest.mark.P0
    def test_reject_invalid_pp_stage_id(self):
        for beyond, negative, no_count, no_id in run_processes(4, invalid_stages):
            assert "from 0 to pp_num_stages - 1 = 3, got 4" in beyond
            assert "got -1" in negative
            assert no_count == no_id == "pass pp_stage_id and pp_num_stages together"

    @pytest.mark.P1
    def test_reject_a_group_without_this_rank(self):
        first, second, *other_ranks = run_processes(4, groups_without_this_rank)
        assert first == second == ""
        for rank, text in enumerate(other_ranks, 2):
            assert f"fsdp_process_group does not contain rank {rank}" in text

    @pytest.mark.P1
    def test_reject_groups_that_do_not_form_a_grid(self):
        for text in run_processes(4, no_grid):
            assert "do not form a grid" in text

    @pytest.mark.P1
    def test_reject_meshes_that_do_not_fit(self):
        for outside, unknown in run_processes(4, foreign_mesh):
            assert "w lives on mesh (dp=2, tp=2)" in outside
            assert "['ep'] are not on the mesh" in unknown
