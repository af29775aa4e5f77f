"""Which page of the cache holds what: allocation, sharing of equal beginnings, eviction.

Host side, without arrays; one `PagePool` a shard. A full page may be registered under a digest of
all tokens up to its end; a later row with the same beginning takes the page over instead of
computing it. A registered page that nobody holds stays until its room is needed, the one released
longest ago first.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

TRASH = 0  # where padding is written; belongs to no row


class PagePool:
    """Pages 1..num_pages of `page_tokens` tokens each.

    Args:
      lookahead: tokens after a page that its contents depend on too: 1 where an MTP cache, whose
        entry i knows token i + 1, lies in the same pages.
    """

    def __init__(self, num_pages: int, page_tokens: int, lookahead: int = 0):
        self.num_pages = num_pages
        self._page_tokens, self._lookahead = page_tokens, lookahead
        self._free = list(range(num_pages, TRASH, -1))
        self._holders = [0] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._unheld: dict[int, None] = {}  # registered pages without holders, oldest first

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out."""
        return len(self._free) + len(self._unheld)

    @property
    def num_held(self) -> int:
        """Pages that rows hold now."""
        return self.num_pages - self.num_available

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The registered pages of the longest common beginning, not held yet.

        At least the last of the tokens is left out: its logits have to be computed.
        """
        pages = []
        for digest in self._digests(tokens, len(tokens) - 1):
            if (page := self._page_of.get(digest)) is None:
                break
            pages.append(page)
        return pages

    def allocate(self, num_pages: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Holds `shared`, from `match`, and `num_pages` more; None, and holds none, if too few.

        Returns:
          The shared pages, then the new ones, whose contents are arbitrary.
        """
        if self.num_available - sum(page in self._unheld for page in shared) < num_pages:
            return None
        for page in shared:
            self._holders[page] += 1
            self._unheld.pop(page, None)
        new = [self._free.pop() if self._free else self._evicted() for _ in range(num_pages)]
        for page in new:
            self._holders[page] = 1
        return [*shared, *new]

    def release(self, pages: Sequence[int]) -> None:
        """A row gives its pages back, in its order. The later a page in it, the sooner it goes."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, page
            if self._holders[page] == 0:
                if page in self._digest_of:
                    self._unheld[page] = None
                else:
                    self._free.append(page)

    def register(self, tokens: Sequence[int], pages: Sequence[int], num_written: int) -> None:
        """Lets later rows share the full pages among the first `num_written` tokens of a row."""
        for digest, page in zip(self._digests(tokens, num_written), pages, strict=False):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def _evicted(self) -> int:
        page = next(iter(self._unheld))
        del self._unheld[page]
        del self._page_of[self._digest_of.pop(page)]
        return page

    def _digests(self, tokens: Sequence[int], num_written: int) -> Iterator[bytes]:
        """Of each full page in turn. Nobody can forge one and so read another user's pages."""
        digest = b""
        for end in range(self._page_tokens, num_written + 1, self._page_tokens):
            page = tokens[end - self._page_tokens : end + self._lookahead]
            if len(page) < self._page_tokens + self._lookahead:
                return
            digest = hashlib.sha256(digest + np.asarray(page, "<i4").tobytes()).digest()
            yield digest
