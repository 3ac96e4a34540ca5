"""What makes a pass through a model fast. Only :mod:`post_shared.model` imports it."""
