"""The server itself: does it live, can it work, and its numbers."""

from __future__ import annotations

from post_client.resources._sync import AsyncNoun, Noun, blocking
from post_shared.schemas.health import Health


class AsyncServer(AsyncNoun):
    """``client.server`` of an :class:`post_client.AsyncClient`"""

    async def alive(self) -> Health:
        """The process answers."""
        return await self._http.get("/livez", Health)

    async def ready(self) -> Health:
        """Whether the server can work now.

        Raises:
            Unavailable: it can't, or nothing answers there.
        """
        return await self._http.get("/readyz", Health)

    async def metrics(self) -> str:
        """Its counts in Prometheus's text form."""
        return (await self._http.send("GET", "/metrics", headers={"Accept": "text/plain"}, repeat=True)).text


class Server(Noun[AsyncServer]):
    """``client.server``"""

    alive = blocking(AsyncServer.alive)
    ready = blocking(AsyncServer.ready)
    metrics = blocking(AsyncServer.metrics)
