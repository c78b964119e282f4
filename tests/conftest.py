"""Fixtures for tests of what has a compiled way and one by torch's operations; what not to run twice."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from gradclip import norms


def pytest_addoption(parser):
    parser.addoption(
        "--checked", type=Path, help="what workflow/checks.py wrote: leave out the tests that passed"
    )


def pytest_collection_modifyitems(config, items):
    if checked := config.getoption("checked"):
        outcomes = json.loads(checked.read_text())
        done = [item for item in items if outcomes.get(item.nodeid.split("[")[0])]
        items[:] = [item for item in items if not outcomes.get(item.nodeid.split("[")[0])]
        config.hook.pytest_deselected(items=done)


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
