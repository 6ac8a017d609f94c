"""Files, devices, processes, progress: what every room may use. It imports nothing else of vistok."""
