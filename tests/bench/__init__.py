"""Benchmarks and long proofs: each prints a table and writes `build/bench/<target>.json`."""
