"""``client.datasets``: public data sets at the provider. Never upload private data."""

from __future__ import annotations

import io
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.resources._sync import AsyncResource, Resource, blocking, iterating
from post_client.resources.uploads import AsyncUploads
from post_shared.errors import DataInvalid
from post_shared.schemas.datasets import Dataset, DatasetKind, DatasetPreview

IN_PARTS = 32 * 2**20
"""Bytes. A larger file is uploaded in parts, so a broken connection costs one part."""


class AsyncDatasets(AsyncResource):
    """``client.datasets`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self, *, name: str, kind: DatasetKind | str, content: Path | bytes, licence: str | None = None
    ) -> Dataset:
        """Upload public data (provider): JSON Lines for ``rows``, plain text for ``corpus``.

        Raises:
            DataInvalid: the file doesn't exist.
        """
        if isinstance(content, Path) and not content.is_file():
            raise DataInvalid(f"{content}: no such file")

        if isinstance(content, Path) and content.stat().st_size > IN_PARTS:
            uploads = AsyncUploads(self._http)
            upload = await uploads.create(name=name, kind=kind, licence=licence)
            return await uploads.send(upload.id, file=content)

        def open_content() -> IO[bytes]:
            return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)

        size = content.stat().st_size if isinstance(content, Path) else len(content)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
            "Idempotency-Key": str(uuid.uuid4()),
        }
        params = {"name": name, "kind": str(kind), "licence": licence}
        response = await self._http.send(
            "POST", "/v1/datasets", params=params, content=open_content, headers=headers, idempotent=True
        )
        return parse(response, Dataset)

    async def get(self, dataset: str) -> Dataset:
        """One data set, by id or name."""
        return await self._http.get(f"/v1/datasets/{quote(dataset, safe='')}", Dataset)

    def list(self) -> AsyncIterator[Dataset]:
        """All data sets."""
        return self._http.pages("/v1/datasets", Dataset)

    async def preview(self, dataset: str, *, rows: int = 10) -> DatasetPreview:
        """The first rows of a data set; long texts are truncated."""
        return await self._http.get(f"/v1/datasets/{quote(dataset, safe='')}/preview", DatasetPreview, rows=rows)


class Datasets(Resource[AsyncDatasets]):
    """``client.datasets``"""

    create = blocking(AsyncDatasets.create)
    get = blocking(AsyncDatasets.get)
    list = iterating(AsyncDatasets.list)
    preview = blocking(AsyncDatasets.preview)
