"""Prompt tuning on private rows."""
