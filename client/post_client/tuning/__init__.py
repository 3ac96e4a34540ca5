"""Tuning on private rows."""
