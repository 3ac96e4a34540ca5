"""``client.models``: target and student models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

from post_client.resources._sync import AsyncResource, Resource, blocking, iterating
from post_client.students.download import DownloadProgress, download_student, ignore
from post_shared.schemas.models import Model, ModelManifest, ModelRole


class AsyncModels(AsyncResource):
    """``client.models`` of an :class:`post_client.AsyncClient`"""

    async def get(self, model: str) -> Model:
        """One model, by id or name."""
        return await self._http.get(f"/v1/models/{quote(model, safe='')}", Model)

    def list(self, *, role: ModelRole | str | None = None) -> AsyncIterator[Model]:
        """All models, or those of one role."""
        return self._http.pages("/v1/models", Model, role=str(role) if role else None)

    async def manifest(self, model: str) -> ModelManifest:
        """Every file of a model with its size and SHA-256."""
        return await self._http.get(f"/v1/models/{quote(model, safe='')}/manifest", ModelManifest)

    async def download(
        self, model: str, folder: Path, *, pin: str | None = None, progress: DownloadProgress = ignore
    ) -> ModelManifest:
        """Download a student into ``folder``: resumable, verified by hash, and atomic.

        ``pin`` is the model hash that you expect; a student with another hash is refused.

        Raises:
            IntegrityError, ModelUnsafe, Conflict: as :func:`post_client.students.download.download_student`.
        """
        return await download_student(self._http, await self.manifest(model), folder, pin=pin, progress=progress)


class Models(Resource[AsyncModels]):
    """``client.models``"""

    get = blocking(AsyncModels.get)
    list = iterating(AsyncModels.list)
    manifest = blocking(AsyncModels.manifest)
    download = blocking(AsyncModels.download)
