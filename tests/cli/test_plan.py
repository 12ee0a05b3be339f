"""`muon-dtensor plan` and topologies: output, speed, and one-line errors for bad input."""

import json
import sys
from math import prod
from pathlib import Path
from time import process_time

import pytest
from matplotlib import image

from muon_dtensor.cli.baseline_costs import METHODS, method_cost
from muon_dtensor.cli.models import MODELS, specs_of
from muon_dtensor.cli.plan import bits_per_second, plan, sizes_of
from muon_dtensor.cli.plan_plot import plotted_ranks
from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.memory import state_nbytes
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.presets import PRESETS, topology_of
from muon_dtensor.planning.report import plan_report
from muon_dtensor.planning.topology import Link, Topology
from muon_dtensor.planning.traffic import link_nbytes
from tests.support.deadlines import run_program

BILLIONS = {
    # published totals without embeddings and output heads, which AdamW steps
    "gpt2": 0.085,  # 12 x 12 x 768^2
    "llama3-8b": 8.03 - 2 * 128256 * 4096 / 1e9,
    "llama3-70b": 70.6 - 2 * 128256 * 8192 / 1e9,
    "llama3-405b": 405.9 - 2 * 128256 * 16384 / 1e9,
    "deepseek-v3": 671.0 - 2 * 129280 * 7168 / 1e9,
    "kimi-k2": 1026.4 - 2 * 163840 * 7168 / 1e9,
    "gpt-oss-20b": 20.91 - 2 * 201088 * 2880 / 1e9,
    "gpt-oss-120b": 116.83 - 2 * 201088 * 2880 / 1e9,
}


@pytest.mark.parametrize("model", MODELS)
def test_the_shapes_add_up_to_the_published_sizes(model):
    specs = specs_of(model, {"dp_shard": 1})
    numel = sum(matrix.numel for spec in specs for matrix in spec.matrices)
    assert numel / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)


def test_ep_is_a_part_of_the_other_mesh_dims():
    """As in torchtitan: dense weights over dp_shard, experts over ep and then what it leaves."""
    specs = {spec.fqn: spec for spec in specs_of("deepseek-v3", {"dp_shard": 256, "ep": 8})}
    dense, experts = (
        specs[f"layers.5.{name}.weight"].layout for name in ("attention.wo", "moe.experts.w1")
    )
    assert (dense.mesh.sizes, dense.cuts) == ({"dp_shard": 256}, (("dp_shard",), ()))
    assert experts.mesh.sizes == {"efsdp": 32, "ep": 8}
    assert experts.cuts == (("ep", "efsdp"), (), ())
    assert experts.mesh.ranks == dense.mesh.ranks
    (specs,) = (
        [s for s in specs_of("kimi-k2", {"dp_shard": 512, "ep": 64}) if "experts.w1" in s.fqn],
    )
    assert specs[0].layout.cuts == (("ep",), ("efsdp",), ())  # 384 experts on 512 ranks
    sizes = {"dp_replicate": 2, "dp_shard": 8, "tp": 4, "ep": 16}
    specs = {spec.fqn: spec for spec in specs_of("deepseek-v3", sizes)}
    layout = specs["layers.5.moe.experts.w2.weight"].layout
    assert layout.mesh.sizes == {"dp_replicate": 2, "efsdp": 2, "ep": 16}
    assert layout.replica_dims == ("dp_replicate",)
    assert specs["layers.5.attention.wo.weight"].layout.cuts == (("dp_shard",), ("tp",))


def test_every_rank_has_experts_to_orthogonalize():
    """The layout in which only ep's ranks have experts used 11 % of the ranks."""
    report = plan_report(specs_of("gpt-oss-120b", {"dp_shard": 64, "ep": 8}))
    assert report.cost.makespan < 1.25
    assert report.cost.total_nbytes == report.cost.bound_nbytes


def test_stages_divide_the_layers():
    specs = specs_of("llama3-8b", {"pp": 3, "dp_shard": 4, "tp": 2})
    layers = {spec.layout.mesh.ranks[0]: [] for spec in specs}
    for spec in specs:
        layers[spec.layout.mesh.ranks[0]].append(int(spec.fqn.split(".")[1]))
    assert {first: (min(n), max(n)) for first, n in layers.items()} == {
        0: (0, 9),
        8: (10, 20),
        16: (21, 31),
    }
    assert plan_report(specs).cost.ranks == tuple(range(24))


