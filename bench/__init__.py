"""Benchmarks. Each script runs from a checkout that need not be installed: `python bench/overhead.py`."""
