"""Names and classes decide which algorithm a parameter gets; rules override them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import GroupOptionError, Muon, PlanError, group_parameters
from muon_dtensor.grouping import clean_names
from muon_dtensor.integrations.transformers import MuonFactory
from tests.support.cases import mesh_of, tensors_like
from tests.support.logs import logged
from tests.support.pool import run_processes
from tests.support.recognized import rows


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(dim)


class Llama(nn.Module):
    def __init__(self, dim: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, dim)
        self.layers = nn.ModuleList(Attention(dim) for _ in range(2))
        self.experts = nn.Parameter(torch.ones(3, dim, dim))
        self.expert_bias = nn.Parameter(torch.ones(3, dim))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, 7, bias=False)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight


def algorithms(groups) -> dict[str, str]:
    return {name: g["algorithm"] for g in groups for name, _ in g["params"]}


def test_names_and_classes_decide():
    assert algorithms(group_parameters(Llama())) == {
        "tok_embeddings.weight": "adamw",
        "layers.0.wqkv.weight": "muon",
        "layers.0.wqkv.bias": "adamw",
        "layers.0.output.weight": "muon",
        "layers.0.norm.weight": "adamw",
        "layers.1.wqkv.weight": "muon",
        "layers.1.wqkv.bias": "adamw",
        "layers.1.output.weight": "muon",
        "layers.1.norm.weight": "adamw",
        "experts": "muon",
        "expert_bias": "adamw",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
        "output.weight": "adamw",
    }


class Tied(nn.Module):
    """The head comes first, and its name does not identify it; it is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.final = nn.Linear(4, 7, bias=False)
        self.wte = nn.Embedding(7, 4)
        self.wte.weight = self.final.weight
        self.mix = nn.Linear(4, 4, bias=False)


def test_tied_parameters_follow_the_embedding():
    assert algorithms(group_parameters(Tied())) == {
        "final.weight": "adamw",
        "mix.weight": "muon",
    }
    assert "output.weight" not in algorithms(group_parameters(Llama(tied=True)))


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("lm_head", "adamw"),
        ("classifier", "adamw"),
        ("score", "adamw"),
        ("head", "adamw"),
        ("pos_embed", "adamw"),
        ("embedder_mlp", "muon"),
        ("headway", "muon"),
        ("proj", "muon"),
    ],
)
def test_names(name, algorithm):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 3, bias=False))
    assert algorithms(group_parameters(model)) == {f"{name}.weight": algorithm}


def test_options_reach_their_groups_and_the_optimizer():
    groups = group_parameters(
        Llama(),
        lr=0.02,
        adamw={"lr": 3e-4, "betas": (0.9, 0.95)},
        rules=[
            (r"layers\.0\.wqkv\.weight", {"lr": 0.5}),
            (r"^experts$", {"algorithm": "adamw", "weight_decay": 0.0}),
        ],
    )
    by_name = {name: g for g in groups for name, _ in g["params"]}
    assert by_name["layers.0.wqkv.weight"]["lr"] == 0.5
    assert by_name["layers.1.wqkv.weight"]["lr"] == 0.02
    assert by_name["experts"]["algorithm"] == "adamw"
    assert (by_name["experts"]["lr"], by_name["experts"]["weight_decay"]) == (3e-4, 0.0)
    assert by_name["norm.bias"]["betas"] == (0.9, 0.95)
    optimizer = Muon(groups)
    names = [spec.fqn for spec in optimizer.plan.params]
    assert sorted(names) == sorted(n for n, g in by_name.items() if g["algorithm"] == "muon")


def test_the_first_rule_wins_and_every_rule_must_apply():
    rules = [(r"wqkv", {"lr": 1.0}), (r"layers\.0\.wqkv", {"lr": 2.0})]
    with pytest.raises(GroupOptionError, match=r"rule 1, .* earlier rules apply to all"):
        group_parameters(Llama(), rules=rules)
    with pytest.raises(GroupOptionError, match=r"rule 0, 'wkqv', matches no parameter"):
        group_parameters(Llama(), rules=[("wkqv", {"lr": 1.0})])
    by_name = {
        name: g for g in group_parameters(Llama(), rules=rules[::-1]) for name, _ in g["params"]
    }
    assert by_name["layers.0.wqkv.weight"]["lr"] == 2.0
    assert by_name["layers.1.wqkv.weight"]["lr"] == 1.0


