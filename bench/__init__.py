"""Benchmarks, each run as `python -m bench.NAME --json FILE [--quick]`: figures beside their goals."""
