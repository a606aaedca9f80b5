"""Networks, and convolutions with a kernel per example."""
