"""Networks, and convolutions with one kernel per example."""
