"""Public data sets at the provider that come in parts, each of which can be sent again."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.resources._sync import AsyncNoun, Noun, blocking, iterating
from post_shared.errors import DataInvalid
from post_shared.schemas.datasets import Dataset, DatasetKind
from post_shared.schemas.uploads import Upload, UploadCreate, UploadFinish

PART_BYTES = 8 * 2**20
"""What is sent at once, if the provider takes so much."""


def _ignore(done: int, total: int) -> None: ...


class AsyncUploads(AsyncNoun):
    """``client.uploads`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(self, *, name: str, kind: DatasetKind | str, licence: str | None = None) -> Upload:
        """Begin to upload a public data set in parts. ``client.datasets.create`` does all of it."""
        body = UploadCreate(name=name, kind=DatasetKind(kind), licence=licence)
        return await self._http.create("/v1/uploads", body, Upload)

    async def get(self, upload: str) -> Upload:
        """What has come so far."""
        return await self._http.get(_path(upload), Upload)

    def list(self) -> AsyncIterator[Upload]:
        """Your uploads that aren't finished."""
        return self._http.pages("/v1/uploads", Upload)

    async def put(self, upload: str, *, number: int, content: bytes) -> Upload:
        """Send one part; sent again, it replaces what was there."""
        headers = {"Content-Type": "application/octet-stream"}
        path = f"{_path(upload)}/parts/{number}"
        return parse(await self._http.send("PUT", path, content=content, headers=headers, repeat=True), Upload)

    async def finish(self, upload: str, *, sha256: str | None = None) -> Dataset:
        """Make the data set of all parts; ``sha256`` is what they must have together."""
        return await self._http.create(f"{_path(upload)}/finish", UploadFinish(sha256=sha256), Dataset)

    async def delete(self, upload: str) -> None:
        """Give an upload up, with all its parts."""
        await self._http.send("DELETE", _path(upload), repeat=False)

    async def send(self, upload: str, *, file: Path, progress: Callable[[int, int], None] = _ignore) -> Dataset:
        """Send every part of a file that isn't there yet, then finish; called again, it goes on where it stopped.

        Raises:
            DataInvalid: there is no such file.
        """
        if not file.is_file():
            raise DataInvalid(f"{file}: there is no such file")
        known = await self.get(upload)
        there = {part.number: part.sha256 for part in known.parts}
        total = file.stat().st_size
        size = min(known.part_bytes, max(PART_BYTES, -(-total // known.most_parts)))
        whole = hashlib.sha256()
        with file.open("rb") as source:
            number = 0
            while part := await self._http.wire.work(lambda: source.read(size)):
                number += 1
                whole.update(part)
                if there.get(number) != hashlib.sha256(part).hexdigest():
                    await self.put(upload, number=number, content=part)
                progress(source.tell(), total)
        return await self.finish(upload, sha256=whole.hexdigest())


def _path(upload: str) -> str:
    return f"/v1/uploads/{quote(upload, safe='')}"


class Uploads(Noun[AsyncUploads]):
    """``client.uploads`` (provider)"""

    create = blocking(AsyncUploads.create)
    get = blocking(AsyncUploads.get)
    list = iterating(AsyncUploads.list)
    put = blocking(AsyncUploads.put)
    finish = blocking(AsyncUploads.finish)
    delete = blocking(AsyncUploads.delete)
    send = blocking(AsyncUploads.send)
