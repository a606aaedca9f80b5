"""Measures classifiers on clean, corrupted and attacked images."""
