"""Unseeded draws of tests: new ones every time, and the same again for the same session number."""

import draws
import numpy as np
import pytest


@pytest.fixture(scope="module")
def shared():
    return np.random.default_rng().integers(2**62)


def test_draws_differ_within_a_test_and_repeat_for_its_name(monkeypatch, shared):
    first, second = (np.random.default_rng().integers(2**62) for _ in range(2))
    assert len({first, second, shared}) == 3

    def drawn(who, seed):
        monkeypatch.setattr(draws, "SEED", seed)
        before = draws._drawn_by(who)
        value = np.random.default_rng().integers(2**62)
        draws._drawing[:] = before
        return value

    assert drawn("a", 1) == drawn("a", 1)
    assert len({drawn("a", 1), drawn("b", 1), drawn("a", 2)}) == 3
    assert np.random.default_rng(7).integers(2**62) == draws._new_rng(7).integers(2**62)
