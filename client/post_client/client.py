"""The client of a provider's server: one attribute per noun of the API.

client = Client()                                   # POST_URL and POST_API_KEY from the environment
folder = client.models.download("smollm2-student", Path("student"))
prompt = client.prompts.upload(build_upload(prompt_file))
job = client.transfers.create(prompt=prompt.id, target="smollm2", dataset="amazon")
job.wait(progress=print)
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import httpx

from post_client._http import Http
from post_client.resources.datasets import Datasets
from post_client.resources.jobs import Distillations, Evaluations, Jobs, Reports, Transfers
from post_client.resources.models import Models
from post_client.resources.predictions import Predictions
from post_client.resources.prompts import Prompts
from post_shared.errors import InvalidInput
from post_shared.schemas import Health

URL_VARIABLE = "POST_URL"
KEY_VARIABLE = "POST_API_KEY"


class Client:
    """Speaks ``/v1`` of one server with one API key. Safe to share between threads; close it, or use ``with``.

    Errors are the classes of :mod:`post_shared.errors`. Requests that may be repeated without harm are
    repeated when the server is away or busy; others never.
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
        """``timeout`` is how long one answer may take in seconds; ``attempts`` how often a request is made at most."""
        address = url or os.environ.get(URL_VARIABLE)
        key = api_key or os.environ.get(KEY_VARIABLE)
        if not address:
            raise InvalidInput(f"which server? Give its address: Client(url=...), --url or {URL_VARIABLE}")
        if not key:
            raise InvalidInput(
                f"which API key? Ask the provider for one (post key create) and give it: Client(api_key=...) "
                f"or {KEY_VARIABLE}"
            )
        self._http = Http(address, key, timeout=timeout, attempts=attempts, transport=transport)
        self.models = Models(self._http)
        self.datasets = Datasets(self._http)
        self.prompts = Prompts(self._http)
        self.jobs = Jobs(self._http)
        self.distillations = Distillations(self._http)
        self.transfers = Transfers(self._http)
        self.evaluations = Evaluations(self._http)
        self.reports = Reports(self._http)
        self.predictions = Predictions(self._http)

    def ready(self) -> Health:
        """Whether the server can work now.

        Raises:
            Unavailable: it can't, or nothing answers there.
        """
        return self._http.get("/readyz", Health)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
