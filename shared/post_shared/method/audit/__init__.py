"""Audit: membership inference and bounds on ε (method §5)."""
