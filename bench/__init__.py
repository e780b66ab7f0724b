"""Benchmarks. Each script runs by itself, from a checkout that need not be installed: `python bench/overhead.py`."""
