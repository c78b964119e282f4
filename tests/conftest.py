"""Fixtures for tests of what has a compiled way and one by torch's operations."""

import contextlib
import sys

import pytest

from gradclip import norms


@contextlib.contextmanager
def _way(way):
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setitem(sys.modules, "gradclip.kernels", None)
        norms.compiled.cache_clear()
        assert (norms.compiled() is None) == (way == "torch")
        yield way
    norms.compiled.cache_clear()


@pytest.fixture
def without_kernels():
    """As on a machine without numba."""
    with _way("torch"):
        yield


@pytest.fixture(params=["numba", "torch"])
def both_ways(request):
    """With compiled kernels, and without."""
    with _way(request.param) as way:
        yield way


@pytest.fixture(scope="module", params=["numba", "torch"])
def all_both_ways(request):
    """The same for a whole module, which must use it throughout."""
    with _way(request.param) as way:
        yield way
