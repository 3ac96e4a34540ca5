"""The clients of a provider's server: one attribute per resource of the API.

client = Client()                                   # POST_URL and POST_API_KEY from the environment
folder = client.models.download("smollm2-student", Path("student"))
prompt = client.prompts.upload(build_upload(prompt_file))
job = client.transfers.create(prompt=prompt.id, target="smollm2", dataset="amazon")
job.wait(progress=print)

:class:`AsyncClient` has the same resources and methods for asyncio: await a method that returns one item, and use
``async for`` with one that returns many.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import httpx

from post_client.http.session import async_http, blocking_http
from post_client.http.transports import run
from post_client.resources.completions import AsyncCompletions, Completions
from post_client.resources.datasets import AsyncDatasets, Datasets
from post_client.resources.distillations import AsyncDistillations, Distillations
from post_client.resources.evaluations import AsyncEvaluations, Evaluations
from post_client.resources.jobs import AsyncJobs, Jobs
from post_client.resources.models import AsyncModels, Models
from post_client.resources.predictions import AsyncPredictions, Predictions
from post_client.resources.prompts import AsyncPrompts, Prompts
from post_client.resources.reports import AsyncReports, Reports
from post_client.resources.server import AsyncServer, Server
from post_client.resources.transfers import AsyncTransfers, Transfers
from post_client.resources.uploads import AsyncUploads, Uploads
from post_shared.errors import InvalidInput
from post_shared.schemas.health import Health

URL_VARIABLE = "POST_URL"
KEY_VARIABLE = "POST_API_KEY"


class AsyncClient:
    """The client of one server's ``/v1`` API with one API key, for asyncio. Close it, or use ``async with``.

    Errors are the classes of :mod:`post_shared.errors`. Idempotent requests are retried when the server is
    unavailable or busy; others never.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float = 180.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``timeout`` is the longest wait for a response in seconds; ``attempts`` the most attempts per request."""
        address, key = _server_and_key(url, api_key)
        self._http = async_http(address, key, timeout=timeout, attempts=attempts, transport=transport)
        self.models = AsyncModels(self._http)
        self.datasets = AsyncDatasets(self._http)
        self.uploads = AsyncUploads(self._http)
        self.prompts = AsyncPrompts(self._http)
        self.jobs = AsyncJobs(self._http)
        self.distillations = AsyncDistillations(self._http)
        self.transfers = AsyncTransfers(self._http)
        self.evaluations = AsyncEvaluations(self._http)
        self.reports = AsyncReports(self._http)
        self.predictions = AsyncPredictions(self._http)
        self.completions = AsyncCompletions(self._http)
        self.server = AsyncServer(self._http)

    async def ready(self) -> Health:
        """Check that the server is ready.

        Raises:
            Unavailable: it isn't ready, or nothing responds at the address.
        """
        return await self.server.ready()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Client:
    """The client of one server's ``/v1`` API with one API key. Threads can share it. Close it, or use ``with``.

    Errors are the classes of :mod:`post_shared.errors`. Idempotent requests are retried when the server is
    unavailable or busy; others never.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float = 180.0,
        attempts: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """``timeout`` is the longest wait for a response in seconds; ``attempts`` the most attempts per request."""
        address, key = _server_and_key(url, api_key)
        self._http = blocking_http(address, key, timeout=timeout, attempts=attempts, transport=transport)
        self.models = Models(AsyncModels(self._http))
        self.datasets = Datasets(AsyncDatasets(self._http))
        self.uploads = Uploads(AsyncUploads(self._http))
        self.prompts = Prompts(AsyncPrompts(self._http))
        self.jobs = Jobs(AsyncJobs(self._http))
        self.distillations = Distillations(AsyncDistillations(self._http))
        self.transfers = Transfers(AsyncTransfers(self._http))
        self.evaluations = Evaluations(AsyncEvaluations(self._http))
        self.reports = Reports(AsyncReports(self._http))
        self.predictions = Predictions(AsyncPredictions(self._http))
        self.completions = Completions(AsyncCompletions(self._http))
        self.server = Server(AsyncServer(self._http))

    def ready(self) -> Health:
        """Check that the server is ready.

        Raises:
            Unavailable: it isn't ready, or nothing responds at the address.
        """
        return self.server.ready()

    def close(self) -> None:
        """Close the connections."""
        run(self._http.wire.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _server_and_key(url: str | None, api_key: str | None) -> tuple[str, str]:
    """The server's address and the API key, from the arguments or the environment.

    Raises:
        InvalidInput: one of them is missing.
    """
    address = url or os.environ.get(URL_VARIABLE)
    key = api_key or os.environ.get(KEY_VARIABLE)
    if not address:
        raise InvalidInput(f"no server address: set it with Client(url=...), --url or {URL_VARIABLE}")
    if not key:
        raise InvalidInput(
            f"no API key: ask the provider for one (post key create) and set it with Client(api_key=...) "
            f"or {KEY_VARIABLE}"
        )
    return address, key
