"""Tuning: p_s on Φs (method §2)."""
