"""The processes that read data ahead: what ends them, and what is said when one dies."""

from __future__ import annotations

import atexit
import signal
import weakref
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

SECONDS_TO_DIE = 1.0
"""A broken connection to a worker is noticed before its end is."""

_loaders: weakref.WeakSet[DataLoader] = weakref.WeakSet()


class LoaderWorkerError(RuntimeError):
    """A process that reads data died."""


def leave_signals_to_the_parent(worker: int) -> None:
    """``worker_init_fn``: a request to stop is for the process that trains, which still needs its data for a while.

    Launchers, schedulers and terminals signal whole process groups; torch lets SIGTERM kill a worker.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_the_parent(loader: DataLoader) -> None:
    """End the workers of ``loader`` before Python exits, where multiprocessing would wait for them forever: it asks
    with SIGTERM."""
    _loaders.add(loader)


@atexit.register
def _end_workers() -> None:
    for loader in list(_loaders):
        iterator: Any = loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
        for worker in _workers(loader):
            worker.kill()


def _workers(loader: DataLoader) -> list[BaseProcess]:
    """The worker processes of a loader, for which torch has no public name."""
    return list(getattr(loader._iterator, "_workers", ()))


def cause_of_death(loader: DataLoader) -> str | None:
    """Which worker of ``loader`` died of what; None if all are well. Ask after an error."""
    workers = _workers(loader)
    try:
        _await_a_death(workers)
    except RuntimeError:  # torch reports a death, too: once, from a signal handler, which may be now
        _await_a_death(workers)
    for worker in workers:
        if worker.exitcode:
            return f"a process that reads data (pid {worker.pid}) {_ending(worker.exitcode)}"
    return None


def _await_a_death(workers: list[BaseProcess]) -> None:
    dying = wait([worker.sentinel for worker in workers], timeout=SECONDS_TO_DIE if workers else 0)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join()  # its files are closed before its exit code is known


def _ending(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with exit code {exitcode}"
    advice = {
        signal.SIGKILL: "; the kernel does that when memory runs out: lower data.num_workers or data.batch_size",
        signal.SIGBUS: "; that happens when shared memory (/dev/shm) runs out: enlarge it or lower data.num_workers",
    }
    number = signal.Signals(-exitcode)
    return f"was killed by {number.name}{advice.get(number, '')}"
