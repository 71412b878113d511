"""Puts the root on the path, so that tests can `import common`, `import reca_harmon`, ... Where
pytest-xdist is installed (requirements-dev.txt has it), two files of tests run side by side."""
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
