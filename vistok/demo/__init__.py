"""``vistok demo``: runs in a browser, to generate, to reconstruct, and to look at tokens."""

from vistok.demo.app import DemoError, launch, launched

__all__ = ["DemoError", "launch", "launched"]
