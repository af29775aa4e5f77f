"""Flags of XLA for programs that are compiled once and run for milliseconds.

Most of the suite's time is compilation; with these it takes a third. XLA ends at a flag that it
does not know, and later versions do not know the second.
"""

import importlib.metadata

_MINOR = int(importlib.metadata.version("jaxlib").split(".")[1])
COMPILER_FLAGS = (
    "--xla_backend_optimization_level=0",
    *(["--xla_cpu_use_fusion_emitters=false"] if _MINOR < 11 else []),
    "--xla_cpu_parallel_codegen_split_count=1",
)
COMMAND_FLAGS = " ".join(COMPILER_FLAGS)  # XLA_FLAGS of a command, which asks for its own devices
