"""``client.server``: liveness, readiness and metrics of the server."""

from __future__ import annotations

from post_client.resources._sync import AsyncResource, Resource, blocking
from post_shared.schemas.health import Health


class AsyncServer(AsyncResource):
    """``client.server`` of an :class:`post_client.AsyncClient`"""

    async def alive(self) -> Health:
        """Check that the server process responds."""
        return await self._http.get("/livez", Health)

    async def ready(self) -> Health:
        """Check that the server is ready.

        Raises:
            Unavailable: it isn't ready, or nothing responds at the address.
        """
        return await self._http.get("/readyz", Health)

    async def metrics(self) -> str:
        """The server's metrics in Prometheus's text format."""
        return (await self._http.send("GET", "/metrics", headers={"Accept": "text/plain"}, idempotent=True)).text


class Server(Resource[AsyncServer]):
    """``client.server``"""

    alive = blocking(AsyncServer.alive)
    ready = blocking(AsyncServer.ready)
    metrics = blocking(AsyncServer.metrics)
