"""The page pool against a plain account of who holds what, and what may be shared."""

import numpy as np
import pytest

from dsv3_jax.serve.pages import TRASH, PagePool


def test_a_page_has_one_owner_until_it_is_released():
    pool = PagePool(4, 2)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [1, 2, 3, 4] and TRASH == 0
    assert pool.allocate(1) is None and pool.num_held == 4
    pool.release(first)
    assert pool.num_available == 3
    assert sorted(pool.allocate(3)) == sorted(first)


def test_equal_beginnings_share_full_pages():
    pool = PagePool(8, 3)
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    pages = pool.allocate(3)
    pool.register(text, pages, num_written=8)
    assert pool.match([*text, 1]) == pages[:2]  # the third page is not full
    assert pool.match([*text[:5], 1, 1, 1]) == pages[:1]
    assert pool.match([1, *text[1:]]) == []
    assert pool.match([*text[3:], *text]) == []  # equal tokens after another beginning
    assert pool.match(text[:6]) == pages[:1]  # the last token's logits have to be computed
    assert pool.match(text[:7]) == pages[:2]


def test_what_is_not_written_is_not_shared():
    pool = PagePool(8, 3)
    text = list(range(9))
    pages = pool.allocate(3)
    pool.register(text, pages, num_written=5)
    assert pool.match([*text, 1]) == pages[:1]
    pool.register(text, pages, num_written=9)
    assert pool.match([*text, 1]) == pages


def test_pages_that_know_the_next_token_are_shared_only_if_it_is_the_same():
    pool = PagePool(8, 3, lookahead=1)
    text = [5, 6, 7, 8, 9, 10]
    pages = pool.allocate(2)
    pool.register(text, pages, num_written=6)
    assert pool.match([5, 6, 7, 8, 1]) == pages[:1]
    assert pool.match([5, 6, 7, 1, 1]) == []
    assert pool.match([*text, 1, 2]) == pages[:1]  # what follows the second page is not known yet


def test_shared_pages_outlive_their_first_owner_and_are_evicted_oldest_first():
    pool = PagePool(5, 2)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.register([1, 2, 3, 4], old, num_written=4)
    pool.register([5, 6, 7, 8], new, num_written=4)
    shared = pool.match([1, 2, 3, 4, 9])
    assert pool.allocate(1, shared)[:2] == old
    pool.release(old)  # the first owner
    pool.release(new)
    assert pool.allocate(3) is None  # two are free or idle, two are held
    assert pool.match([5, 6, 7, 8, 9]) == new
    (taken,) = pool.allocate(1)
    assert taken == new[1]  # the end of a text goes before its beginning
    assert pool.match([5, 6, 7, 8, 9]) == new[:1]
    assert pool.match([1, 2, 3, 4, 9]) == old


@pytest.mark.parametrize("lookahead", [0, 1])
def test_random_use_keeps_contents_apart(lookahead):
    """Plays rows that write tokens; a page that is read must hold the reader's own tokens."""
    rng = np.random.default_rng(lookahead)
    page_tokens, num_pages = 3, 17
    pool = PagePool(num_pages, page_tokens, lookahead)
    contents = [None] * (num_pages + 1)
    rows, reused = [], 0
    for _ in range(3000):
        if rows and rng.random() < 0.5:
            tokens, pages = rows.pop(rng.integers(len(rows)))
            pool.release(pages)
            continue
        tokens = rng.integers(0, 2, rng.integers(1, 20)).tolist()
        known = pool.match(tokens)
        needed = -(-len(tokens) // page_tokens)
        pages = pool.allocate(needed - len(known), known)
        if pages is None:
            assert needed - len(known) > pool.num_available - len(known)
            continue
        assert pages[: len(known)] == known and len(set(pages)) == needed and TRASH not in pages
        held = [page for _, others in rows for page in others]
        assert not set(held) & set(pages[len(known) :])
        reused += len(known)
        for i, page in enumerate(pages):
            end = (i + 1) * page_tokens
            written = tokens[: end + lookahead]
            if i < len(known):
                assert contents[page] == written
            contents[page] = written
        pool.register(tokens, pages, len(tokens))
        rows.append((tokens, pages))
        assert pool.num_held == len({page for _, pages in rows for page in pages})
    assert reused > 300
    for _, pages in rows:
        pool.release(pages)
    assert pool.num_held == 0
