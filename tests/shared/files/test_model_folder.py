"""A model is identified by the hash of its files, and each kind of unsafe folder is refused with the reason."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from post_shared.errors import IntegrityError, ModelUnsafe
from post_shared.files.model_folder import check_path, check_safe, manifest, model_hash, verify
from post_shared.schemas.models import ModelFile
from tests.models import tiny_model

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small safe model folder."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    write_json(path / "tokenizer.json", {"model": {"vocab": {"auto_map": 17, "a": 0}}})
    (path / "merges.txt").write_text("a b\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float16)}, path / "model.safetensors")
    return path


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


# --- manifest and hash --------------------------------------------------------------------------------


def test_the_hash_is_the_sha256_of_the_canonical_json(folder: Path) -> None:
    files = manifest(folder)
    assert [file.path for file in files] == sorted(file.path for file in files)
    expected = [
        {
            "path": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in sorted(folder.iterdir())
    ]
    canonical = json.dumps(expected, separators=(",", ":"))
    assert model_hash(files) == hashlib.sha256(canonical.encode()).hexdigest()
    assert model_hash(files[::-1]) == model_hash(files)
    verify(folder, files)


def test_a_model_that_post_saves_is_safe_and_keeps_its_hash(tmp_path: Path) -> None:
    for family in ("llama", "roberta"):
        tiny_model(family).save(tmp_path / family)
        check_safe(tmp_path / family)
        tiny_model(family).save(tmp_path / "again" / family)
        assert model_hash(manifest(tmp_path / family)) == model_hash(manifest(tmp_path / "again" / family))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "merges.txt").write_text("a c\n"), "merges.txt differs"),
        (lambda folder: (folder / "merges.txt").write_text("a b\n\n"), "merges.txt differs"),
        (lambda folder: (folder / "merges.txt").unlink(), "merges.txt is missing"),
        (lambda folder: (folder / "more.txt").write_text("x"), "more.txt isn't in the manifest"),
    ],
)
def test_a_changed_folder_is_noticed(folder: Path, change: Callable[[Path], object], reason: str) -> None:
    files = manifest(folder)
    change(folder)
    with pytest.raises(IntegrityError, match=reason):
        verify(folder, files)


def test_the_hash_covers_names_and_sizes(folder: Path) -> None:
    files = manifest(folder)
    first = files[0]
    for other in (
        ModelFile(path="a.txt", size=first.size, sha256=first.sha256),
        ModelFile(path=first.path, size=first.size + 1, sha256=first.sha256),
        ModelFile(path=first.path, size=first.size, sha256="0" * 64),
    ):
        assert model_hash([other, *files[1:]]) != model_hash(files)


# --- unsafe folders -----------------------------------------------------------------------------------


def test_the_safe_folder_is_safe_and_so_are_shards(folder: Path) -> None:
    check_safe(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"weight": "model.safetensors"}})
    write_json(folder / "config.json", CONFIG | {"attn_implementation": "sdpa", "_attn_implementation": None})
    check_safe(folder)


def config(**members: object) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / "config.json", CONFIG | members)


def weights(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def header(document: object, body: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + body


def index(**weight_map: str) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({})), "pytorch_model.bin"),
    "pickle by another name": (weights(pickle.dumps({"weight": 1})), "model.safetensors"),
    "Python code": (lambda f: (f / "modeling_evil.py").write_text("import os"), "modeling_evil.py"),
    "GGUF": (lambda f: (f / "model.gguf").write_bytes(b"GGUF"), "model.gguf"),
    "a shared library": (lambda f: (f / "kernel.so").write_bytes(b"\x7fELF"), "kernel.so"),
    "no suffix": (lambda f: (f / "weights").write_bytes(b""), "weights"),
    "hidden file": (lambda f: (f / ".config.json").write_text("{}"), "hidden"),
    "adapter": (lambda f: write_json(f / "adapter_config.json", {"base_model_name_or_path": "x/y"}), "adapter"),
    "link to a file": (lambda f: (f / "extra.json").symlink_to("/etc/passwd"), "link"),
    "link to a folder": (lambda f: (f / "more").symlink_to("/etc"), "link"),
    "remote code": (config(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "remote code, deep": (config(text_config={"x": [{"auto_map": {"AutoConfig": "a/b--c.D"}}]}), "auto_map"),
    "remote tokenizer": (
        lambda f: write_json(f / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}),
        "tokenizer_config.json: 'auto_map'",
    ),
    "trust_remote_code": (config(trust_remote_code=True), "trust_remote_code"),
    "kernel from elsewhere": (config(_attn_implementation="evil/kernels"), "_attn_implementation"),
    "kernel in parts": (config(attn_implementation={"text_config": "evil/kernels"}), "attn_implementation"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "absurd vocabulary": (config(vocab_size=10**12), "vocab_size"),
    "absurd width, deep": (config(text_config={"hidden_size": 10**9}), "hidden_size"),
    "fractional layers": (config(num_hidden_layers=1e9), "num_hidden_layers"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config nested deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "needs config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "needs config.json and weights"),
    "2 GB header": (weights((2 * 2**30).to_bytes(8, "little") + b"{}"), "header of 2147483648"),
    "empty weights": (weights(b""), "0 bytes"),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "truncated",
    ),
    "overlapping tensors": (
        weights(
            header(
                {
                    "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                },
                b"\0" * 4,
            )
        ),
        "starts at byte 0",
    ),
    "shape and bytes differ": (
        weights(header({"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 4]}}, b"\0" * 4)),
        "offsets",
    ),
    "shards elsewhere": (index(weight="../other/model.safetensors"), "leaves the model's folder"),
    "shards by absolute path": (index(weight="/etc/passwd"), "leaves the model's folder"),
    "missing shard": (index(weight="model-2.safetensors"), "missing"),
    "shard list not an object": (
        lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": ["x"]}),
        "weight_map",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_folder_is_refused_with_the_reason(name: str, folder: Path) -> None:
    change, reason = UNSAFE[name]
    change(folder)
    with pytest.raises(ModelUnsafe, match=reason):
        check_safe(folder)


def test_a_model_larger_than_allowed_is_refused(folder: Path) -> None:
    with pytest.raises(ModelUnsafe, match="larger"):
        check_safe(folder, max_bytes=100)


def test_an_enormous_sparse_file_is_refused_without_reading_it(folder: Path) -> None:
    with (folder / "extra.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ModelUnsafe, match=r"extra.json.*larger"):
        check_safe(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsafe, match="no such folder"):
        check_safe(tmp_path / "nothing")


@pytest.mark.parametrize("path", ["config.json", "model-00001-of-00002.safetensors", "sub/tokenizer.model"])
def test_plain_paths_are_accepted(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "../config.json",
        "/config.json",
        "a/../../config.json",
        "./config.json",
        "a//config.json",
        "..\\config.json",
        "C:\\config.json",
        "C:config.json",
        "config.json ",
        "config.json\0",
        "config.json\n",
        "-rf.json",
        "~root.json",
        ".ssh/keys.json",
        "ｃonfig.json",
        "a" * 300 + ".json",
        "config.py",
        "config",
        "model.bin",
        "model.PKL",
        "sub/adapter_config.json",
    ],
)
def test_tricky_paths_are_refused(path: str) -> None:
    with pytest.raises(ModelUnsafe):
        check_path(path)
