"""The ``post`` command."""
