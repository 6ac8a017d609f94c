"""Settings of the whole suite."""

import os

# Each worker of pytest-xdist has one core; set before torch is imported, also for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Examples are slow where the machine is busy; that is no failure.
settings.register_profile("vistok", deadline=None)
settings.load_profile("vistok")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What vistok keeps between runs is kept in the tests' own folder, also by processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
