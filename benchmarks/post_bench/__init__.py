"""Benchmarks of both sides in one process: the only package that imports both ``post_server`` and ``post_client``."""
