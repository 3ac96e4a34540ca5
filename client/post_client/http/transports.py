"""A blocking and an asynchronous transport ("wire") with the same methods.

All code above them is written once, as coroutines. No method of the blocking wire ever suspends, so a coroutine over it
finishes at its first step. :func:`run` relies on that and needs no event loop.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import IO, Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import httpx

R = TypeVar("R")
CHUNK_BYTES = 1 << 16


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine over a blocking wire."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: R = done.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine over a blocking wire has suspended")


def run_all(items: AsyncIterator[R]) -> Iterator[R]:
    """The items of an asynchronous iterator over a blocking wire."""
    try:
        while True:
            try:
                item: R = run(items.__anext__())  # type: ignore[arg-type]
            except StopAsyncIteration:
                return
            yield item
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            run(close())


class Wire(Protocol):
    """What :class:`post_client.http.session.Http` needs from the network, the clock and the disk."""

    timeout: httpx.Timeout

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response's body is not yet read."""

    def body(self, file: IO[bytes]) -> Any:
        """A file as a request body."""

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The raw bytes of a body as they arrive."""

    def lines(self, response: httpx.Response) -> AsyncIterator[str]:
        """The lines of a body."""

    async def read(self, response: httpx.Response) -> None:
        """Read the whole body into ``response.content``."""

    async def finish(self, response: httpx.Response) -> None:
        """Return the connection to the pool."""

    async def sleep(self, seconds: float) -> None: ...

    async def run_sync(self, function: Callable[[], R]) -> R:
        """Run slow local work, such as hashing a file."""

    async def close(self) -> None: ...


class BlockingWire:
    """Over :class:`httpx.Client`. No method suspends."""

    def __init__(self, timeout: httpx.Timeout, trust_env: bool, transport: httpx.BaseTransport | None) -> None:
        self.timeout = timeout
        self._client = httpx.Client(timeout=timeout, trust_env=trust_env, transport=transport)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self._client.send(request, stream=True)

    def body(self, file: IO[bytes]) -> Any:
        return file

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_raw():
            yield chunk

    async def lines(self, response: httpx.Response) -> AsyncIterator[str]:
        for line in response.iter_lines():
            yield line

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def finish(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def run_sync(self, function: Callable[[], R]) -> R:
        return function()

    async def close(self) -> None:
        self._client.close()


class AsyncWire:
    """Over :class:`httpx.AsyncClient`. Files are read and hashed in threads."""

    def __init__(self, timeout: httpx.Timeout, trust_env: bool, transport: httpx.AsyncBaseTransport | None) -> None:
        self.timeout = timeout
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=trust_env, transport=transport)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._client.send(request, stream=True)

    async def body(self, file: IO[bytes]) -> AsyncIterator[bytes]:
        while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
            yield chunk

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        async for chunk in response.aiter_raw():
            yield chunk

    async def lines(self, response: httpx.Response) -> AsyncIterator[str]:
        async for line in response.aiter_lines():
            yield line

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def finish(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def run_sync(self, function: Callable[[], R]) -> R:
        return await anyio.to_thread.run_sync(function)

    async def close(self) -> None:
        await self._client.aclose()
