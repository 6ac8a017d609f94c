"""Waiting for processes that tests start, never for ever."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from threading import Timer

SECONDS = 300
"""Seconds that a test waits for a process; many times what it takes on a busy machine."""


def wait_until(done: Callable[[], bool], process: subprocess.Popen, *, seconds: float = SECONDS) -> bool:
    """Wait until ``done``; False if the process ended before. A process that takes too long is killed: an error."""
    end = time.monotonic() + seconds
    while not done():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"waited {seconds} s for {process.args}")
        time.sleep(0.01)
    return True


def first_line(process: subprocess.Popen, begin: str = "", *, seconds: float = SECONDS) -> str:
    """The first line that the process prints that begins so; empty if it ended, or was killed for taking too long."""
    timer = Timer(seconds, process.kill)
    timer.start()
    try:
        return next((line for line in process.stdout if line.startswith(begin)), "")
    finally:
        timer.cancel()


def end(process: subprocess.Popen) -> None:
    """Kill the process, and read what is left in its pipes."""
    process.kill()
    process.communicate(timeout=SECONDS)