def test_the_documented_families_are_those_of_the_table():
    text = Path("docs/parameters.md").read_text()
    assert "\n".join(rows()) in text


@pytest.mark.parametrize("recognize", ["experts", 1, None])
def test_an_unknown_granularity_raises(recognize):
    with pytest.raises(GroupOptionError, match="recognize must be True, False, 'projections'"):
        group_parameters(nn.Linear(2, 2), recognize=recognize)


def test_recognized_matrices_and_their_reason(capsys):
    """torch's attention is a known family; its output projection and other models are not."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 16)})
    groups = group_parameters(model, recognize="heads", show=True)
    optimizer = Muon(groups)
    plan = optimizer.plan
    sizes = {spec.fqn: len(spec.matrices) for spec in plan.params}
    assert sizes == {"attention.in_proj_weight": 6, "attention.out_proj.weight": 1, "up.weight": 1}
    why = "query, key, value, one matrix per head (torch: torch)"
    assert why in capsys.readouterr().out
    assert f"recognized: {why}" in plan.explain("attention.in_proj_weight")
    assert "recognized" not in plan.explain("up.weight")
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert f"recognized in 1 parameter: {why}" in str(optimizer.plan)
    declared = [{k: v for k, v in group.items() if k != "recognized"} for group in groups]
    other = Muon(declared)
    other.load_state_dict(saved)  # the text is that of the live groups, like the declarations
    assert "recognized" not in str(other.plan)


def test_the_table(capsys):
    group_parameters(Llama(tied=True), rules=[("experts", {"lr": 0.1})], show=True)
    printed = capsys.readouterr().out
    for line in (
        "tok_embeddings.weight   [7, 4]     adamw      embedding, tied as output.weight",
        "layers.0.wqkv.weight    [12, 4]    muon       matrix",
        "experts                 [3, 4, 4]  muon       rule 'experts'",
        "layers.1.norm.weight    [4]        adamw      norm",
    ):
        assert line in printed


def nested(path: str, module: nn.Module) -> nn.Module:
    """Return a model that holds `module` at `path`; a part "0" is a ModuleList."""
    for part in reversed(path.split(".")):
        outer: Any = nn.ModuleList([module]) if part == "0" else nn.Module()
        if part != "0":
            outer.add_module(part, module)
        module = outer
    return module


@pytest.mark.parametrize(
    "path",
    [
        *("output_layer", "qa_outputs", "v_head.summary", "classifier.out_proj", "fc", "head.fc"),
        *("cls.predictions.decoder", "generator", "generator.proj", "lm_heads.0", "heads.0"),
        *("model.lm_head", "mlm_head.dense", "score", "proj_out", "unembed"),
    ],
)
def test_output_heads_by_any_name_go_to_adamw(path):
    model = nested(path, nn.Linear(4, 7, bias=False))
    assert algorithms(group_parameters(model)) == {f"{path}.weight": "adamw"}


@pytest.mark.parametrize(
    "path",
    [
        *("layers.0.output", "blocks.0.sa.heads.0.key", "encoder.layer.0.output.dense"),
        *("fc1", "multi_head.proj", "multihead_attn.out_proj", "layers.0.fc", "h.0.mlp.c_proj"),
        *("layers.0.classifier", "decoder.layers.0.fc2"),
    ],
)
def test_hidden_matrices_with_similar_names_go_to_muon(path):
    model = nested(path, nn.Linear(4, 7, bias=False))
    assert algorithms(group_parameters(model)) == {f"{path}.weight": "muon"}


class RobertaClassificationHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(4, 2, bias=False)


def test_a_head_is_recognized_by_class_and_in_a_sequential_only_its_last_projection():
    model = nn.Module()
    model.task = RobertaClassificationHead()
    model.classifier = nn.Sequential(
        nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3, bias=False)
    )
    assert algorithms(group_parameters(model)) == {
        "task.out_proj.weight": "adamw",
        "classifier.0.weight": "muon",
        "classifier.3.weight": "adamw",
    }


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))


class NoMatrices(nn.Module):
    """Parameters with two or more tensor dims that no layer multiplies as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.register_tokens = nn.Parameter(torch.ones(1, 4, 4))
        self.mask_token = nn.Parameter(torch.ones(1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 9, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.A_log = nn.Parameter(torch.ones(8, 4))
        self.dt_bias = nn.Parameter(torch.ones(2, 4))
        self.class_embedding = nn.Parameter(torch.ones(1, 4))
        self.scale = LayerScale()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False))
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8, bias=False)


