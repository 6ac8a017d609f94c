"""Files, devices, processes, progress: what every room may use and nothing of vistok stands below."""
