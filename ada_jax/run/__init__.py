"""The infrastructure of a run: devices, processes, checkpoints, the log, the command line.

`setup` and `config_checks` import most other sub-packages, to open and to check what a config
names. The other modules import none, except that `checkpoint` imports `nets`.
"""
