"""Runnable studies on real data."""
