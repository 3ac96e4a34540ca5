"""``/v1/predictions`` and ``/v1/completions``: the API side."""