@pytest.mark.parametrize(
    ("model", "recognize", "counts"),
    [
        ("llama3-8b", "heads", {"attention.wq": 32, "attention.wo": 32, "feed_forward.w1": 1}),
        ("llama3-8b", "projections", {"attention.wq": 1}),
        ("deepseek-v3", "projections", {"attention.wkv_a": 2, "attention.wkv_b": 2}),
        ("deepseek-v3", "heads", {"attention.wkv_b": 256, "attention.wq_b": 128}),
        ("gpt-oss-20b", "projections", {"mlp.experts.gate_up_proj": 64, "self_attn.q_proj": 1}),
        ("gpt-oss-20b", None, {"mlp.experts.gate_up_proj": 32}),
    ],
)
def test_recognized_matrices(model, recognize, counts, capsys):
    specs = specs_of(model, {"dp_shard": 64}, recognize=recognize)
    for name, count in counts.items():
        (spec,) = [s for s in specs if s.fqn == f"layers.3.{name}.weight"]
        assert len(spec.matrices) == count
    if model != "deepseek-v3":
        assert plan(model, "dp_shard=8", recognize=recognize) == 0
        assert "x the bound" in capsys.readouterr().out


def test_a_plan_of_405b_takes_seconds(capsys):
    start = process_time()
    assert plan("llama3-405b", "dp_replicate=8,dp_shard=128,tp=8", "h100-ib-400") == 0
    assert process_time() - start < 15
    text = capsys.readouterr().out
    for words in ("882", "8192 ranks", "the bound", "predicted", "instead of owned", "digest"):
        assert words in text
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
    ("arguments", "message"),
    [
        ({"model": "llama9"}, "no model 'llama9'"),
        ({"mesh": "dp_shard"}, "--mesh is dim=size"),
        ({"mesh": "dp_shard=0"}, "--mesh is dim=size"),
        ({"mesh": "tp=2,tp=2"}, "--mesh is dim=size"),
        ({"mesh": "banana=2"}, "no mesh dims banana"),
        ({"mesh": "dp_shard=99999999"}, "plans are made for up to"),
        ({"topology": "h900"}, "no topology 'h900'"),
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"mesh": "dp_shard=12,ep=8"}, "ep=8 does not divide 12, the product of dp_shard"),
        ({"mesh": "pp=99,dp_shard=2"}, "has 32 layers, too few for 99 stages of pp"),
        ({"recognize": "experts"}, "--recognize is projections or heads"),
        ({"tokens": 1e6}, "--tokens and --tflops are above 0 and given together"),
        ({"sweep": "dp_shard=2;tp"}, "--mesh is dim=size"),
        ({"sweep": "dp_shard=2", "json": Path("a.json")}, "--sweep prints a table: it excludes"),
        ({"islands": 2, "wire": "int3"}, "wire must be one of float32"),
        ({"islands": 2, "sync_every": 0}, "--sync-every is 1 or more"),
        ({"islands": 2, "fragments": 31}, "--fragments 1 to it"),
        ({"islands": 2, "fragments": 30, "model": "gpt2"}, "fragments=30, but the parameters have"),
        ({"islands": 2, "link": "1xbit"}, "--link is a number above 0 with its unit"),
        ({"islands": 2, "link": "0 Gbit/s"}, "--link is a number above 0 with its unit"),
        ({"strategy": "gathered"}, "strategy must be one of auto, owned, owned_staged"),
        (
            {"explain": "layers.0.atention.wq.weight"},
            "did you mean 'layers.0.attention.wq.weight'?",
        ),
    ],
    ids=str,
)
def test_bad_input_is_reported_on_one_line(arguments, message, capsys):
    assert plan(**arguments) == 2
    error = capsys.readouterr().err
    assert message in error
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
    ("change", "message"),
    [
        (without("memory_bandwidth"), "has no memory_bandwidth"),
        (without("format"), "format None"),
        (with_value("memory_bandwidth", -1.0), "memory_bandwidth must be above 0"),
        (with_value("tensor_overhead", -1e-6), "tensor_overhead must be 0 or more"),
        (
            with_value("within_node", {"latency": -1, "bandwidth": 1}),
            "within_node: latency of a link",
        ),
        (with_value("within_node", {"latency": 1}), "within_node must have latency"),
        (
            with_value("between_nodes", {"latency": 0, "bandwidth": 0}),
            "bandwidth of a link must be above 0",
        ),
        (with_value("matmul", {"bfloat16": [[64, 1e9]]}), "bfloat16 and float32"),
        (with_value("matmul", {"bfloat16": [], "float32": []}), "list of [short side"),
        (with_value("matmul", [1]), "matmul must be an object"),
        (with_value("node_size", 0), "node_size must be an integer"),
        (with_value("cores", -2), "cores must be above 0"),
        (with_value("speed", 1), "a topology has no speed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_topology_file_with_wrong_values_is_rejected(tmp_path, change, message, capsys):
    values = json.loads(PRESETS["h200"].to_json())
    change(values)
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(values))
    assert plan("gpt2", "dp_shard=2", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_topologies_survive_a_json_round_trip(tmp_path, name):
    path = tmp_path / "topology.json"
    path.write_text(PRESETS[name].to_json())
    assert topology_of(path) == PRESETS[name]


def test_predicted_seconds_of_collectives_follow_their_formulas():
    slow, fast = Link(1e-3, 1e6), Link(1e-6, 1e9)
    rates = ((1, 1e9),)
    topology = Topology("t", 2, fast, slow, (("bfloat16", rates), ("float32", rates)), 1e9)
    pair, four = MeshSpec.of(a=2), MeshSpec.of(a=4)
    assert topology.all_to_all_seconds(pair, ("a",), 1000) == pytest.approx(1e-6 + 1e-6)
    # one peer on the same node, two on the other node, which receive two thirds of the bytes
    assert topology.all_to_all_seconds(four, ("a",), 3000) == pytest.approx(2.001e-3 + 2e-3)
    assert topology.all_gather_seconds(four, ("a",), 1000) == pytest.approx(3 * 2e-3)
    assert topology.all_reduce_seconds(four, ("a",), 4000) == pytest.approx(6 * 2e-3)


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "muon_dtensor.cli.main", "plan", "--model", "gpt2"]
    run = run_program([*command, "--mesh", "dp_shard=2,tp=2"], 60)
    assert run.returncode == 0, run.stderr
    assert "48 matrices" in run.stdout
    run = run_program([*command, "--mesh", "x"], 60)
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1)
    assert sizes_of("a=2, b=3") == {"a": 2, "b": 3}


