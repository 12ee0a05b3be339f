"""001, "Edge Case Tests": invalid assignments, shapes and parameters."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_dtensor import (
    AssignmentError,
    DistributedConfig,
    Muon,
    PlanError,
    _validate_assignments,
    create_processgroup_config,
)
from tests.support.pool import run_processes

pytestmark = pytest.mark.P0
PARAMS = [torch.randn(10, 10) for _ in range(4)]


def unchanged(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


class TestEdgeCases:
    def test_invalid_rank_assignment(self):
        with pytest.raises(ValueError, match="ranks are 0 to 3"):
            _validate_assignments(dict.fromkeys(range(4), 999), PARAMS, 4)

    def test_missing_parameter_assignment(self):
        with pytest.raises(AssertionError, match=r"parameters \[2, 3\] are assigned to no rank"):
            _validate_assignments({0: 0, 1: 1}, PARAMS, 4)

    @pytest.mark.parametrize(
        ("assignments", "text"),
        [
            ({0: [0, 1], 1: [1, 2, 3]}, "parameter 1 is assigned twice, to ranks 0 and 1"),
            ({0: [0, 0, 1, 2, 3]}, "parameter 0 is assigned twice, to ranks 0 and 0"),
            ({0: [0, 1, 2, 3, 4]}, "assigns parameter 4, but there are 4"),
            ({-1: [0, 1, 2, 3]}, "assigned to rank -1"),
            ({0: 0, 1: 0, 2: 0, 3: True}, "assigned to rank True"),
            ({0: 0, 1: 0, 2: 0, "3": 0}, "assigns parameter '3', but there are 4"),
            ([0, 1, 2, 3], "not {index: rank} or"),
            (None, "not {index: rank} or"),
        ],
        ids=str,
    )
    def test_other_wrong_assignments(self, assignments, text):
        with pytest.raises(AssignmentError) as caught:
            _validate_assignments(assignments, PARAMS, 4)
        assert text in str(caught.value)

    def test_both_forms_mean_the_same(self):
        expected = {0: 1, 1: 0, 2: 1, 3: 3}
        assert _validate_assignments({3: 3, 0: 1, 1: 0, 2: 1}, PARAMS, 4) == expected
        assert _validate_assignments({0: [1], 1: (0, 2), 2: [], 3: [3]}, PARAMS, 4) == expected

    @pytest.mark.parametrize("assignments", [{0: 999}, {}, {0: [0, 0]}], ids=str)
    def test_the_optimizer_raises_for_them(self, assignments):
        config = DistributedConfig(lambda *_: assignments, unchanged, unchanged, {"world_size": 4})
        with pytest.raises(AssignmentError):
            Muon([nn.Parameter(torch.ones(2, 2))], distributed_config=config)

    def test_shape_mismatch_in_gather(self):
        for text in run_processes(4, mismatched):
            assert "tensor dim 1 is not cut" in text
            assert "[3, 5]" in text

    def test_non_2d_parameter_rejected(self):
        with pytest.raises(ValueError, match="bias"):
            Muon(nn.Linear(10, 10, bias=True).named_parameters(), lr=0.02)
        config = DistributedConfig(lambda *_: {0: 0}, unchanged, unchanged, {})
        complex_numbers = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
        with pytest.raises(PlanError, match="real floating dtype"):
            Muon([complex_numbers], distributed_config=config)

    def test_zero_parameters(self):
        optimizer = Muon([], lr=0.02)
        optimizer.step()
        assert optimizer.plan.params == ()


def mismatched() -> str:
    """Return the error when rank 2 holds another number of columns."""
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    shard = torch.ones(3, 5 if dist.get_rank() == 2 else 4)
    with pytest.raises(ValueError, match="holds a shard") as caught:
        config.gather_fn(shard, 0, config.state)
    return str(caught.value)
