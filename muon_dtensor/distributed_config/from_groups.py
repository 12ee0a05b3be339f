"""Factories of `DistributedConfig` from process groups, for frameworks without DeviceMesh.

They convert the groups into a mesh and a rule for the layouts of plain tensors.
"""

from collections.abc import Mapping

from torch.distributed import ProcessGroup

from muon_dtensor.distributed_config.assignment import AssignFn
from muon_dtensor.distributed_config.config import (
    DistributedConfig,
    GatherFn,
    RedistributeFn,
    base_state,
)
from muon_dtensor.distributed_config.manual_transport import (
    assign_by_index,
    assign_by_rank,
    cut_local_shard,
    gather_to_all,
    gather_to_one,
    scatter_from_one,
)
from muon_dtensor.distributed_config.mesh_from_groups import check_groups, mesh_of_groups
from muon_dtensor.runtime.plain_tensors import PlainLayoutRule, TensorDim
from muon_dtensor.runtime.torch_private import ordinary_mode


@ordinary_mode()
def create_processgroup_config(
    *,
    fsdp_pg: ProcessGroup | None = None,
    tp_pg: ProcessGroup | None = None,
    dp_pg: ProcessGroup | None = None,
    ep_pg: ProcessGroup | None = None,
    cp_pg: ProcessGroup | None = None,
    pp_pg: ProcessGroup | None = None,
    fsdp_shard_dim: TensorDim = 0,
    tp_shard_dim: TensorDim = None,
    async_gpu_parallelism: bool = True,
    prefetch_count: int = 1,
) -> DistributedConfig:
    """Return a config for plain tensors that are shards or replicas over process groups.

    DTensors keep their own placements. The layouts of slices of FSDP1's flat parameters are read
    from FSDP1. All ranks of the groups must call this together, and make all such configs in the
    same order. When called directly, `gather_fn(t, dst_rank, state)` returns the full tensor on
    `dst_rank` and None on other ranks; `redistribute_fn(full_tensor_or_None, src_rank, state)`
    returns each rank's shard.

    Args:
        fsdp_pg: the group over which parameters are cut along `fsdp_shard_dim`, in pieces of any
            sizes.
        tp_pg: the group over which they are cut along `tp_shard_dim`, before `fsdp_pg` cuts them.
        dp_pg: a group over which they are replicated. Its ranks share the work.
        cp_pg: the same for context parallelism.
        ep_pg: a group whose ranks hold different experts. Each rank steps its own.
        pp_pg: a group whose ranks hold different pipeline stages. Each rank steps its own.
        fsdp_shard_dim: one tensor dim for all parameters; or one for each, as a list in the order
            of the optimizer's parameters, or as a dict by name, where None means replicated over
            the group. If the argument itself is None, the dims are unknown and plain tensors raise
            PlanError.
        tp_shard_dim: the same for `tp_pg`.
        async_gpu_parallelism: see DistributedConfig.
        prefetch_count: see DistributedConfig.

    Raises:
        ValueError: a group does not contain this rank, groups are not orthogonal, or the groups of
            all ranks do not form a grid.
    """
    return _config(
        {
            "dp": ("dp_pg", dp_pg),
            "fsdp": ("fsdp_pg", fsdp_pg),
            "cp": ("cp_pg", cp_pg),
            "tp": ("tp_pg", tp_pg),
        },
        {"ep_pg": ep_pg, "pp_pg": pp_pg},
        {"tp": tp_shard_dim, "fsdp": fsdp_shard_dim},
        (assign_by_index, gather_to_one, scatter_from_one),
        async_gpu_parallelism=async_gpu_parallelism,
        prefetch_count=prefetch_count,
    )


