"""Settings of the whole suite."""

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
