"""Ending a run early, on purpose: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_SECONDS, AGREE_STEPS = 2.0, 10
"""The longest time and the most steps between two exchanges of stop requests, where there are several processes. Each
waits for the device; but torchrun gives a run only 30 s from SIGTERM to the end of its checkpoint."""


class TrainingInterrupted(Exception):
    """A run that was asked to stop, and saved a checkpoint first.

    Attributes:
        signal: what asked for it.
    """

    def __init__(self, message: str, signal_number: signal.Signals):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """While entered, SIGTERM and Ctrl-C are noted instead of obeyed; only a second Ctrl-C interrupts at once.

    SIGTERM comes more than once where a scheduler signals every process and a launcher passes its own signal on.
    Outside the main thread, where Python allows no signal handlers, nothing is noted.

    Args:
        step: after which step the run begins.

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
        """Whether the run stops after ``step``: the same answer on all processes, which must all ask."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        if step < self._next_step:
            return False
        number = self._exchange(step, accelerator)
        if number and self.signal is None:
            self.signal = signal.Signals(number)
        return number > 0

    def _exchange(self, step: int, accelerator) -> int:
        """The signal that any process got, or 0. When to ask next follows from the slowest one's pace, so that all
        come to the same step."""
        now = time.monotonic()
        own = torch.tensor([float(self.signal or 0), now - self._asked_at], device=accelerator.device)
        number, seconds = accelerator.gather(own[None]).amax(0).tolist()
        steps = int(AGREE_SECONDS * (step - self._asked_step) / max(seconds, 1e-6))
        self._asked_at, self._asked_step = now, step
        self._next_step = step + min(max(steps, 1), AGREE_STEPS)
        return int(number)