FACTORIES = "tests.support.factories"


def test_a_user_s_model_is_planned_on_the_meta_device(capsys):
    """The layouts are those that parallelize_module and fully_shard produce in training."""
    start = process_time()
    assert plan(f"{FACTORIES}:sharded", "dp_shard=4,tp=2", explain="1.up.weight") == 0
    text = capsys.readouterr().out
    assert "rows over tp=2 then dp_shard=4" in text
    assert plan(f"{FACTORIES}:sharded", "dp_shard=4,tp=2", explain="1.down.weight") == 0
    assert "rows over dp_shard=4, cols over tp=2" in capsys.readouterr().out
    assert plan(f"{FACTORIES}:huge", "dp_shard=512") == 0
    assert "1.1 TB sent a step, 1.000 x the bound" in capsys.readouterr().out
    assert process_time() - start < 60


def test_a_bare_model_is_fully_sharded(capsys):
    assert plan(f"{FACTORIES}:bare", "dp_replicate=2,dp_shard=4", explain="0.up.weight") == 0
    text = capsys.readouterr().out
    assert "rows over dp_shard=4, replicated over dp_replicate=2" in text


def test_param_groups_of_the_users_declare_matrices(capsys):
    assert plan(f"{FACTORIES}:groups", "dp_shard=4,tp=2") == 0
    assert "8 ranks, 6 matrices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": f"{FACTORIES}:raising"}, "raised RuntimeError: no model for 8 ranks"),
        ({"model": f"{FACTORIES}:wrong_type"}, "returns int"),
        ({"model": f"{FACTORIES}:missing"}, "cannot import"),
        ({"model": f"{FACTORIES}:FACTORIES"}, "cannot import"),
        ({"model": f"{FACTORIES}:bare", "mesh": "dp_shard=4,tp=2"}, "not dp_shard, tp"),
        ({"model": f"{FACTORIES}:bare", "mesh": "dp_replicate=8"}, "not dp_replicate"),
        ({"model": f"{FACTORIES}:bare", "mesh": "dp_shard=4,dp_replicate=2"}, "fully_shard"),
        (
            {"model": f"{FACTORIES}:uneven_heads", "mesh": "dp_shard=4"},
            "raised RuntimeError: shape",
        ),
        ({"model": f"{FACTORIES}:exiting"}, "raised SystemExit"),
        ({"model": f"{FACTORIES}:without_group"}, "destroyed the process group"),
        ({"model": f"{FACTORIES}:unsharded"}, "not sharded over its mesh"),
        ({"model": "..:x"}, "cannot import"),
        ({"bucket_mb": -5}, "--bucket-mb must be above 0"),
        ({"bucket_mb": float("nan")}, "--bucket-mb must be above 0"),
        ({"explain": "é"}, "no parameter 'é'"),
        ({"explain": "x", "compare": "ours"}, "exclude each other"),
        ({"mesh": "cls=2"}, "no mesh dims cls"),
        ({"plot": "."}, "takes a file"),
        ({"model": f"{FACTORIES}:sharded"}, "Invalid mesh_dim_names"),
        ({"mesh": "dp_shard=-1,tp=2", "ranks": 7}, "7 ranks do not make a mesh"),
        ({"mesh": "dp_shard=8", "ranks": 16}, "16 ranks do not make a mesh"),
        ({"mesh": "dp_shard=-1"}, "--ranks is needed"),
        ({"mesh": "dp_shard=-1,tp=-1", "ranks": 4}, "one size of --mesh may be -1"),
        ({"compare": "theirs,ours"}, "--compare takes naive, 1d-owner, ours"),
        ({"plot": "plan.nonsense"}, "nonsense"),
    ],
    ids=str,
)
def test_a_model_or_flag_that_cannot_be_planned_is_reported_on_one_line(arguments, message, capsys):
    arguments = dict(arguments)
    if "plot" in arguments:
        arguments["plot"] = Path(arguments["plot"])
    assert plan(**{"model": "gpt2", **arguments}) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_islands_are_planned_too(capsys):
    options = {"islands": 4, "wire": "int8", "fragments": 4, "delay": 5, "link": "1gbit"}
    assert plan("llama3-8b", "dp_shard=8", step_seconds=15.0, **options) == 0
    text = capsys.readouterr().out
    assert "4 islands of 8 ranks: every 30 steps, 224 parameters in 4 fragments, mean" in text
    # 6.98e9 elements; int8 there and back, 3/4 of them each; and scales
    assert "sent 10.5 GB an island in 30 steps" in text
    assert "computes 100 % of the time" in text
    assert plan("gpt2", "dp_shard=2", islands=3, robust=True) == 0
    assert "all_gather, everyone combines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 1e9), ("50 Mbit/s", 5e7), ("0.5kbps", None), ("800 kbit", 8e5)]
)
def test_bits_per_second(text, bits):
    if bits is None:
        with pytest.raises(ValueError, match="--link"):
            bits_per_second(text)
    else:
        assert bits_per_second(text) == bits


