"""Settings of the whole suite."""

from hypothesis import settings

# Examples are slow where the machine is busy; that is no failure.
settings.register_profile("vistok", deadline=None)
settings.load_profile("vistok")
