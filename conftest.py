"""Puts the root on the path, so that tests can `import common`, `import reca_harmon`, ..., and runs the files of tests
on two cores side by side where pytest-xdist is installed (requirements-dev.txt has it)."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")           # no test touches the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                # a core for each of the two
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes unless -n says otherwise; a file stays in one of them, with what its tests share."""
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = 2
        config.option.dist = "loadfile"
