"""Fetch a student model: resumable, every byte checked, in place at once or not at all.

The server is not trusted: paths, sizes and contents are checked against the manifest, the manifest against
its hash, the hash against the one that you know (if you do), and the folder against anything that runs code.
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
"""``progress(bytes done, bytes in all)``"""


def ignore(done: int, total: int) -> None:
    """The progress for those who don't want to know."""


async def download_student(
    http: Http,
    wanted: ModelManifest,
    folder: Path,
    *,
    pin: str | None = None,
    progress: DownloadProgress = ignore,
) -> ModelManifest:
    """Fetch the files of ``wanted`` into ``folder``, which must be new, empty, or hold just this model.

    Raises:
        IntegrityError: a hash differs: the manifest's, a file's, or the pinned one.
        ModelUnsafe: a path leaves the folder, or a file could run code.
        Conflict: the folder holds something else.
    """
    _check_manifest(wanted, pin)
    total = sum(file.size for file in wanted.files)
    if await http.wire.work(lambda: _holds(folder, wanted.files)):
        progress(total, total)
        return wanted
    partial = folder.absolute().parent / f".{folder.absolute().name}.{wanted.hash[:16]}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_space(partial, total)
        done = 0
        for file in wanted.files:
            await _fetch(http, wanted.model_id, file, partial / file.path, _after(done, total, progress))
            done += file.size
        _remove_strangers(partial, wanted.files)
        await http.wire.work(lambda: verify(partial, wanted.files))
        check_safe(partial)
        os.replace(partial, folder)
    except ModelUnsafe:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise InvalidInput(f"{folder}: can't write the student there: {error.strerror or error}") from error
    return wanted


def student_hash(folder: Path, pin: str | None = None) -> str:
    """The hash by which a prompt names the student in ``folder``. Refuses a folder that isn't safe to load.

    Raises:
        IntegrityError: it isn't ``pin``: the student changed since it was pulled.
    """
    check_safe(folder)
    digest = model_hash(manifest(folder))
    if pin is not None and digest != pin:
        raise IntegrityError(
            f"{folder} has hash {digest}, but you know it as {pin}: it was changed since, and no provider would take a "
            "prompt for it. Pull it again"
        )
    return digest


# --- checks -------------------------------------------------------------------------------------------


def _check_manifest(wanted: ModelManifest, pin: str | None) -> None:
    if pin is not None and pin != wanted.hash:
        raise IntegrityError(
            f"{wanted.name} has hash {wanted.hash}, but you know it as {pin}: the provider changed it. "
            "Ask why before you tune on it; prompts of the old one don't fit the new one"
        )
    seen: set[str] = set()
    for file in wanted.files:
        check_path(file.path)
        if file.size < 0 or file.path.lower() in seen:
            raise ModelUnsafe(f"{file.path}: listed twice, or with a negative size")
        seen.add(file.path.lower())
    if model_hash(wanted.files) != wanted.hash:
        raise IntegrityError(f"the manifest of {wanted.name} doesn't match its own hash; nothing was fetched")


def _holds(folder: Path, files: Sequence[ModelFile]) -> bool:
    """Whether the folder already holds just this model."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Conflict(f"{folder} is no folder; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        verify(folder, files)
    except (IntegrityError, ModelUnsafe) as error:
        raise Conflict(
            f"{folder} already holds something else ({error.detail}); choose another folder, or remove it"
        ) from error
    return True


def _check_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total - there > free:
        raise InvalidInput(f"{folder.parent}: {total:,} bytes don't fit, {free:,} are free")


def _remove_strangers(folder: Path, files: Sequence[ModelFile]) -> None:
    """What an interrupted run of an older version may have left."""
    names = {file.path for file in files}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _after(before: int, total: int, progress: DownloadProgress) -> Callable[[int], None]:
    return lambda so_far: progress(before + so_far, total)


# --- one file -----------------------------------------------------------------------------------------


async def _fetch(http: Http, model: str, file: ModelFile, path: Path, progress: Callable[[int], None]) -> None:
    """Append what is missing, then compare the hash. Bytes of a broken connection are kept for the next try."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise ModelUnsafe(f"{path.name}: a link is in the way")
    url = f"/v1/models/{quote(model, safe='')}/files/{quote(file.path)}"
    for attempt in range(2):
        if path.exists() and path.stat().st_size > file.size:
            path.unlink()
        resumed = path.exists() and path.stat().st_size > 0
        if not path.exists() or path.stat().st_size < file.size:
            await http.repeating(lambda: _append(http, url, file, path, progress), repeat=True)
        if await http.wire.work(lambda: sha256_of(path)) == file.sha256:
            progress(file.size)
            return
        path.unlink()
        if not resumed or attempt:  # only a resumed file may have had a bad start
            raise IntegrityError(f"{file.path} doesn't match its SHA-256; it was thrown away. Pull again")


async def _append(http: Http, url: str, file: ModelFile, path: Path, progress: Callable[[int], None]) -> httpx.Response:
    start = path.stat().st_size if path.exists() else 0
    headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.sha256}"'}
    try:
        async with http.stream("GET", url, headers=headers) as answer:
            if answer.status_code != 206:
                start = 0
            with path.open("ab" if start else "wb") as target:
                async for chunk in http.wire.chunks(answer):
                    start += len(chunk)
                    if start > file.size:
                        raise IntegrityError(f"{file.path} is longer than its manifest says")
                    target.write(chunk)
                    progress(start)
            if start < file.size:
                raise Unavailable(f"{file.path} broke off after {start:,} of {file.size:,} bytes; pull again to go on")
            return answer
    except RangeInvalid:
        path.unlink(missing_ok=True)
        raise Unavailable(f"{file.path} can't be resumed; starting it again") from None
