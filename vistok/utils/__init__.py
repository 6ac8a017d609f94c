"""Files, devices, processes, progress: helpers for all of vistok, which import nothing else of it."""
