"""Steps on a device that does not exist: fails at every read of a value by the host.

Run as a program, for it registers the device in its process. Prints one JSON line: per case, the
operators of the third step with their counts.
"""

import collections
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dtensor import Muon, clip_grad_norm_
from muon_dtensor.qk_clip import QKClip, multi_head
from muon_dtensor.runtime.consistency import Agreement
from muon_dtensor.runtime.consistency_codec import Comparison
from muon_dtensor.runtime.torch_private import HostCopy, fake_process_group, with_shard

DEVICE = "toy"
IS_AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this release of torch can register a device in Python."""

NUM_MATRICES = 16
FREE = (
    "prim.",
    "profiler.",
    "aten.detach",
    "aten.view",
    "aten.slice",
    "aten.select",
    "aten.expand",
)
FREE += (
    "aten.transpose",
    "aten.unbind",
    "aten.unsqueeze",
    "aten.empty",
    "aten.new_empty",
    "aten.t.",
)
"""Operators that launch no kernel."""


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel. Matrices may be multiplied on the device only."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not name.startswith(FREE):
            self.counts[name] += 1
        if "mm." in name and args[0].device.type != DEVICE:
            raise AssertionError(f"{name} on {args[0].device}")
        return func(*args, **(kwargs or {}))


@contextmanager
def allowed_reads() -> Iterator[None]:
    """Patch what the host may read: the copy that the step before has queued, here "no fault".

    And the comparison of plans in a first step, which waits by design, and pinned memory, which
    fake tensors do not have.
    """
    with (
        mock.patch.object(HostCopy, "tolist", return_value=[[0, 0]]),
        mock.patch.object(Agreement, "compare_plans"),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield


def parameters(rows: int = 64) -> list[tuple[str, Tensor]]:
    return [
        (f"w{i}", nn.Parameter(torch.empty(rows, 32, device=DEVICE))) for i in range(NUM_MATRICES)
    ]


def groups(params: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:], "algorithm": "adamw"}]


def on_mesh(mesh: DeviceMesh) -> list[tuple[str, Tensor]]:
    """DTensors of FSDP x TP on four ranks, of which this process is the first."""
    return [
        (
            f"w{i}",
            nn.Parameter(DTensor.from_local(torch.empty(16, 32, device=DEVICE), mesh, placements)),
        )
        for i, placements in enumerate([(Shard(0), Shard(0)), (Replicate(), Shard(0))] * 4)
    ]


def on_hosts(mesh: DeviceMesh) -> list[tuple[str, Tensor]]:
    """The same DTensors with shards on the host, as by FSDP2's CPUOffloadPolicy."""
    return [
        (name, nn.Parameter(with_shard(param.detach(), torch.empty(16, 32))))
        for name, param in on_mesh(mesh)
    ]


def step_counts(
    params: list[Any], before_step: Callable[[Muon], object] | None = None, **options: Any
) -> dict[str, int]:
    """Take three steps; return the launches of the last one."""
    has_mesh = any(isinstance(param, tuple) and isinstance(param[1], DTensor) for param in params)
    # a DeviceMesh holds its ranks in a tensor, which must be real
    with unset_fake_temporarily() if has_mesh else nullcontext():
        optimizer = Muon(params, lr=0.02, **options)
    # a first step reads the comparison of the plans, by design
    optimizer._planned_step.gradient_check._has_settled = True
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.empty_like(param)
        if before_step is not None:
            before_step(optimizer)
        with Launches() as launches:
            optimizer.step()
    return dict(launches.counts)


def clip(optimizer: Muon) -> object:
    return clip_grad_norm_(optimizer, 1.0, algorithm="adamw")


def lr_on_device(optimizer: Muon) -> None:
    """The constructor reads a tensor's value to check it; a step does not."""
    optimizer.param_groups[0]["lr"] = torch.empty((), device=DEVICE)


def not_measured(optimizer: Muon) -> None:
    """A measured step waits for its metrics; those between do not."""
    optimizer._num_steps = 1


def offloaded(params: list[tuple[str, Tensor]], **options: Any) -> dict[str, int]:
    """`step_counts` of `on_hosts`: the host waits for the checks of gradients, by design."""
    nothing_wrong = Comparison(frozenset(), non_finite=False, moved=False)
    options |= {"check_replicas": False, "nonfinite": "propagate"}
    with mock.patch.object(Agreement, "settle", return_value=nothing_wrong):
        return step_counts(params, **options)


def qk_clipped(params: list[tuple[str, Tensor]]) -> dict[str, int]:
    (_, query), (_, key), *_ = params
    hook = QKClip([multi_head(query, key, 16)])

    def observe(optimizer: Muon) -> None:
        if not optimizer._optimizer_step_post_hooks:
            optimizer.register_step_post_hook(hook)
        hook.observe(0, torch.empty(4, device=DEVICE))

    return step_counts(params, observe)


Case = Callable[[], dict[str, int]]

CASES: dict[str, Case] = {
    "default": lambda: step_counts(parameters()),
    "one by one": lambda: step_counts(parameters(), batched=False),
    "skip": lambda: step_counts(parameters(), nonfinite="skip"),
    "propagate": lambda: step_counts(parameters(), nonfinite="propagate"),
    "adamw": lambda: step_counts(groups(parameters())),
    "clipped": lambda: step_counts(groups(parameters()), clip),
    "normuon": lambda: step_counts(parameters(), normuon_beta=0.95),
    "cautious": lambda: step_counts(parameters(), cautious_weight_decay=True),
    "momentum in bfloat16": lambda: step_counts(parameters(), momentum_dtype=torch.bfloat16),
    "capturable": lambda: step_counts(parameters(), lr_on_device, capturable=True),
    "offloaded": lambda: step_counts(parameters(), offload_momentum=True),
    "measured": lambda: step_counts(parameters(), not_measured, metrics_every=100),
    "qk-clip": lambda: qk_clipped(parameters()),
    "polar express": lambda: step_counts(parameters(), orthogonalizer="polar_express"),
}


def cases_on(mesh: Any) -> dict[str, Case]:
    return {
        "offloaded weights": lambda: offloaded(on_hosts(mesh)),
        "offloaded weights, small buckets": lambda: offloaded(on_hosts(mesh), bucket_mb=1e-3),
        "offloaded weights, in teams": lambda: offloaded(
            on_hosts(mesh), strategy="distributed", exact=False
        ),
        "fsdp x tp": lambda: step_counts(on_mesh(mesh), check_replicas=False),
        "fsdp x tp, staged": lambda: step_counts(
            on_mesh(mesh), check_replicas=False, strategy="owned_staged"
        ),
        "fsdp x tp, in teams": lambda: step_counts(
            on_mesh(mesh), check_replicas=False, strategy="distributed", exact=False
        ),
        "fsdp x tp, cautious": lambda: step_counts(
            on_mesh(mesh), check_replicas=False, cautious_weight_decay=True
        ),
    }


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    counts = {}
    with fake_process_group(4), allowed_reads():
        mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
        with FakeTensorMode():
            for name, case in (CASES | cases_on(mesh)).items():
                try:
                    counts[name] = case()
                except Exception as error:
                    raise RuntimeError(f"case {name!r}") from error
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
