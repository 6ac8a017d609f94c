"""Ending a run early, on purpose: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_EVERY = 10
"""Steps between two exchanges of stop requests, where there are several processes: each waits for the device."""


class TrainingInterrupted(Exception):
    """A run that was asked to stop, and saved a checkpoint first.

    Attributes:
        signal: what asked for it.
    """

    def __init__(self, message: str, signal_number: signal.Signals):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """While entered, SIGTERM and Ctrl-C are noted instead of obeyed; a second one interrupts at once.

    Outside the main thread, where Python allows no signal handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def agreed(self, step: int, accelerator) -> bool:
        """Whether the run stops after ``step``: the same answer on all processes."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        if step % AGREE_EVERY:
            return False
        asked = torch.tensor(float(self.signal or 0), device=accelerator.device)
        number = int(accelerator.gather(asked[None]).max())
        if number and self.signal is None:
            self.signal = signal.Signals(number)
        return number > 0
