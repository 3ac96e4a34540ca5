"""The HTTP API: one module a resource; see :mod:`post_server.api.app`. Never imports torch."""
