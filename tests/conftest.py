"""Eight emulated CPU devices and true float32 for every test, asked for before JAX is imported.

Without the precision a GPU multiplies float32 in TF32, three digits short of what tests compare.
Most of the suite's time is compilation, so it is done in a hurry; commands that tests start as
processes drop these flags.
"""

import os

for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
