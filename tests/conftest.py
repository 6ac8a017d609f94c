"""Settings of the whole suite."""

import os

# Each worker of pytest-xdist has one core; set before torch is imported, also for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Examples may be slow on a busy machine; that is not a failure.
# Repeatable: the same examples in every run. HYPOTHESIS_PROFILE=random draws others.
settings.register_profile("vistok", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "vistok"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """vistok's cache is in the tests' own folder, also for processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: small tensors gain nothing from more, and sums are computed in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
