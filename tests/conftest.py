"""What every test starts with, in whichever order and process: one thread, a cache for the session.

Models that a test converts are kept for the session, not in the user's cache.
"""

import os
import tempfile

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all of pytest-xdist's workers, which inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    cache = tempfile.TemporaryDirectory(prefix="fastrl-models-")  # of half a gigabyte
    os.environ["FASTRL_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)


def pytest_runtest_setup() -> None:
    """Some of the scripts that tests run change torch's threads, for the rest of the process."""
    torch.set_num_threads(1)
