"""The HTTP app, the dashboard and the health checks; see :mod:`post_server.api.app`. Never imports torch."""
