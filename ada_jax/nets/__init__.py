"""Networks as pure functions, fast convolutions with one kernel per example, and weight files.

Imports no other sub-package. `classifiers.make` makes the classifier, `corruption_nets.make` the
network that AdA perturbs.
"""