def test_parameters_that_are_not_matrices_go_to_adamw():
    by_name = algorithms(group_parameters(NoMatrices()))
    assert {name for name, algorithm in by_name.items() if algorithm == "muon"} == {
        "normed.parametrizations.weight.original1"
    }
    assert by_name.keys() == dict(NoMatrices().named_parameters()).keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_deprecated_weight_norm():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6, bias=False)))
    assert algorithms(group_parameters(model)) == {"0.weight_g": "adamw", "0.weight_v": "muon"}


CONVOLUTIONS: dict[str, tuple[nn.Module, list[tuple[int, int]]]] = {
    "1d": (nn.Conv1d(4, 6, 3, bias=False), [(6, 12)]),
    "2d": (nn.Conv2d(4, 6, 3, bias=False), [(6, 36)]),
    "3d": (nn.Conv3d(2, 3, 2, bias=False), [(3, 16)]),
    "2d-grouped": (nn.Conv2d(8, 6, 3, groups=2, bias=False), [(3, 36)] * 2),
    "2d-transposed": (nn.ConvTranspose2d(4, 6, 3, bias=False), [(4, 54)]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_one_matrix_per_group(name):
    """The result is bitwise that of torch.optim.Muon on the flattened kernels."""
    module, shapes = CONVOLUTIONS[name]
    weight = module.weight
    optimizer = Muon(group_parameters(nn.Sequential(module), lr=0.1))
    assert [(m.rows, m.cols) for m in optimizer.plan.params[0].matrices] == shapes
    parts = weight.detach().clone().reshape(len(shapes), *shapes[0])
    torch_params = [nn.Parameter(part.clone()) for part in parts]
    oracle = torch.optim.Muon(torch_params, lr=0.1)
    for step in range(2):
        weight.grad = tensors_like([tuple(weight.shape)], step)[0]
        for part, grad in zip(torch_params, weight.grad.reshape(parts.shape), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        oracle.step()
    assert torch.equal(weight.reshape(parts.shape), torch.stack(torch_params))


def test_rules_override_what_a_convolution_declares():
    conv = nn.Conv2d(4, 6, 3, bias=False)
    model = nn.Sequential(conv)
    faster = group_parameters(model, rules=[("0", {"lr": 0.5})])[0]
    assert (faster["lr"], faster["matrix"]) == (0.5, "o i k0 k1 -> o (i k0 k1)")
    other = group_parameters(model, rules=[("0", {"matrix": "o i h w -> (h w) o i"})])[0]
    assert other["matrix"] == "o i h w -> (h w) o i"
    adamw = group_parameters(model, rules=[("0", {"algorithm": "adamw"})])[0]
    assert adamw.get("matrix") is None
    Muon(group_parameters(model, rules={"0": {"algorithm": "adamw"}}))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.ones(2, 3, 4))
        self.kernel = nn.Parameter(torch.ones(2, 3, 4, 5))


class GptOssExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 4, 6))
        self.down_proj = nn.Parameter(torch.ones(2, 3, 4))
        self.down_proj_bias = nn.Parameter(torch.ones(2, 4))


def test_an_unknown_tensor_with_three_dims_goes_to_adamw_with_one_warning(caplog):
    model = nn.Sequential(Unknown(), Unknown())
    assert set(algorithms(group_parameters(model)).values()) == {"adamw"}
    assert caplog.text.count("WARNING") == 1
    assert "4 parameters with three or more tensor dims" in caplog.text
    assert "0.filters" in caplog.text
    caplog.clear()
    rules = [
        ("filters", {"matrix": "b r c -> b r c"}),
        ("kernel", {"algorithm": "adamw", "lr": 0.1}),
    ]
    by_name = algorithms(group_parameters(model, rules=rules))
    assert by_name["0.filters"] == "muon"
    assert by_name["0.kernel"] == "adamw"
    assert caplog.text == ""


