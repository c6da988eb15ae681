"""Benchmarks: each module prints its table when run, `python -m bench.NAME`."""
