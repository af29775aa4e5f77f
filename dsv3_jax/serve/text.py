"""Text of an answer while its tokens arrive: whole characters only, up to a stop string."""

import codecs
from collections.abc import Sequence

from dsv3_jax.data.tokenizer import Tokenizer

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (spec §8)."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(byte): byte for byte in _PRINTABLE} | {
        chr(256 + i): b for i, b in enumerate(others)
    }


class TokenBytes:
    """The bytes that each id stands for; joined, they are what `Tokenizer.decode` reads."""

    def __init__(self, tokenizer: Tokenizer):
        alphabet = _byte_alphabet()

        def read(token: str) -> bytes:
            known = all(character in alphabet for character in token)
            return bytes(map(alphabet.get, token)) if known else token.encode()

        self._bytes = {token_id: read(token) for token, token_id in tokenizer.tokens().items()}

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that stands for nothing: a padding row of the embedding table."""
        return self._bytes.get(token_id, b"")


class TextStream:
    """Turns bytes into text as they arrive, and ends at the first stop string.

    Held back are the bytes of a character that is not complete, and text that a stop string may
    begin with. The pieces together are the same text however the bytes were cut.

    Attributes:
      num_characters: decoded so far, those held back included.
      stopped: a stop string was found; the text ends before it.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._held = tuple(stops), ""
        self.num_characters, self.stopped = 0, False

    def push(self, data: bytes) -> str:
        """The text that is certain after `data`; nothing may be pushed once it has stopped."""
        self._hold(self._decoder.decode(data))
        unsafe = 0 if self.stopped else self._beginning_of_stop()
        return self._release(len(self._held) - unsafe)

    def finish(self) -> str:
        """The rest, when no more bytes come; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        self._hold(self._decoder.decode(b"", final=True))
        return self._release(len(self._held))

    def _hold(self, text: str) -> None:
        self.num_characters += len(text)
        self._held += text
        found = [(self._held.find(stop), len(stop)) for stop in self._stops if stop in self._held]
        if found:  # the one complete first, as if the text came by characters
            start, _ = min(found, key=lambda place: (sum(place), place[0]))
            self._held, self.stopped = self._held[:start], True

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
