"""Sample data for the tests of training runs."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Return a folder of sample data, made once for all workers of pytest-xdist."""
    sample_data = pytest.importorskip("muon_dtensor.train.sample_data")
    folder = tmp_path_factory.getbasetemp().parent / "sample-data"
    if not folder.exists():
        part = tmp_path_factory.mktemp("part") / "sample-data"
        sample_data.make_sample_data(part)
        try:
            part.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(part)
    return folder
