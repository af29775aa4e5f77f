"""The training step of the 671B run at full width, as the tests compile it."""

from dataclasses import replace

import jax

from dsv3_jax import configs
from dsv3_jax.config import Config
from dsv3_jax.plan import aot, hlo

ROWS = 2**23  # bytes: choices and counts are exchanged too; a chunk's rows are far larger
RING = 17 * 4 * 4096 * 7168 * 2  # bytes of the residual buffer: P + 1 chunks, layers, tokens, width


def config(num_microbatches: int, **parallel) -> Config:
    """`deepseek_v3_671b` on its 1,024 devices with fewer micro-batches, which only loop less.

    Dispatch is one hop, the same on every platform.
    """
    v3 = configs.get("deepseek_v3_671b")
    rows = v3.microbatch_sequences
    data = replace(
        v3.data, sequences_per_step=num_microbatches * rows, sequences_per_step_start=None
    )
    return replace(v3, data=data, parallel=replace(v3.parallel, dispatch="padded", **parallel))


def compile_for(config: Config, topology: str) -> tuple[hlo.Program, aot.CompiledMemory]:
    mesh = aot.described_mesh(topology, config.parallel)
    compiled = aot.compile_step(aot.lower_train_step(config, mesh), mesh)
    jax.clear_caches()
    return hlo.parse(compiled.as_text()), aot.compiled_memory(compiled)
