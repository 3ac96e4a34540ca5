"""A model as a folder of files: its manifest, its hash, and checks that refuse unsafe folders. Never imports torch.

The data owner doesn't trust the provider's model, and the provider doesn't trust a model from the internet. A folder
may contain weights in safetensors, a tokenizer and configurations, but nothing that runs code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from post_shared.errors import IntegrityError, ModelUnsafe
from post_shared.files.safetensors_header import PREFIX, HeaderInvalid, header_length, parse_header
from post_shared.schemas.models import ModelFile

SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})
WEIGHTS = ".safetensors"
REFUSED_NAMES = frozenset({"adapter_config.json"})
"""Such a file makes transformers fetch a base model by name."""
REFUSED_MEMBERS = {
    "auto_map": "it names Python code to run",
    "custom_pipelines": "it names Python code to run",
    "trust_remote_code": "it asks for Python code to run",
    "quantization_config": "POST takes plain weights only; convert the model first",
}
PATH_MEMBERS = frozenset({"vocab", "merges"})
"""As strings, they make transformers read a tokenizer's parts from any file of this machine."""
KERNEL_MEMBERS = ("attn_implementation", "experts_implementation")
"""Members whose names contain these, such as ``_attn_implementation_internal``, select the kernel of a layer."""
PLAIN_KERNELS = (None, "eager", "sdpa")
"""Other kernel names can make transformers fetch code."""
MAX_FILES = 2_000
MAX_HEADER = 64 * 2**20
MAX_TOTAL = 2**40
MAX_SIZE = {".json": 256 * 2**20, ".txt": 256 * 2**20, ".model": 256 * 2**20, ".jinja": 2**20, WEIGHTS: MAX_TOTAL}
DIMENSIONS = {
    "vocab_size": 2**23,
    "hidden_size": 2**17,
    "n_embd": 2**17,
    "d_model": 2**17,
    "intermediate_size": 2**20,
    "n_inner": 2**20,
    "num_hidden_layers": 2**12,
    "n_layer": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "num_local_experts": 2**12,
    "max_position_embeddings": 2**27,
    "type_vocab_size": 2**16,
}
"""Limits on the sizes in a configuration, since a loader allocates memory by them."""


# --- manifest -----------------------------------------------------------------------------------------


def manifest(folder: Path) -> list[ModelFile]:
    """Every file of the folder with its size and SHA-256, sorted by path.

    Raises:
        ModelUnsafe: a path isn't plain, or is a link.
    """
    return [
        ModelFile(path=path, size=(folder / path).stat().st_size, sha256=sha256_of(folder / path))
        for path in _paths(folder)
    ]


