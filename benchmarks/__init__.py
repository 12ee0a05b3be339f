"""Benchmarks: `python -m benchmarks.NAME` from the checkout."""