def test_experts_are_recognized_by_class_and_by_name(caplog):
    model = nn.Module()
    model.mlp = GptOssExperts()
    model.experts_w1 = nn.Parameter(torch.ones(2, 3, 4))
    assert algorithms(group_parameters(model)) == {
        "experts_w1": "muon",
        "mlp.gate_up_proj": "muon",
        "mlp.down_proj": "muon",
        "mlp.down_proj_bias": "adamw",
    }
    assert caplog.text.count("WARNING") == 1
    assert "mlp.gate_up_proj looks like several matrices in one" in caplog.text
    assert "'split_dim': 1 or 2" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("w13", "gate_up_proj", "linear_fc1", "in_proj", "in_proj_qkvz", "qkv", "c_attn", "wqkv"),
        *("Wqkv", "query_key_value", "linear_qkv"),
    ],
)
def test_undeclared_fused_weights_log_a_warning(name, caplog):
    model = nested(f"layers.0.{name}", nn.Linear(4, 12, bias=False))
    groups = group_parameters(model)
    assert caplog.text.count("looks like several matrices in one") == 1
    caplog.clear()
    group_parameters(model, rules=[(name, {"split_sizes": (4, 8)})])
    assert caplog.text == ""
    assert algorithms(groups) == {f"layers.0.{name}.weight": "muon"}


def test_torch_s_attention_is_recognized_as_fused(caplog):
    group_parameters(nn.Sequential(nn.MultiheadAttention(4, 2, bias=False)))
    assert "0.in_proj_weight looks like several matrices in one" in caplog.text


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*.weight", {})], r"rule 0, '\*\.weight', is not a valid regular expression.* '\.\*'"),
        ([("(", {})], "is not a valid regular expression"),
        ({"nowhere": {}}, "rule 0, 'nowhere', matches no parameter"),
    ],
)
def test_invalid_patterns_raise(rules, message):
    with pytest.raises(GroupOptionError, match=message):
        group_parameters(Llama(), rules=rules)


def under_wrappers() -> tuple[list[str], list[str]]:
    """Return names that wrappers changed, and the names that an anchored rule matches."""
    model = Llama()
    wrapped = torch.compile(DistributedDataParallel(model))
    bare = [name for g in group_parameters(model) for name, _ in g["params"]]
    groups = group_parameters(wrapped, rules=[(r"^layers\.0\.wqkv\.weight$", {"lr": 0.5})])
    matched = [name for g in groups if g.get("lr") == 0.5 for name, _ in g["params"]]
    names = [name for g in groups for name, _ in g["params"]]
    return [name for name in names if name not in bare], matched


def test_wrappers_prefixes_are_removed_before_rules_match():
    for unclean, matched in run_processes(2, under_wrappers):
        assert unclean == []
        assert matched == ["layers.0.wqkv.weight"]


def test_a_module_that_the_user_calls_module_keeps_its_name():
    model = nested("module.up", nn.Linear(4, 4, bias=False))
    assert algorithms(group_parameters(model)) == {"module.up.weight": "muon"}


def flat_parameters() -> list[tuple[str, str]]:
    model = FullyShardedDataParallel(nn.Linear(4, 6), device_id=torch.device("cpu"))
    errors = []
    for make in (
        group_parameters,
        lambda m: MuonFactory()(m),
        lambda m: Muon(m.parameters()),
    ):
        try:
            make(model)
        except PlanError as error:
            errors.append((type(error).__name__, str(error)))
    return errors


def test_flat_parameters_of_fsdp1_raise_in_every_entry_point():
    for errors in run_processes(2, flat_parameters):
        assert len(errors) == 3
        for _, text in errors:
            assert "It is a flat parameter of FSDP1" in text
            assert "use_orig_params=True" in text


def while_gathered() -> list[str]:
    """After a forward, FSDP2's root stays unsharded: its modules hold full tensors."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    mesh = mesh_of((2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 8))
    texts = []
    for make in (
        lambda: Muon(model.parameters()),
        lambda: Muon([{"params": model.parameters(), "algorithm": "adamw"}]),
        lambda: group_parameters(model),
    ):
        try:
            make()
            texts.append("")
        except PlanError as error:
            texts.append(str(error))
    model.reshard()
    texts.append(str(Muon(model.named_parameters()).plan))
    dist.barrier()
    return texts


def test_an_optimizer_of_unsharded_parameters_raises():
    for *errors, plan in run_processes(2, while_gathered):
        for text in errors:
            assert "1 of 2 parameters cannot be planned" in text
            assert "FSDP2's temporary unsharded parameter" in text
            assert "module.reshard()" in text
        assert "rows over a=2" in plan


def one_warning() -> list[str]:
    with logged() as lines:
        Muon(group_parameters(nn.Sequential(Unknown(), nested("wqkv", nn.Linear(4, 4)))))
    return lines


def test_warnings_common_to_all_ranks_are_logged_by_rank_0():
    first, *other_ranks = run_processes(3, one_warning)
    assert len(first) == 3, "unknown, fused, and plain tensors on several ranks"
    assert "plain tensors on 3 ranks: each rank orthogonalizes all of its own" in first[-1]
    assert other_ranks == [[], []]


def warned_of_a_stage() -> int:
    """Return how many warnings this rank of two pipeline stages logs of its fused weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = nested("wqkv", nn.Linear(4, 12, bias=False))
    fully_shard(stage, mesh=mesh["dp"])
    with logged() as lines:
        group_parameters(stage)
    return len(lines)