def test_shard_momentum_is_planned(capsys):
    assert plan("llama3-8b", "dp_replicate=2,dp_shard=8", shard_momentum=True) == 0
    text = capsys.readouterr().out
    assert "results gathered by replicas" in text


def test_a_mesh_size_of_minus_1_is_computed_from_ranks():
    assert sizes_of("dp_replicate=2,dp_shard=-1,tp=4", 64) == {
        "dp_replicate": 2,
        "dp_shard": 8,
        "tp": 4,
    }


def test_a_sweep_is_a_table_with_a_row_per_mesh(capsys):
    meshes = "dp_shard=8; dp_shard=4,tp=2;dp_replicate=2,dp_shard=-1"
    assert plan("gpt2", ranks=8, sweep=meshes, tokens=5e5, tflops=100) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [m.strip() for m in meshes.split(";")]
    assert all(row.split("│")[2].strip() == "8" for row in rows)
    assert all("%" in row for row in rows)


def test_the_share_of_a_training_step(capsys):
    """6 FLOP x 0.124e9 parameters x 1e6 tokens on 4 ranks of 186 TFLOP/s: a second."""
    assert plan("gpt2", "dp_shard=4", tokens=1e6, tflops=186) == 0
    assert "a training step takes 1 s, the optimizer's" in capsys.readouterr().out


