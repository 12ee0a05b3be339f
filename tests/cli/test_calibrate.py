"""`muon-dtensor calibrate`: the fit, the measurement on gloo processes, and bad input."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from muon_dtensor.cli import calibrate_worker
from muon_dtensor.cli.calibrate import calibrate
from muon_dtensor.cli.calibrate_worker import fitted, measured_topology, with_overheads
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.report import plan_report
from muon_dtensor.planning.simulate import simulate
from muon_dtensor.planning.topology import Topology
from muon_dtensor.planning.traffic import plan_traffic
from tests.support.pool import run_processes


def test_a_link_is_fitted_from_readings():
    latency, per_byte = 2e-4, 1e-9
    readings = [(3, n, 3 * latency + n * per_byte) for n in (1 << 10, 1 << 15, 1 << 20, 1 << 24)]
    assert fitted(readings) == pytest.approx((latency, per_byte), rel=0.05)


def test_a_link_fitted_to_noise_is_not_negative():
    """Seconds decrease as bytes grow, as they may on a busy machine."""
    latency, per_byte = fitted([(3, 1 << 10, 2e-3), (3, 1 << 15, 1e-3), (3, 1 << 24, 5e-4)])
    assert latency >= 0
    assert per_byte > 0


def test_fitted_overheads_reproduce_the_measured_steps():
    topology = PRESETS["gloo-local"]
    mesh = MeshSpec.of(all=4)
    layout = Layout(mesh, (32, 32), (("all",), ()))
    matrices = matrices_of((32, 32))
    steps = {}
    for num in calibrate_worker.STEP_NUMS:
        specs = [ParamSpec(f"w{i}", layout, "float32", matrices) for i in range(num)]
        plan = plan_update(specs, PlanOptions(strategy="owned", topology=topology))
        steps[num] = (plan, simulate(plan, plan_traffic(plan)).seconds)
    calibrated = with_overheads(replace(topology, tensor_overhead=1.0, step_overhead=1.0), steps)
    assert calibrated.tensor_overhead == pytest.approx(topology.tensor_overhead, rel=1e-3)
    assert calibrated.step_overhead == pytest.approx(topology.step_overhead, rel=1e-3)


def measure_quickly() -> str:
    with mock.patch.multiple(
        calibrate_worker,
        ROUNDS=2,
        SIDES={"cpu": (16, 192)},
        NBYTES=(1 << 10, 1 << 20),
        RING_NUMELS=(1 << 12,),
    ):
        return measured_topology("test-machine", torch.device("cpu")).to_json()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_measure_one_topology(num_ranks):
    """All ranks return the same values; JSON preserves them. A single rank has no link."""
    texts = run_processes(num_ranks, measure_quickly)
    assert len(set(texts)) == 1
    topology = Topology.from_json(texts[0])
    assert topology.name == "test-machine"
    assert topology.cores is not None
    assert 0 < topology.cores <= num_ranks
    assert topology.node_size == num_ranks
    for _, rates in topology.matmul:
        assert [side for side, _ in rates] == [16, 192]
        assert all(1e6 < rate < 1e14 for _, rate in rates)
    assert 1e7 < topology.memory_bandwidth < 1e13
    assert math.isfinite(topology.ring_factor)


def test_bad_flags_are_reported_on_one_line(tmp_path, capsys):
    assert calibrate(ranks=0) == 2
    assert calibrate(out=tmp_path / "nowhere" / "topology.json") == 2
    assert calibrate(out=tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "--ranks must be 1 or more" in errors[0]
    assert "in a folder that does not exist" in errors[1]


@pytest.mark.slow
def test_the_command_writes_a_topology_file_for_plans(tmp_path, capfd):
    out = tmp_path / "test-machine.json"
    assert calibrate(ranks=2, out=out) == 0
    assert "test-machine" in capfd.readouterr().out
    topology = Topology.from_json(out.read_text())
    assert topology.name == "test-machine"
    layout = Layout(MeshSpec.of(dp=2), (64, 64), (("dp",), ()))
    spec = ParamSpec("w", layout, "float32", matrices_of((64, 64)))
    assert plan_report([spec], PlanOptions(topology=topology)).prediction.seconds > 0
