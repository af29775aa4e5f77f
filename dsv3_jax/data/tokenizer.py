"""Byte-level BPE through `tokenizers`: trained on a corpus, or a released tokenizer.json."""

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.data.fim import FimIds
from dsv3_jax.errors import UserError

# Full-width bars U+FF5C and low blocks U+2581 (spec §8).
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
# What a trained tokenizer has after its merges: what chats need, in the order of the released one.
LAST_TOKENS = (
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)

# The pre-tokenizer of spec §8: each pattern in turn, its matches isolated.
_PRE_TOKENIZER = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "|".join(
        (
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
)
MIN_VOCAB_SIZE = 256 + 3 + len(LAST_TOKENS)  # every byte, and the control tokens
_NEWLINE_BYTES = "Ċč"  # \n and \r in the byte-level alphabet


class Tokenizer:
    """Text to ids and back, exactly.

    Attributes:
      vocab_size: largest id + 1.
      bos_id, eos_id: control tokens every tokenizer has.
      pad_id: PAD, or EOS in a tokenizer without it.
      fim: the fill-in-the-middle tokens, or None.
      control_ids: every control token's id by name, those of chats included.
      text: the tokenizer.json it was read from.
    """

    def __init__(self, text: str, origin: str):
        """Reads the text of a tokenizer.json; `origin` names it in error messages."""
        try:
            definition = json.loads(text)
            # All added tokens become special, so that `encode` can keep them out of plain text.
            for token in definition["added_tokens"]:
                token.update(special=True, normalized=False)
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a readable tokenizer.json: {error}") from error
        self._backend.encode_special_tokens = True
        self.control_ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
        self.text, self.origin = text, origin
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        missing = [name for name in (BOS, EOS) if name not in self._vocab]
        if missing:
            raise UserError(
                f"{origin} lacks the tokens {', '.join(missing)}; use another tokenizer"
            )
        self.bos_id, self.eos_id = self._vocab[BOS], self._vocab[EOS]
        self.pad_id = self._vocab.get(PAD, self.eos_id)
        ids = [self._vocab.get(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        self.fim = None if None in ids else FimIds(*ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS or EOS, and no control token even where its name is written."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control tokens by name; bytes that are not UTF-8 become U+FFFD.

        Ids that stand for nothing (padding rows of the embedding table) are left out.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self) -> dict[str, int]:
        """Every token, in the byte-level alphabet, with its id."""
        return dict(self._vocab)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json."""
        Path(path).write_text(self.text, encoding="utf-8")

    def check_fits(self, vocab_size: int) -> None:
        """Raises UserError when an id lies outside an embedding table of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            rows = -(-self.vocab_size // 128) * 128
            raise UserError(
                f"{self.origin} has ids up to {self.vocab_size - 1} but model.vocab_size="
                f"{vocab_size}; set model.vocab_size={rows} or data.tokenizer=train"
            )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, plain or gzipped (.gz), or the one in a folder.

    Raises:
      UserError: the file is missing, unreadable or lacks BOS or EOS.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"tokenizer {path} cannot be read ({reason}); give the path of a tokenizer.json or "
            f"set data.tokenizer=train"
        ) from error
    return Tokenizer(text, str(path))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with V3's pre-tokenizer and control tokens.

    BOS, EOS and PAD get ids 0, 1 and 2; the tokens of fill-in-the-middle and of chats come last,
    as in V3.

    Args:
      vocab_size: tokens in all; a small corpus may give fewer.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for a byte-level tokenizer; "
            f"it must be at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in _PRE_TOKENIZER]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_TOKENS),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_tokens(list(LAST_TOKENS))  # not special: serving engines read them in answers
    return Tokenizer(backend.to_str(), "the trained tokenizer")


class PunctuationSplits:
    """Random splitting of tokens that merge punctuation with line breaks (spec §8).

    Such a token biases the continuation of a prompt that lacks its last newline. It is replaced
    by the tokens of its punctuation followed by those of its line breaks: other ids, same text.
    """

    def __init__(self, tokenizer: Tokenizer):
        splits = {}
        for token, token_id in tokenizer.tokens().items():
            if token[-1:] not in tuple(_NEWLINE_BYTES):
                continue
            text = tokenizer.decode([token_id])
            head = text.rstrip("\r\n")
            if _is_punctuation(head.removeprefix(" ")):
                tail = text[len(head) :]
                splits[token_id] = tokenizer.encode(head) + tokenizer.encode(tail)
        longest = max(map(len, splits.values()), default=1)
        self.lengths_V = np.ones(tokenizer.vocab_size, np.int64)  # 1: the token is not merged
        self._pieces = np.zeros((tokenizer.vocab_size, longest), np.int64)
        for token_id, pieces in splits.items():
            self.lengths_V[token_id] = len(pieces)
            self._pieces[token_id, : len(pieces)] = pieces

    def random_split(self, ids_X: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Splits each merged token with probability `rate`; returns a new array of that type."""
        lengths_X = self.lengths_V[ids_X]
        merged = np.flatnonzero(lengths_X > 1)
        kept = merged[rng.random(len(merged)) >= rate]
        lengths_X[kept] = 1
        split = np.flatnonzero(lengths_X > 1)
        starts_X = np.cumsum(lengths_X) - lengths_X
        out = np.repeat(ids_X, lengths_X)
        for i in range(self._pieces.shape[1]):
            reaches = split[lengths_X[split] > i]
            out[starts_X[reaches] + i] = self._pieces[ids_X[reaches], i]
        return out


def _is_punctuation(text: str) -> bool:
    """True for one or more characters of the Unicode classes P and S."""
    return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)
