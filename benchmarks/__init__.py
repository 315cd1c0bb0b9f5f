"""Benchmarks: each prints both sides of a comparison, measured in one run."""
