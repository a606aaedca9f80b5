"""The infrastructure of a run: devices, processes, checkpoints, the log, the command line."""
