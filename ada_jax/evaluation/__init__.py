"""Measures classifiers on clean, corrupted and attacked images.

`evaluators` lists what can be measured. Batches go to `scoring.count_errors`, whose counts go to
`results`.
"""
