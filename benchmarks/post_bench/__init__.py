"""Benchmarks over both sides at once, in one process: the only package that imports provider and owner alike."""
