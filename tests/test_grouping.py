"""Names and classes decide which algorithm a parameter gets; rules override them."""

import pytest
import torch
from torch import nn

from muon_dtensor import GroupOptionError, Muon, group_parameters


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
    """The head comes first and has no telling name; it is the embedding all the same."""

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


def test_the_first_rule_wins_and_every_rule_must_take_something():
    rules = [(r"wqkv", {"lr": 1.0}), (r"layers\.0\.wqkv", {"lr": 2.0})]
    with pytest.raises(GroupOptionError, match=r"rule 1, .* earlier rules take all"):
        group_parameters(Llama(), rules=rules)
    with pytest.raises(GroupOptionError, match=r"rule 0, 'wkqv', matches no parameter"):
        group_parameters(Llama(), rules=[("wkqv", {"lr": 1.0})])
    by_name = {
        name: g for g in group_parameters(Llama(), rules=rules[::-1]) for name, _ in g["params"]
    }
    assert by_name["layers.0.wqkv.weight"]["lr"] == 2.0
    assert by_name["layers.1.wqkv.weight"]["lr"] == 1.0


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
