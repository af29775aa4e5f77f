"""Eight emulated CPU devices and true float32 for every test, asked for before JAX is imported.

Without the precision a GPU multiplies float32 in TF32, three digits short of what tests compare.
"""

import os

_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
