"""Rows, file readers, tasks and batches."""
