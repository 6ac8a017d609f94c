"""The worker processes of loaders: how they end, and how their death is reported."""

from __future__ import annotations

import atexit
import signal
import weakref
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

SECONDS_TO_DIE = 1.0
"""How long to wait for a worker's end: its connection breaks before the process has ended."""

_loaders: weakref.WeakSet[DataLoader] = weakref.WeakSet()


class LoaderWorkerError(RuntimeError):
    """A process that reads data died."""


def leave_signals_to_the_parent(worker: int) -> None:
    """A ``worker_init_fn`` that makes workers ignore SIGTERM and SIGINT.

    Launchers, schedulers and terminals signal whole process groups. Only the training process should react: it still
    needs its workers for a while, and torch lets SIGTERM kill them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_the_parent(loader: DataLoader) -> None:
    """Make sure that the workers of ``loader`` end when Python exits.

    multiprocessing would send SIGTERM, which they ignore, and wait forever.
    """
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
    """Which worker of ``loader`` died, and of what; None if none did. Call it after an error."""
    workers = _workers(loader)
    try:
        _await_a_death(workers)
    except RuntimeError:  # torch's signal handler also raises once for a death, perhaps during this wait
        _await_a_death(workers)
    for worker in workers:
        if worker.exitcode:
            return f"a process that reads data (pid {worker.pid}) {_ending(worker.exitcode)}"
    return None


def _await_a_death(workers: list[BaseProcess]) -> None:
    dying = wait([worker.sentinel for worker in workers], timeout=SECONDS_TO_DIE if workers else 0)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join()  # the sentinel is ready before the exit code is known


def _ending(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with exit code {exitcode}"
    advice = {
        signal.SIGKILL: "; the kernel does that when memory runs out: lower data.num_workers or data.batch_size",
        signal.SIGBUS: "; that happens when shared memory (/dev/shm) runs out: enlarge it or lower data.num_workers",
    }
    number = signal.Signals(-exitcode)
    return f"was killed by {number.name}{advice.get(number, '')}"
