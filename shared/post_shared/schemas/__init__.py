"""The documents of the API, one file per resource. Never imports torch."""
