"""Data sets, and batches of them. Imports no other sub-package."""
