"""Layers shared by the systems, configured by arguments."""
