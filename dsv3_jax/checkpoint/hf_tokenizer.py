"""The small files of a Hugging Face folder: a tokenizer of ours as such files, or those at hand."""

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from dsv3_jax.data.chat import BUILT_IN
from dsv3_jax.data.tokenizer import BOS, EOS, Tokenizer
from dsv3_jax.errors import UserError

# Weights, index, config.json and manifest are the writer's own.
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "*.py",
    "LICENSE*",
)
MAX_CARRIED_BYTES = 64 << 20


def tokenizer_files(
    tokenizer: Tokenizer, *, model_max_length: int, chat_template: str = BUILT_IN
) -> dict[str, bytes]:
    """What transformers' AutoTokenizer reads, by file name, and generation_config.json.

    Settings are those of the released tokenizer_config.json (spec §8): BOS is prepended, EOS is not
    appended, padding is EOS. The class is the one that takes tokenizer.json as it is.

    Args:
      model_max_length: tokens, of the model.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.text)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.bos_id)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": chat_template,
    }
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(generation),
    }


def source_files(folder: str | Path) -> dict[str, bytes]:
    """Tokenizer, template, generation settings, code and licence of a folder, to carry along.

    Raises:
      UserError: a file cannot be read, or they exceed MAX_CARRIED_BYTES together.
    """
    folder = Path(folder)
    paths = sorted({p for pattern in _CARRIED for p in folder.glob(pattern) if p.is_file()})
    try:
        if (size := sum(path.stat().st_size for path in paths)) > MAX_CARRIED_BYTES:
            largest = max(paths, key=lambda path: path.stat().st_size)
            raise UserError(
                f"the files to carry along from {folder} hold {size:,} bytes, more than "
                f"{MAX_CARRIED_BYTES:,}; move the largest away: {largest.name}"
            )
        return {path.name: path.read_bytes() for path in paths}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error


def _json(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
