"""Audit: membership inference and lower bounds on ε (method §5)."""
