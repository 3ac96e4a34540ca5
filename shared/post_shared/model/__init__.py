"""The language model: the only door to the engine."""
