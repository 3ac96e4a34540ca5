"""How requests travel: one wire that blocks its thread, one for asyncio, with the same methods.

Everything above them is written once, as coroutines. On the blocking wire no method ever suspends, so that a coroutine
over it runs to its end at its first step: that is all that :func:`run` does, and why it needs no event loop.
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


def run(work: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine over a blocking wire."""
    try:
        work.send(None)
    except StopIteration as done:
        result: R = done.value
        return result
    work.close()
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
    """What :class:`post_client.http.session.Http` needs of the network, of time and of this machine's disk."""

    timeout: httpx.Timeout

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The answer, its body not yet read."""

    def body(self, file: IO[bytes]) -> Any:
        """A file as the content of a request."""

    def chunks(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """The bytes of a body as they came over the wire."""

    def lines(self, answer: httpx.Response) -> AsyncIterator[str]:
        """The lines of a body."""

    async def read(self, answer: httpx.Response) -> None:
        """Read the whole body; ``answer.content`` has it then."""

    async def finish(self, answer: httpx.Response) -> None:
        """Give the connection back."""

    async def sleep(self, seconds: float) -> None: ...

    async def work(self, task: Callable[[], R]) -> R:
        """Something slow on this machine, such as hashing a file."""

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

    async def chunks(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in answer.iter_raw():
            yield chunk

    async def lines(self, answer: httpx.Response) -> AsyncIterator[str]:
        for line in answer.iter_lines():
            yield line

    async def read(self, answer: httpx.Response) -> None:
        answer.read()

    async def finish(self, answer: httpx.Response) -> None:
        answer.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def work(self, task: Callable[[], R]) -> R:
        return task()

    async def close(self) -> None:
        self._client.close()


class AsyncWire:
    """Over :class:`httpx.AsyncClient`. Files are read, and hashed, in threads."""

    def __init__(self, timeout: httpx.Timeout, trust_env: bool, transport: httpx.AsyncBaseTransport | None) -> None:
        self.timeout = timeout
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=trust_env, transport=transport)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._client.send(request, stream=True)

    async def body(self, file: IO[bytes]) -> AsyncIterator[bytes]:
        while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
            yield chunk

    async def chunks(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        async for chunk in answer.aiter_raw():
            yield chunk

    async def lines(self, answer: httpx.Response) -> AsyncIterator[str]:
        async for line in answer.aiter_lines():
            yield line

    async def read(self, answer: httpx.Response) -> None:
        await answer.aread()

    async def finish(self, answer: httpx.Response) -> None:
        await answer.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def work(self, task: Callable[[], R]) -> R:
        return await anyio.to_thread.run_sync(task)

    async def close(self) -> None:
        await self._client.aclose()
