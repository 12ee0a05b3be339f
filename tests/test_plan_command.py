"""`muon-dtensor plan` and topologies: readable, fast, and one line for bad input."""

import json
import subprocess
import sys
from time import process_time

import pytest

from muon_dtensor.cli.models import MODELS, specs_of
from muon_dtensor.cli.plan import mesh_of, plan
from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.presets import PRESETS, topology_of
from muon_dtensor.planning.topology import Link, Topology

BILLIONS = {
    # published totals without embeddings and output heads, which are AdamW's
    "gpt2": 0.085,  # 12 x 12 x 768^2
    "llama3-8b": 8.03 - 2 * 128256 * 4096 / 1e9,
    "llama3-70b": 70.6 - 2 * 128256 * 8192 / 1e9,
    "llama3-405b": 405.9 - 2 * 128256 * 16384 / 1e9,
    "deepseek-v3": 671.0 - 2 * 129280 * 7168 / 1e9,
    "kimi-k2": 1026.4 - 2 * 163840 * 7168 / 1e9,
}


@pytest.mark.parametrize("model", MODELS)
def test_the_shapes_add_up_to_the_published_sizes(model):
    specs = specs_of(model, MeshSpec.of(dp_shard=1))
    numel = sum(matrix.numel for spec in specs for matrix in spec.matrices)
    assert numel / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)


def test_experts_are_cut_by_ep_and_whole_where_that_is_all():
    mesh = MeshSpec.of(dp_replicate=2, ep=8)
    specs = {spec.fqn: spec for spec in specs_of("deepseek-v3", mesh)}
    layout = specs["layers.5.moe.experts.w1.weight"].layout
    assert layout.cuts == (("ep",), (), ())
    assert specs["layers.0.feed_forward.w2.weight"].layout.replica_dims == ("dp_replicate", "ep")


def test_a_plan_of_405b_takes_seconds(capsys):
    start = process_time()
    assert plan("llama3-405b", "dp_replicate=8,dp_shard=128,tp=8", "h100-ib-400") == 0
    assert process_time() - start < 15
    text = capsys.readouterr().out
    for told in ("882", "8192 ranks", "the bound", "predicted", "instead of gathered", "digest"):
        assert told in text
    assert max(map(len, text.splitlines())) <= 150


def test_explain_json_and_diff(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert plan("gpt2", "dp_shard=4", explain="layers.0.attn.c_attn.weight", json=first) == 0
    assert "orthogonalizes it" in capsys.readouterr().out
    assert plan("gpt2", "dp_shard=8", json=second) == 0
    capsys.readouterr()
    assert plan(diff=(first, first)) == 0
    assert "equal" in capsys.readouterr().out
    assert plan(diff=(first, second)) == 1
    assert "-mesh (dp_shard=4): 48 matrices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"model": "llama9"}, "no model 'llama9'"),
        ({"mesh": "dp_shard"}, "--mesh is dim=size"),
        ({"mesh": "dp_shard=0"}, "--mesh is dim=size"),
        ({"mesh": "tp=2,tp=2"}, "--mesh is dim=size"),
        ({"mesh": "banana=2"}, "no mesh dims banana"),
        ({"mesh": "dp_shard=99999999"}, "plans are made for up to"),
        ({"topology": "h900"}, "no topology 'h900'"),
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"strategy": "gram"}, "exact=False"),
        ({"explain": "layers.0.atention.wq.weight"}, "is it 'layers.0.attention.wq.weight'?"),
    ],
    ids=str,
)
def test_bad_input_is_told_on_one_line(arguments, told, capsys):
    assert plan(**arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def without(name):
    def change(values):
        del values[name]

    return change


def with_value(name, value):
    def change(values):
        values[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("memory_bandwidth"), "has no memory_bandwidth"),
        (without("format"), "format None"),
        (with_value("memory_bandwidth", -1.0), "memory_bandwidth is above 0"),
        (with_value("tensor_overhead", -1e-6), "tensor_overhead is 0 or more"),
        (
            with_value("within_node", {"latency": -1, "bandwidth": 1}),
            "within_node: a link's latency",
        ),
        (with_value("within_node", {"latency": 1}), "within_node has latency"),
        (with_value("between_nodes", {"latency": 0, "bandwidth": 0}), "bandwidth is above 0"),
        (with_value("matmul", {"bfloat16": [[64, 1e9]]}), "bfloat16 and float32"),
        (with_value("matmul", {"bfloat16": [], "float32": []}), "list of [short side"),
        (with_value("matmul", [1]), "matmul is an object"),
        (with_value("node_size", 0), "node_size is an integer"),
        (with_value("cores", -2), "cores is above 0"),
        (with_value("speed", 1), "a topology has no speed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_topology_file_with_wrong_values_is_refused(tmp_path, change, told, capsys):
    values = json.loads(PRESETS["h200"].to_json())
    change(values)
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(values))
    assert plan("gpt2", "dp_shard=2", str(path)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_topologies_pass_through_json(tmp_path, name):
    path = tmp_path / "topology.json"
    path.write_text(PRESETS[name].to_json())
    assert topology_of(path) == PRESETS[name]


def test_collectives_cost_what_their_formulas_say():
    slow, fast = Link(1e-3, 1e6), Link(1e-6, 1e9)
    rates = ((1, 1e9),)
    topology = Topology("t", 2, fast, slow, (("bfloat16", rates), ("float32", rates)), 1e9)
    pair, four = MeshSpec.of(a=2), MeshSpec.of(a=4)
    assert topology.all_to_all_seconds(pair, ("a",), 1000) == pytest.approx(1e-6 + 1e-6)
    # one peer on the node, two beyond, which get two thirds of the bytes
    assert topology.all_to_all_seconds(four, ("a",), 3000) == pytest.approx(2.001e-3 + 2e-3)
    assert topology.all_gather_seconds(four, ("a",), 1000) == pytest.approx(3 * 2e-3)
    assert topology.all_reduce_seconds(four, ("a",), 4000) == pytest.approx(6 * 2e-3)


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "muon_dtensor.cli.main", "plan", "--model", "gpt2"]
    run = subprocess.run(
        [*command, "--mesh", "dp_shard=2,tp=2"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert "48 matrices" in run.stdout
    run = subprocess.run([*command, "--mesh", "x"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1)
    assert mesh_of("a=2, b=3").shape == (2, 3)
