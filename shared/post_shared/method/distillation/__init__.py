"""Distillation: Φt -> Φs (method §1, Eq. 1)."""