def test_the_first_rank_of_each_stage_logs():
    assert run_processes(4, warned_of_a_stage) == [1, 0, 1, 0]


def tied_heads() -> Tensor:
    """Return how often a head tied to an embedding occurs among the grouped parameters."""
    model = Llama(tied=True)
    groups = group_parameters(model)
    params = [p for g in groups for _, p in g["params"]]
    assert len(params) == len({id(p) for p in params})
    return torch.tensor(sum(p is model.output.weight for p in params))


def test_a_tied_head_occurs_once():
    assert tied_heads() == 1


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(4, 4, bias=False) for _ in range(3))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.fc = nn.Linear(8, 10, bias=False)


def test_a_model_with_a_head_s_name_is_not_a_head():
    """A GAN's generator, and the last layer of a backbone inside another module."""
    model = nn.Module()
    model.generator, model.discriminator, model.classifier = Stack(), Stack(), Backbone()
    model.model = Backbone()
    by_name = algorithms(group_parameters(model))
    for part in ("generator", "discriminator"):
        assert {by_name[f"{part}.fc{n}.weight"] for n in (1, 2, 3)} == {"muon"}
    assert (by_name["model.conv1.weight"], by_name["model.fc.weight"]) == ("muon", "adamw")


def test_many_heads_in_one_container_are_heads():
    model = nn.Module()
    model.heads = nn.ModuleDict({n: nn.Linear(4, 2, bias=False) for n in ("a", "b", "c", "d")})
    assert set(algorithms(group_parameters(model)).values()) == {"adamw"}


@pytest.mark.parametrize(
    "name", ["codebook", "queue", "null_kv", "time_faaaa", "scales", "weight_scale_inv"]
)
def test_names_of_parameters_that_are_not_matrices(name):
    model = nn.Module()
    setattr(model, name, nn.Parameter(torch.ones(4, 3)))
    assert algorithms(group_parameters(model)) == {name: "adamw"}


def test_the_gates_of_recurrent_layers_are_recognized_as_fused(caplog):
    group_parameters(nn.Sequential(nn.LSTM(4, 3, bias=False), nn.GRUCell(4, 3, bias=False)))
    for name in ("0.weight_ih_l0", "0.weight_hh_l0", "1.weight_ih", "1.weight_hh"):
        assert f"{name} looks like several matrices in one" in caplog.text


def test_the_warning_names_the_blocks(caplog):
    group_parameters(nn.Sequential(nn.MultiheadAttention(4, 2, bias=False)))
    assert "{'split_sizes': (q, k, v)}" in caplog.text


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(2, 4))
        self.lora_b = nn.Parameter(torch.zeros(4, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_b @ self.lora_a


def test_parametrizations_keep_their_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.utils.parametrize.register_parametrization(model[0], "weight", LowRank())
    by_name = algorithms(group_parameters(model))
    assert by_name.keys() == dict(model.named_parameters()).keys()
    assert set(by_name.values()) == {"muon"}


def names_inside_and_outside() -> tuple[list[str], list[str]]:
    inner = FullyShardedDataParallel(
        nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu")
    )
    model = FullyShardedDataParallel(
        nn.Sequential(inner, nn.Linear(4, 2)), use_orig_params=True, device_id=torch.device("cpu")
    )
    outside = [name for name, _ in clean_names(model)]
    with FullyShardedDataParallel.summon_full_params(model):
        return outside, [name for name, _ in clean_names(model)]


def test_names_are_clean_inside_summon_full_params():
    """FSDP1 omits its wrappers there from names of parameters, but not from those of modules."""
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    for outside, inside in run_processes(2, names_inside_and_outside):
        assert sorted(outside) == sorted(inside) == sorted(names)
