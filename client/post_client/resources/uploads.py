"""``client.uploads``: resumable uploads of public data sets in parts."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.resources._sync import AsyncResource, Resource, blocking, iterating
from post_shared.errors import DataInvalid
from post_shared.schemas.datasets import Dataset, DatasetKind
from post_shared.schemas.uploads import Upload, UploadCreate, UploadFinish

PART_BYTES = 8 * 2**20
"""Size of a part, unless the provider's limit is smaller."""


def _ignore(done: int, total: int) -> None: ...


class AsyncUploads(AsyncResource):
    """``client.uploads`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(self, *, name: str, kind: DatasetKind | str, licence: str | None = None) -> Upload:
        """Begin a multipart upload. ``client.datasets.create`` does the whole upload in one call."""
        body = UploadCreate(name=name, kind=DatasetKind(kind), licence=licence)
        return await self._http.create("/v1/uploads", body, Upload)

    async def get(self, upload: str) -> Upload:
        """The upload with the parts received so far."""
        return await self._http.get(_path(upload), Upload)

    def list(self) -> AsyncIterator[Upload]:
        """Your unfinished uploads."""
        return self._http.pages("/v1/uploads", Upload)

    async def put(self, upload: str, *, number: int, content: bytes) -> Upload:
        """Send one part; a part sent again replaces the earlier one."""
        headers = {"Content-Type": "application/octet-stream"}
        path = f"{_path(upload)}/parts/{number}"
        return parse(await self._http.send("PUT", path, content=content, headers=headers, idempotent=True), Upload)

    async def finish(self, upload: str, *, sha256: str | None = None) -> Dataset:
        """Assemble the data set from all parts; ``sha256`` is the expected hash of the whole file."""
        return await self._http.create(f"{_path(upload)}/finish", UploadFinish(sha256=sha256), Dataset)

    async def delete(self, upload: str) -> None:
        """Abort an upload and discard its parts."""
        await self._http.send("DELETE", _path(upload), idempotent=False)

    async def send(self, upload: str, *, file: Path, progress: Callable[[int, int], None] = _ignore) -> Dataset:
        """Send the missing parts of a file, then finish. Called again, it resumes.

        Raises:
            DataInvalid: the file doesn't exist.
        """
        if not file.is_file():
            raise DataInvalid(f"{file}: no such file")
        state = await self.get(upload)
        received = {part.number: part.sha256 for part in state.parts}
        total = file.stat().st_size
        size = min(state.part_bytes, max(PART_BYTES, -(-total // state.most_parts)))
        file_hash = hashlib.sha256()
        with file.open("rb") as source:
            number = 0
            while part := await self._http.wire.run_sync(lambda: source.read(size)):
                number += 1
                file_hash.update(part)
                if received.get(number) != hashlib.sha256(part).hexdigest():
                    await self.put(upload, number=number, content=part)
                progress(source.tell(), total)
        return await self.finish(upload, sha256=file_hash.hexdigest())


def _path(upload: str) -> str:
    return f"/v1/uploads/{quote(upload, safe='')}"


class Uploads(Resource[AsyncUploads]):
    """``client.uploads`` (provider)"""

    create = blocking(AsyncUploads.create)
    get = blocking(AsyncUploads.get)
    list = iterating(AsyncUploads.list)
    put = blocking(AsyncUploads.put)
    finish = blocking(AsyncUploads.finish)
    delete = blocking(AsyncUploads.delete)
    send = blocking(AsyncUploads.send)
