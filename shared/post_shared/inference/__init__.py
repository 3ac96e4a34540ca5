"""Inference: classification, generation and evaluation."""
