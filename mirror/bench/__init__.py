"""Measuring scripts: each is run as `python -m mirror.bench.NAME` and prints or writes one JSON result."""
