"""Converts a checkpoint: between dtypes of Hugging Face folders, and from or to a run of ours.

    python -m tools.convert_checkpoint --src=DIR --dst=DIR --to=hf [--dtype={fp8,bf16,f32}]
    python -m tools.convert_checkpoint --src=DIR --dst=WORKDIR --to=orbax

No GPU is used. From folder to folder weights pass as a stream, so memory stays small whatever the
model; from or to a run the whole model is in memory. A folder appears when it is complete; a
command that was stopped or killed is continued by giving it again.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.checkpoint.hf_folder import is_folder
from dsv3_jax.errors import UserError, run_main

_SRC = flags.DEFINE_string("src", None, "folder or run to convert, which is only read")
_DST = flags.DEFINE_string("dst", None, "folder to make; it must not exist")
_TO = flags.DEFINE_enum("to", "hf", ["hf", "orbax"], "layout of the new checkpoint")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["fp8", "bf16", "f32"], "of a new --to=hf folder")
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "largest file, in GB", lower_bound=1e-6)


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _SRC.value or not _DST.value:
        raise UserError("give --src=DIR and --dst=DIR, and flags with two dashes only")
    source, destination = Path(_SRC.value), Path(_DST.value)
    max_shard_bytes = round(_MAX_SHARD_GB.value * 1e9)
    if _TO.value == "hf" and (is_folder(source) or not source.is_dir()):
        from dsv3_jax.checkpoint.hf_convert import convert_folder

        convert_folder(source, destination, _DTYPE.value, max_shard_bytes)
    else:
        import jax

        jax.config.update("jax_platforms", "cpu")  # a model that fills this memory fits no GPU
        from dsv3_jax.checkpoint import run_convert

        if _TO.value == "hf":
            run_convert.export_run(source, destination, _DTYPE.value, max_shard_bytes)
        elif flags.FLAGS["dtype"].present:
            raise UserError("--dtype is for --to=hf; a run holds float32 weights: leave it out")
        else:
            run_convert.import_run(source, destination)
    print(f"{destination} is complete")


if __name__ == "__main__":
    run_main(main)
