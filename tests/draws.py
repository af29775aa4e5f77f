"""Fresh random inputs that can be drawn again: one number stands for all draws of a session.

`np.random.default_rng()` without a seed, as tests write it, is seeded with DSV3_TEST_SEED (new for
every session unless set; pytest's header shows it), the test or the shared fixture that draws, and
how often it has drawn. Setting the number runs a failed test again on the same inputs.
"""

import itertools
import os
import random
import zlib

import numpy as np
import pytest

SEED = int(os.environ.setdefault("DSV3_TEST_SEED", str(random.randrange(2**31))))  # workers' too

_new_rng = np.random.default_rng
_drawing = ["collection", itertools.count()]  # who draws now, and how often so far


def _rng(seed=None):
    if seed is None:
        who, count = _drawing
        seed = [SEED, zlib.crc32(who.encode()), next(count)]
    return _new_rng(seed)


def _drawn_by(who: str):
    before = _drawing[:]
    _drawing[:] = who, itertools.count()
    random.seed(f"{SEED} {who}")
    return before


def pytest_configure(config):
    np.random.default_rng = _rng


def pytest_report_header(config):
    return f"random inputs: DSV3_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before = _drawn_by(item.nodeid)
    try:
        return (yield)
    finally:
        _drawing[:] = before


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture that tests share draws the same whichever of them comes first."""
    if fixturedef.scope == "function":
        return (yield)
    parameter = getattr(request, "param_index", 0)
    before = _drawn_by(f"{fixturedef.baseid} {fixturedef.argname} {parameter}")
    try:
        return (yield)
    finally:
        _drawing[:] = before