def test_an_exported_topology_gives_the_same_plan(tmp_path, capsys):
    path = tmp_path / "b200.json"
    assert plan("gpt2", "dp_shard=4", topology="b200", export_topology=path) == 0
    first = capsys.readouterr().out
    assert plan("gpt2", "dp_shard=4", topology=str(path)) == 0
    assert capsys.readouterr().out == first


def test_bytes_by_kind_of_link(capsys):
    """16 ranks on nodes of 8: of the 15 other ranks, 7 are on the same node."""
    report = plan_report(
        specs_of("gpt2", {"dp_shard": 16}), PlanOptions(topology=PRESETS["h100-ib-400"])
    )
    within, between = link_nbytes(report.plan)
    assert within + between == report.cost.total_nbytes
    assert within / between == pytest.approx(7 / 8, rel=0.01)
    wide = PlanOptions(topology=PRESETS["gb200-nvl72"])
    assert link_nbytes(plan_report(specs_of("gpt2", {"dp_shard": 64}), wide).plan)[1] == 0


def test_momenta_per_rank():
    specs = specs_of("gpt2", {"dp_replicate": 2, "dp_shard": 4})
    numel = sum(matrix.numel for spec in specs for matrix in spec.matrices)
    assert state_nbytes(plan_report(specs).plan) == 4 * numel // 4
    specs = specs_of("gpt2", {"dp_replicate": 2, "dp_shard": 4}, shard_momentum=True)
    assert state_nbytes(plan_report(specs).plan) == 4 * numel // 8


def test_predicted_costs_of_methods():
    """1d-owner repeats the work on every replica, naive on every rank."""
    specs = specs_of("gpt2", {"dp_replicate": 2, "dp_shard": 4})
    costs = {method: method_cost(method, specs, PlanOptions()) for method in METHODS}
    model = plan_report(specs).cost
    assert costs["ours"].mean_flops == model.model_flops / 8
    assert costs["naive"].mean_flops == costs["naive"].flops == model.model_flops
    assert costs["1d-owner"].mean_flops == model.model_flops / 4
    # each rank sends its quarter of each matrix to the three other holders
    elements = sum(spec.shape[0] * spec.shape[1] for spec in specs)
    assert costs["naive"].sent_nbytes == 2 * 3 * elements // 4
    assert costs["ours"].seconds <= min(cost.seconds for cost in costs.values())


def test_the_comparison_is_a_table(capsys):
    assert plan("gpt2", "dp_replicate=2,dp_shard=4", compare="naive, 1d-owner,ours") == 0
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    }
    redundancies = {method: cells[2] for method, cells in rows.items()}
    assert redundancies == {"naive": "8.00", "1d-owner": "2.00", "ours": "1.00"}
    assert rows["ours"][1] == "1.00"


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [("dp_shard=4", "auto"), ("dp_replicate=2,dp_shard=2", "owned"), ("dp_shard=1", "auto")],
)
def test_the_plot_is_written(mesh, strategy, tmp_path):
    path = tmp_path / "plan.png"
    assert plan("gpt2", mesh, strategy=strategy, plot=path) == 0
    pixels = image.imread(path)
    height, width, _ = pixels.shape
    assert (height, width) > (400, 400)
    colors = {tuple(color) for color in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}
    assert len(colors) > 5, "bars, lanes and text, not an empty page"
    assert 0.02 < float((pixels[..., :3] < 0.9).any(-1).mean()) < 0.9


def test_plotted_ranks_include_the_busiest_and_the_least_busy():
    report = plan_report(specs_of("gpt2", {"dp_shard": 128}), PlanOptions())
    ranks, flops = plotted_ranks(report), report.cost.flops
    assert flops[ranks[0]] == max(flops)
    assert flops[ranks[-1]] == min(flops)
    assert len(ranks) == len(set(ranks)) == 6


def test_offloaded_weights(capsys):
    """A rank copies its directions in bfloat16 up, and as much back. Exchanges are the same."""
    assert plan("gpt2", "dp_shard=4", offload=True) == 0
    numel = sum(prod(spec.shape) for spec in specs_of("gpt2", {"dp_shard": 4}))
    nbytes = f"{2 * numel / 4 / 1e6:.1f} MB"
    out = capsys.readouterr().out
    assert f"up to {nbytes} a rank copied to the device, {nbytes} back" in out
    assert plan("gpt2", "dp_shard=4") == 0
    other = capsys.readouterr().out
    assert "offloaded" not in other
    assert other.splitlines()[-2] == out.splitlines()[-3], "bytes sent"
