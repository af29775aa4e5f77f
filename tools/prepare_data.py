"""Writes a tokenised corpus folder that training reads with `--set data.prepared=DIR`.

  python -m tools.prepare_data --config=small --output=/data/corpus
  python -m tools.prepare_data --config=small --set data.sources=jsonl:/data/a.jsonl --output=DIR

Prints what the filters left out and the size of the corpus. The folder holds ArrayRecord shards,
tokenizer.json and index.json with a crc32 for each shard.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.data import pipeline, prepare
from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny", "The run whose data group is prepared.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE: changes one value of the config.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to create.")
_SHARD_DOCUMENTS = flags.DEFINE_integer(
    "shard_documents", prepare.SHARD_DOCUMENTS, "Documents a shard.", lower_bound=1
)


def main(argv: list[str]) -> int:
    from dsv3_jax.overrides import load_config

    if argv[1:]:
        raise UserError(f"unknown argument {argv[1]!r}; settings are given as --set KEY=VALUE")
    if not _OUTPUT.value:
        raise UserError(
            "--output is missing; name the folder to create, e.g. --output=/data/corpus"
        )
    config = load_config(_CONFIG.value, _SET.value)
    folder = Path(_OUTPUT.value).expanduser()
    with prepare.progress_bar() as progress:
        prepare.write_corpus(
            config, folder, shard_documents=_SHARD_DOCUMENTS.value, progress=progress
        )
    corpus = pipeline.load_corpus(folder, config, "prepare it again")
    print("\n".join([*corpus.reports, str(corpus)]))
    return 0


if __name__ == "__main__":
    run_main(main)
