"""Comparison of runs: figures, means over seeds, significance tests, and one run scored on several test sets."""