def model_hash(files: Sequence[ModelFile]) -> str:
    """SHA-256 of the canonical JSON ``[{"path","sha256","size"}, …]``, sorted by path: the model's identity."""
    entries = [{"path": file.path, "sha256": file.sha256, "size": file.size} for file in files]
    entries.sort(key=lambda entry: str(entry["path"]))
    canonical = json.dumps(entries, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def verify(folder: Path, files: Sequence[ModelFile]) -> None:
    """Check that the folder contains exactly these files.

    Raises:
        IntegrityError: names the first file that is missing, unexpected or different.
    """
    expected = {file.path: file for file in files}
    present = set(_paths(folder))
    for path in sorted(present ^ set(expected)):
        problem = "isn't in the manifest" if path in present else "is missing"
        raise IntegrityError(f"{folder.name}: {path} {problem}; pull the model again")
    for path, file in sorted(expected.items()):
        size = (folder / path).stat().st_size
        if size != file.size or sha256_of(folder / path) != file.sha256:
            raise IntegrityError(f"{folder.name}: {path} differs from the manifest; pull the model again")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- safety -------------------------------------------------------------------------------------------


def check_path(path: str) -> None:
    """Check a path from a manifest before it is used on the disk: relative, plain and of a known file type.

    Raises:
        ModelUnsafe: names the problem.
    """
    parts = path.split("/")
    shown = repr(path[:80])
    if len(path) > 255 or not path.isascii() or not path.isprintable() or set(path) & set('\\:*?"<>|'):
        raise ModelUnsafe(
            f'{shown} is not a plain file name: only printable ASCII without \\ : * ? " < > | is accepted'
        )
    if any(part in ("", ".", "..") or part[0] in ".~ -" or part[-1] in ". " for part in parts):
        raise ModelUnsafe(f"{shown} leaves the model's folder or is hidden in it")
    if Path(parts[-1]).suffix not in SUFFIXES:
        raise ModelUnsafe(
            f"{shown} has a file type that POST doesn't load; a model consists of {', '.join(sorted(SUFFIXES))} files "
            "(save weights as safetensors: pickles can run code)"
        )
    if parts[-1] in REFUSED_NAMES:
        raise ModelUnsafe(f"{shown}: the folder is an adapter, not a model; merge it into its base model first")


def check_safe(folder: Path, *, max_bytes: int = MAX_TOTAL) -> None:
    """Check that nothing in the folder runs code, points outside it or claims absurd sizes when it is loaded.

    Raises:
        ModelUnsafe: names the file and the reason.
    """
    total, paths = 0, list(_paths(folder))
    for path in paths:
        size, suffix = (folder / path).stat().st_size, Path(path).suffix
        total += size
        if size > MAX_SIZE[suffix] or total > max_bytes:
            raise ModelUnsafe(f"{path}: {size} bytes are larger than a model's file may be")
        _CHECKS.get(suffix, _no_check)(folder, path)
    if "config.json" not in paths or not any(path.endswith(WEIGHTS) for path in paths):
        raise ModelUnsafe(f"{folder.name}: a model needs config.json and weights in .safetensors")


def stage(source: Path, folder: Path) -> None:
    """Link or copy those files of a model's folder that POST loads into the empty ``folder``, and check them there.

    So nothing else, such as a pickle beside the weights, is within reach of a library that loads a model.

    Raises:
        ModelUnsafe: a file is unsafe, or a link leads out of the folder.
    """
    root = source.resolve()
    blobs = root.parent.parent / "blobs"  # where the Hugging Face cache keeps the files of a snapshot
    for file in sorted(source.iterdir()):
        if file.suffix not in SUFFIXES or not file.is_file() or file.name.startswith("."):
            continue
        real = file.resolve()
        if root not in real.parents and blobs not in real.parents:
            raise ModelUnsafe(f"{file.name} is a link that leads out of the folder; copy the file into it")
        place_file(real, folder / file.name)
    check_safe(folder)


def place_file(file: Path, place: Path) -> None:
    """A copy; of weights a hard link, where the file system has them.

    A link would let whoever can write the source change a configuration after it was checked.
    """
    if place.suffix in {WEIGHTS, ".gguf"}:
        with suppress(OSError):
            os.link(file, place)
            return
    shutil.copyfile(file, place)


def _paths(folder: Path) -> Iterator[str]:
    """Relative paths, sorted; all plain, none a link, at most ``MAX_FILES``."""
    if not folder.is_dir():
        raise ModelUnsafe(f"{folder}: there is no such folder")
    paths: list[str] = []
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            file = Path(parent, name)
            path = file.relative_to(folder).as_posix()
            if file.is_symlink() or not (file.is_dir() or file.is_file()):
                raise ModelUnsafe(f"{path} is a link or not a regular file")
            if file.is_file():
                check_path(path)
                paths.append(path)
        if len(paths) > MAX_FILES:
            raise ModelUnsafe(f"{folder.name}: more than {MAX_FILES} files")
    return iter(sorted(paths))


def _no_check(folder: Path, path: str) -> None:
    return


def _check_weights(folder: Path, path: str) -> None:
    size = (folder / path).stat().st_size
    with (folder / path).open("rb") as file:
        try:
            length = header_length(file.read(PREFIX), size, MAX_HEADER)
            parse_header(file.read(length), size - PREFIX - length)
        except HeaderInvalid as error:
            raise ModelUnsafe(f"{path}: not a valid safetensors file: {error}") from error


def _check_json(folder: Path, path: str) -> None:
    try:
        document = json.loads((folder / path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelUnsafe(f"{path}: not JSON") from error
    for name, value in _members(document):
        # In a vocabulary, such a word may be a token, whose value is a number.
        if name in REFUSED_MEMBERS and type(value) is not int and value is not None:
            raise ModelUnsafe(f"{path}: {name!r} is refused: {REFUSED_MEMBERS[name]}")
        if name in PATH_MEMBERS and isinstance(value, str):
            raise ModelUnsafe(f"{path}: {name!r} is refused: it names a file to read")
        if any(member in name for member in KERNEL_MEMBERS) and not _plain_kernel(value):
            raise ModelUnsafe(f"{path}: {name!r} is refused: it can name code to fetch")
        if name == "weight_map" and path.endswith(".index.json"):
            _check_weight_map(folder, path, value)
        if Path(path).name == "config.json" and name in DIMENSIONS:
            _check_dimension(path, name, value)


def _plain_kernel(value: Any) -> bool:
    chosen = list(value.values()) if isinstance(value, dict) else [value]
    return all(kernel in PLAIN_KERNELS or type(kernel) is int for kernel in chosen)


def _check_weight_map(folder: Path, path: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ModelUnsafe(f"{path}: 'weight_map' is not an object")
    for name in set(map(str, value.values())):
        check_path(name)
        if not (folder / path).parent.joinpath(name).is_file():
            raise ModelUnsafe(f"{path}: the weights {name!r} are missing")


def _check_dimension(path: str, name: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if number is not None and (type(number) is not int or not -1 <= number <= DIMENSIONS[name]):
            raise ModelUnsafe(f"{path}: {name!r} is {str(number)[:40]}; expected an integer up to {DIMENSIONS[name]}")


def _members(document: Any) -> Iterator[tuple[str, Any]]:
    """Every named member of a JSON document, at any depth."""
    remaining = [document]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            yield from value.items()
            remaining.extend(value.values())
        elif isinstance(value, list):
            remaining.extend(value)


_CHECKS: dict[str, Callable[[Path, str], None]] = {WEIGHTS: _check_weights, ".json": _check_json}
