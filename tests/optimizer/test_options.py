"""The constructor, param groups, config files and the README agree with the table of options."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

from muon_dtensor import GroupOptionError, Muon
from muon_dtensor.config_file import OptimizerSection
from muon_dtensor.optimizer.options import OPTIONS, Option
from muon_dtensor.optimizer.settings import Settings

OPTIONS_PAGE = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
KEYWORDS = inspect.signature(Muon).parameters
IN_CONSTRUCTOR = [option for option in OPTIONS.values() if option.in_constructor]


def name_of(option: Option) -> str:
    return option.name


@pytest.mark.parametrize("option", IN_CONSTRUCTOR, ids=name_of)
def test_a_keyword_has_the_default_of_the_table_and_is_documented(option):
    assert KEYWORDS[option.name].default == option.default
    assert re.search(rf"^        {option.name}: ", Muon.__doc__ or "", re.MULTILINE)
    assert f"`{option.name}`" in OPTIONS_PAGE


def test_the_table_has_every_keyword():
    not_options = {"params", "distributed_config"}
    assert KEYWORDS.keys() - not_options == {option.name for option in IN_CONSTRUCTOR}


def test_config_files_have_every_option():
    fields = {field.name: field for field in dataclasses.fields(OptimizerSection)}
    for option in IN_CONSTRUCTOR:
        default = option.default
        text = str(default).removeprefix("torch.") if isinstance(default, torch.dtype) else default
        assert fields[option.name].default == text


def test_settings_are_options():
    assert {field.name for field in dataclasses.fields(Settings)} - {"custom"} <= OPTIONS.keys()


WRONG = {
    "lr": -1.0,
    "weight_decay": -1.0,
    "momentum": -1.0,
    "nesterov": 1,
    "ns_coefficients": (1.0, 2.0),
    "eps": -1.0,
    "ns_steps": 100,
    "adjust_lr_fn": "x",
    "orthogonalizer": "x",
    "capturable": 1,
    "normuon_beta": 1.0,
    "cautious_weight_decay": 1,
    "momentum_bits": 2,
    "weight_rounding": "x",
    "rounding_seed": -1,
    "ns_dtype": torch.float16,
    "bucket_mb": 0,
    "prefetch_count": -1,
    "batched": 1,
    "missing_grad": "x",
    "nonfinite": "x",
    "strategy": "gathered",
    "exact": 1,
    "topology": "x",
    "momentum_dtype": torch.float16,
    "offload_momentum": 1,
    "shard_momentum": 1,
    "compile": 1,
    "kernels": "x",
    "metrics_every": -1,
    "check_replicas": 1,
    "deferred_checks": "x",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_raises_a_value_error_that_names_the_option(name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **{name: WRONG[name]})


def test_every_option_has_a_wrong_value_here():
    """Except for options whose value may be anything, since only its truth value is used."""
    names = {option.name for option in IN_CONSTRUCTOR}
    assert names - WRONG.keys() == {"trace", "async_gpu_parallelism"}


def test_group_option_errors_are_value_errors():
    assert issubclass(GroupOptionError, ValueError)
