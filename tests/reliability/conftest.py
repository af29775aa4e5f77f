"""What the runs with faults are compared with."""

import pytest
from runs import losses, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Losses of ten steps, in hexadecimal."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(workdir)
    assert code == 0, output
    return losses(workdir)
