"""Puts the root on the path, so that tests can `import common`, `import reca_harmon`, ... Where
pytest-xdist is installed (requirements-dev.txt has it), two files of tests run side by side.

    python -m pytest --slow     also runs the tests that are marked slow: minutes for what another
                                test shows on a smaller case
"""
import os
import sys
from pathlib import Path

import pytest

# No test touches the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each of the two processes has a core for itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes unless -n says otherwise; a file stays in one of them, with what its tests
    share."""
    # The two processes themselves come by here as well, and must not start others.
    if hasattr(config, "workerinput") or config.option.usepdb:
        return
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = 2
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # the order below, not by the number of tests


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")


# These files take longest. They come first, so that neither process waits for the other at the end.
LONGEST = ("test_paper", "test_fakegpu", "test_step", "test_users", "test_run", "test_bagel")


def pytest_collection_modifyitems(config, items):
    def place(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)
    if config.option.slow:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --slow"))
