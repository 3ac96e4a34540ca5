"""Blobs: weights, prompts, checkpoints, datasets."""
