"""Eight emulated CPU devices and true float32 for every test, asked for before JAX is imported.

Without the precision a GPU multiplies float32 in TF32, three digits short of what tests compare.
"""

import os
import shutil
import tempfile

import pytest
from hurry import COMPILER_FLAGS

pytest_plugins = ["draws"]

for _flag in ("--xla_force_host_platform_device_count=8", *COMPILER_FLAGS):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")


def pytest_configure(config):
    """One cache of compiled programs for the workers and for the commands that tests start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="dsv3_jax_compiled_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Else a worker comes to hold gigabytes of programs that no later module runs."""
    yield
    import jax

    jax.clear_caches()
