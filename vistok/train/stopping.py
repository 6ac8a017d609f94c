"""Stops a run early on request: SIGTERM from a scheduler, or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_SECONDS, AGREE_STEPS = 2.0, 10
"""The longest time and the most steps between two exchanges of stop requests among processes. An exchange waits for the
device, so it must be rare; but torchrun gives a run only 30 s from SIGTERM to the end of its checkpoint."""


class TrainingInterrupted(Exception):
    """A run was asked to stop, and has saved a checkpoint.

    Attributes:
        signal: the signal that asked for it.
    """

    def __init__(self, message: str, signal_number: signal.Signals):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """A context in which SIGTERM and Ctrl-C are only noted; a second Ctrl-C interrupts at once.

    SIGTERM may come several times: a scheduler may signal every process, and a launcher pass its own signal on. Outside
    the main thread, where Python allows no signal handlers, nothing is noted.

    Args:
        step: the step after which the run begins.

    Attributes:
        signal: the first request, or None.
    """

    def __init__(self, step: int = 0) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._ctrl_c = 0
        self._asked_at, self._asked_step, self._next_step = time.monotonic(), step, step + 1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._ctrl_c += number == signal.SIGINT
        if self._ctrl_c > 1:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def agreed(self, step: int, accelerator) -> bool:
        """Whether the run stops after ``step``. All processes must call it, and get the same answer."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        if step < self._next_step:
            return False
        number = self._exchange(step, accelerator)
        if number and self.signal is None:
            self.signal = signal.Signals(number)
        return number > 0

    def _exchange(self, step: int, accelerator) -> int:
        """The signal that any process got, or 0.

        The step of the next exchange follows from the pace of the slowest process, so that it is the same for all.
        """
        now = time.monotonic()
        own = torch.tensor([float(self.signal or 0), now - self._asked_at], device=accelerator.device)
        number, seconds = accelerator.gather(own[None]).amax(0).tolist()
        steps = int(AGREE_SECONDS * (step - self._asked_step) / max(seconds, 1e-6))
        self._asked_at, self._asked_step = now, step
        self._next_step = step + min(max(steps, 1), AGREE_STEPS)
        return int(number)
