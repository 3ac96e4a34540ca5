"""Download a student model: resumable, verified by hash, and atomic.

The server is not trusted. Paths, sizes and contents are checked against the manifest, the manifest against its hash,
the hash against the one that you expect (if you pass it), and the folder for anything that runs code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import httpx

from post_client.http.session import Http
from post_shared.errors import Conflict, IntegrityError, InvalidInput, ModelUnsafe, RangeInvalid, Unavailable
from post_shared.files.model_folder import check_path, check_safe, manifest, model_hash, sha256_of, verify
from post_shared.schemas.models import ModelFile, ModelManifest

DownloadProgress = Callable[[int, int], None]
"""``progress(bytes done, bytes in total)``"""


def ignore(done: int, total: int) -> None:
    """The default progress callback; does nothing."""


async def download_student(
    http: Http,
    wanted: ModelManifest,
    folder: Path,
    *,
    pin: str | None = None,
    progress: DownloadProgress = ignore,
) -> ModelManifest:
    """Download the files of ``wanted`` into ``folder``, which must be new, empty, or contain exactly this model.

    Raises:
        IntegrityError: the hash of the manifest, of a file, or the pinned one doesn't match.
        ModelUnsafe: a path leaves the folder, or a file could run code.
        Conflict: the folder contains something else.
        InvalidInput: the folder can't be written, or the disk is too small.
    """
    _check_manifest(wanted, pin)
    total = sum(file.size for file in wanted.files)
    if await http.wire.run_sync(lambda: _already_complete(folder, wanted.files)):
        progress(total, total)
        return wanted
    partial = folder.absolute().parent / f".{folder.absolute().name}.{wanted.hash[:16]}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_space(partial, total)
        done = 0
        for file in wanted.files:
            await _fetch(http, wanted.model_id, file, partial / file.path, _offset_progress(done, total, progress))
            done += file.size
        _remove_unlisted(partial, wanted.files)
        await http.wire.run_sync(lambda: verify(partial, wanted.files))
        check_safe(partial)
        os.replace(partial, folder)
    except ModelUnsafe:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise InvalidInput(f"{folder}: can't write the student: {error.strerror or error}") from error
    return wanted


def student_hash(folder: Path, pin: str | None = None) -> str:
    """The model hash that a prompt file records for the student in ``folder``.

    Raises:
        ModelUnsafe: the folder isn't safe to load.
        IntegrityError: the hash isn't ``pin``: the student was changed since it was pulled.
    """
    check_safe(folder)
    digest = model_hash(manifest(folder))
    if pin is not None and digest != pin:
        raise IntegrityError(
            f"{folder} has hash {digest}, but {pin} was expected: it was changed since it was pulled, and no provider "
            "would accept a prompt for it. Pull it again"
        )
    return digest


# --- checks -------------------------------------------------------------------------------------------


def _check_manifest(wanted: ModelManifest, pin: str | None) -> None:
    if pin is not None and pin != wanted.hash:
        raise IntegrityError(
            f"{wanted.name} has hash {wanted.hash}, but {pin} was expected: the provider changed it. "
            "Ask why before you tune on it; prompts of the old student don't fit the new one"
        )
    seen: set[str] = set()
    for file in wanted.files:
        check_path(file.path)
        if file.size < 0 or file.path.lower() in seen:
            raise ModelUnsafe(f"{file.path}: listed twice, or with a negative size")
        seen.add(file.path.lower())
    if model_hash(wanted.files) != wanted.hash:
        raise IntegrityError(f"the manifest of {wanted.name} doesn't match its own hash; nothing was downloaded")


def _already_complete(folder: Path, files: Sequence[ModelFile]) -> bool:
    """Whether the folder already contains exactly this model."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Conflict(f"{folder} isn't a folder; choose another path")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        verify(folder, files)
    except (IntegrityError, ModelUnsafe) as error:
        raise Conflict(
            f"{folder} already contains something else ({error.detail}); choose another folder, or remove it"
        ) from error
    return True


def _check_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total - present > free:
        raise InvalidInput(f"{folder.parent}: {total:,} bytes are needed and {free:,} are free")


def _remove_unlisted(folder: Path, files: Sequence[ModelFile]) -> None:
    """Remove files that an interrupted download of an older version may have left."""
    names = {file.path for file in files}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _offset_progress(before: int, total: int, progress: DownloadProgress) -> Callable[[int], None]:
    return lambda so_far: progress(before + so_far, total)


# --- one file -----------------------------------------------------------------------------------------


async def _fetch(http: Http, model: str, file: ModelFile, path: Path, progress: Callable[[int], None]) -> None:
    """Download the rest of a file, then check its hash. A partial file is kept for the next attempt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise ModelUnsafe(f"{path.name}: the path is a symbolic link")
    url = f"/v1/models/{quote(model, safe='')}/files/{quote(file.path)}"
    for attempt in range(2):
        if path.exists() and path.stat().st_size > file.size:
            path.unlink()
        resumed = path.exists() and path.stat().st_size > 0
        if not path.exists() or path.stat().st_size < file.size:
            await http.with_retries(lambda: _append(http, url, file, path, progress), idempotent=True)
        if await http.wire.run_sync(lambda: sha256_of(path)) == file.sha256:
            progress(file.size)
            return
        path.unlink()
        if not resumed or attempt:  # only a resumed file may have begun with wrong bytes
            raise IntegrityError(f"{file.path} doesn't match its SHA-256 and was deleted; pull again")


async def _append(http: Http, url: str, file: ModelFile, path: Path, progress: Callable[[int], None]) -> httpx.Response:
    start = path.stat().st_size if path.exists() else 0
    headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.sha256}"'}
    try:
        async with http.stream("GET", url, headers=headers) as response:
            if response.status_code != 206:
                start = 0
            with path.open("ab" if start else "wb") as target:
                async for chunk in http.wire.chunks(response):
                    start += len(chunk)
                    if start > file.size:
                        raise IntegrityError(f"{file.path} is longer than the manifest states")
                    target.write(chunk)
                    progress(start)
            if start < file.size:
                raise Unavailable(f"{file.path} stopped after {start:,} of {file.size:,} bytes; pull again to resume")
            return response
    except RangeInvalid:
        path.unlink(missing_ok=True)
        raise Unavailable(f"{file.path} can't be resumed; restarting it") from None