@ordinary_mode()
def create_auto_config(
    *,
    fsdp_process_group: ProcessGroup | None = None,
    tp_process_group: ProcessGroup | None = None,
    tp_shard_dim: TensorDim = None,
    shard_process_group: ProcessGroup | None = None,
    replicate_process_group: ProcessGroup | None = None,
    cp_process_group: ProcessGroup | None = None,
    ddp_process_group: ProcessGroup | None = None,
    ep_process_group: ProcessGroup | None = None,
    pp_process_group: ProcessGroup | None = None,
    pp_stage_id: int | None = None,
    pp_num_stages: int | None = None,
    fsdp_shard_dim: TensorDim = None,
    async_gpu_parallelism: bool = True,
    prefetch_count: int = 1,
) -> DistributedConfig:
    """Return a config for models under FSDP1, HYBRID_SHARD or DDP, or with plain shards.

    DTensors keep their own placements. The layouts of slices of FSDP1's flat parameters are read
    from FSDP1. All ranks of the groups must call this together, and make all such configs in the
    same order. When called directly, `assign_fn` returns `{rank: [index, ...]}`, `gather_fn`
    returns the full tensor on every rank, and `redistribute_fn` cuts this rank's shard out of it.

    Args:
        fsdp_process_group: the group over which parameters are cut.
        shard_process_group: the same group under HYBRID_SHARD. Pass at most one of the two.
        tp_process_group: the group over which they are cut along `tp_shard_dim`, before FSDP cuts
            them.
        tp_shard_dim: one tensor dim for all parameters; or one for each, as a list in the order of
            the optimizer's parameters, or as a dict by name, where None means replicated over the
            group.
        replicate_process_group: a group over which they are replicated. Its ranks share the work.
        ddp_process_group: the same under DDP.
        cp_process_group: the same for context parallelism.
        ep_process_group: a group whose ranks hold different experts. Each rank steps its own.
        pp_process_group: a group whose ranks hold different pipeline stages. Each rank steps its
            own.
        pp_stage_id: checked, and stored in `state`.
        pp_num_stages: checked, and stored in `state`.
        fsdp_shard_dim: as `tp_shard_dim`, for plain tensors that FSDP1 has not flattened. The
            optimizer needs it for these. `gather_fn` and `redistribute_fn`, called directly, use
            the last tensor dim without it.
        async_gpu_parallelism: see DistributedConfig.
        prefetch_count: see DistributedConfig.

    Raises:
        ValueError: a group does not contain this rank, groups are not orthogonal, the groups of all
            ranks do not form a grid, or the stage does not exist.
    """
    if fsdp_process_group is not None and shard_process_group is not None:
        raise ValueError(
            "fsdp_process_group and shard_process_group have the same meaning: pass only one"
        )
    if (pp_stage_id is None) != (pp_num_stages is None):
        raise ValueError("pass pp_stage_id and pp_num_stages together")
    if pp_num_stages is not None and pp_stage_id not in range(pp_num_stages):
        raise ValueError(
            f"pp_stage_id must be from 0 to pp_num_stages - 1 = {pp_num_stages - 1}, got "
            f"{pp_stage_id}"
        )
    config = _config(
        {
            "ddp": ("ddp_process_group", ddp_process_group),
            "replicate": ("replicate_process_group", replicate_process_group),
            "shard": ("shard_process_group", shard_process_group),
            "fsdp": ("fsdp_process_group", fsdp_process_group),
            "cp": ("cp_process_group", cp_process_group),
            "tp": ("tp_process_group", tp_process_group),
        },
        {"ep_process_group": ep_process_group, "pp_process_group": pp_process_group},
        {"tp": tp_shard_dim, "shard": fsdp_shard_dim, "fsdp": fsdp_shard_dim},
        (assign_by_rank, gather_to_all, cut_local_shard),
        async_gpu_parallelism=async_gpu_parallelism,
        prefetch_count=prefetch_count,
    )
    if pp_stage_id is not None:
        config.state |= {"pp_stage_id": pp_stage_id, "pp_num_stages": pp_num_stages}
    return config


def _config(
    roles: Mapping[str, tuple[str, ProcessGroup | None]],
    apart: Mapping[str, ProcessGroup | None],
    shard_dims: Mapping[str, TensorDim],
    functions: tuple[AssignFn, GatherFn, RedistributeFn],
    *,
    async_gpu_parallelism: bool,
    prefetch_count: int,
) -> DistributedConfig:
    """Return a config from checked groups.

    `roles`: mesh dims, outermost first, with the keyword and group of each. `apart`: keywords and
    groups whose ranks hold different parameters. `shard_dims`: tensor dims of the roles that cut,
    outermost cut first.
    """
    for role, tensor_dims in shard_dims.items():
        _check_tensor_dims("tp_shard_dim" if role == "tp" else "fsdp_shard_dim", tensor_dims)
    passed_groups = {
        word: group for word, group in (*roles.values(), *apart.items()) if group is not None
    }
    checked = check_groups(passed_groups)
    dims = {role: checked[word] for role, (word, _) in roles.items() if word in checked}
    rule = None
    if dims:
        cuts = tuple((role, shard_dims[role]) for role in shard_dims if role in dims)
        rule = PlainLayoutRule(mesh_of_groups(dims), cuts)
    state = {**base_state(rule), **checked}
    return DistributedConfig(*functions, state, async_gpu_parallelism, prefetch_count)


def _check_tensor_dims(keyword: str, tensor_dims: object) -> None:
    """Raise ValueError unless the value gives tensor dims."""
    if isinstance(tensor_dims, Mapping):
        values, is_right = list(tensor_dims.values()), all(isinstance(n, str) for n in tensor_dims)
    elif isinstance(tensor_dims, (list, tuple)):
        values, is_right = list(tensor_dims), True
    else:
        values, is_right = [tensor_dims], True
    if not is_right or any(type(value) is not int and value is not None for value in values):
        raise ValueError(
            f"{keyword} must be a tensor dim, one per parameter, or {{name: dim or None}}, got "
            f"{tensor_dims!r}"
        )
