"""Answers: classification, generation and evaluation."""
