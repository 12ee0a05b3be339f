"""Every fault of `tests/mutate.py` can be planted, and the tests that should catch it exist."""

import pytest

from tests.mutate import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_can_be_planted(fault: Fault):
    text = (ROOT / "muon_dtensor" / fault.file).read_text()
    assert text.count(fault.old) == 1
    for test in fault.tests.split():
        file, _, function = test.partition("::")
        (path,) = (ROOT / "tests").rglob(f"test_{file}.py")
        assert f"def test_{function}" in path.read_text()
