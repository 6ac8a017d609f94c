"""``vistok demo``: generate, reconstruct and inspect tokens with trained runs, in a browser."""

from vistok.demo.app import DemoError, launch, launched

__all__ = ["DemoError", "launch", "launched"]
