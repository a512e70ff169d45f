"""Models that a test converts are kept for the session, not in the user's cache."""

import shutil
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cache = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRL_CACHE", str(cache))
        yield
    shutil.rmtree(cache)  # half a gigabyte, which pytest would keep for three sessions
