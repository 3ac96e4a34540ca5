"""The provider's commands, run as a user runs them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from post_server.auth.keys import authenticate, list_keys
from post_server.db.database import Database
from post_server.models.service import find_model, materialise_model, model_files
from post_server.settings import Settings, get_settings
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Conflict, DataInvalid, InvalidInput, ModelUnsafe, PostError
from post_shared.files.model_folder import SUFFIXES, verify
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.common import Role
from post_shared.schemas.models import ModelRole
from tests.models import tiny_model
from tests.server.terminal import run


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("POST_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def test_a_key_is_printed_once_and_works_until_revoked(settings: Settings) -> None:
    key = run("key", "create", "--role", "owner", "--name", "alice").strip()
    database = Database.from_settings(settings)
    with database.read() as session:
        row = authenticate(session, key)
        assert (row.name, row.role) == ("alice", Role.OWNER)
    for shown in (run("key", "list"), run("key", "list", "--json")):
        assert key not in shown
        assert row.id in shown
    run("key", "revoke", "alice")
    with database.read() as session, pytest.raises(PostError):
        authenticate(session, key)
    with pytest.raises(PostError):
        run("key", "revoke", "alice")


def test_a_key_with_one_scope_and_an_expiry_is_rotated(settings: Settings) -> None:
    old = run("key", "create", "--role", "owner", "--name", "app", "--scope", "predict", "--expires-days", "30").strip()
    new = run("key", "rotate", "app", "--grace-hours", "1").strip()
    assert old != new
    shown = run("key", "list")
    assert "predict" in shown
    assert "transfer" not in shown
    assert old not in shown
    assert new not in shown
    with Database.from_settings(settings).read() as session:
        assert authenticate(session, old).id == authenticate(session, new).id
    assert "60 requests per minute" in run("key", "limit", "app", "--requests-per-minute", "60")
    assert "the server's limit" in run("key", "limit", "app")
    with pytest.raises(InvalidInput):
        run("key", "create", "--role", "owner", "--name", "app2", "--scope", "provide")


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_a_keys_name_must_be_printable(settings: Settings, name: str) -> None:
    with pytest.raises(InvalidInput):
        run("key", "create", "--role", "owner", "--name", name)
    with Database.from_settings(settings).read() as session:
        assert not Path(settings.home / "post.db").exists() or list_keys(session) == []


def test_a_model_is_stored_unchanged(settings: Settings, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3)
    model.save(tmp_path / "saved")
    assert "3 layers" in run("model", "add", str(tmp_path / "saved"), "--name", "tiny")
    assert "tiny" in run("model", "list")
    (listed,) = json.loads(run("model", "list", "--json"))
    assert (listed["name"], listed["layers"]) == ("tiny", 3)
    store = BlobStore.from_settings(settings)
    with Database.from_settings(settings).read() as session:
        row = find_model(session, "tiny", ModelRole.TARGET)
    assert (row.layers, row.hidden_size, row.kind) == (3, model.hidden_size, "causal")
    folder = materialise_model(store, row, tmp_path / "again")
    verify(folder, model_files(row))
    with pytest.raises(Conflict):
        run("model", "add", str(tmp_path / "saved"), "--name", "tiny")
    with pytest.raises(InvalidInput):
        run("model", "add", str(tmp_path / "saved"), "--name", "No Name")


def test_an_unsafe_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    tiny_model("llama").save(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModelForCausalLM": "evil.Evil"},', 1))
    with pytest.raises(ModelUnsafe):
        run("model", "add", str(tmp_path / "saved"), "--name", "tiny")
    assert "tiny" not in run("model", "list")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"attn_implementation": "someone/kernel"}),
        ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("config.json", {"hidden_size": 10**9}),
        ("adapter_config.json", {"base_model_name_or_path": "someone/model"}),
        ("tokenizer_config.json", {"vocab": "/etc/hostname"}),
        ("tokenizer_config.json", {"merges": "../outside.txt"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ],
)
def test_a_source_is_checked_before_any_library_loads_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: dict[str, object]
) -> None:
    tiny_model("llama").save(tmp_path / "saved")
    place = tmp_path / "saved" / file
    place.write_text(json.dumps((json.loads(place.read_text()) if place.exists() else {}) | content))
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelUnsafe):
        run("model", "add", str(tmp_path / "saved"), "--name", "tiny")


def test_nothing_but_models_files_is_within_reach_of_a_loader(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    tiny_model("llama").save(saved)
    (saved / "pytorch_model.bin").write_bytes(b"a pickle")
    (saved / "modeling_evil.py").write_text("raise SystemExit")
    (saved / "README.md").write_text("# A model")
    seen: list[tuple[set[str], bool]] = []
    load, from_pretrained = LanguageModel.load, AutoConfig.from_pretrained

    def watched(source: Path, **options: object) -> LanguageModel:
        seen.append(({each.suffix for each in Path(source).iterdir()}, Path(source) == saved))
        return load(source, **options)  # type: ignore[arg-type]

    def offline(source: str, **options: object) -> object:
        assert options["local_files_only"] is True
        return from_pretrained(source, **options)

    monkeypatch.setattr(LanguageModel, "load", watched)
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    run("model", "add", str(saved), "--name", "tiny")
    ((suffixes, original),) = seen
    assert suffixes <= SUFFIXES
    assert not original


def test_a_link_out_of_the_folder_is_refused_and_those_of_the_hub_cache_are_not(
    settings: Settings, tmp_path: Path
) -> None:
    cache = tmp_path / "models--someone--model"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    tiny_model("llama").save(snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"sha-{file.name}")
        file.symlink_to(Path("..", "..", "blobs", f"sha-{file.name}"))
    assert "layers" in run("model", "add", str(snapshot), "--name", "cached")
    (tmp_path / "secret.txt").write_text("a secret")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ModelUnsafe, match="leads out of the folder"):
        run("model", "add", str(snapshot), "--name", "leaking")


@pytest.mark.parametrize("source", ["nothing", "./no/where", "a/b/c", "README"])
def test_a_source_that_is_not_there_says_what_may_be_given(settings: Settings, source: str) -> None:
    with pytest.raises(InvalidInput, match="hub id has the form"):
        run("model", "add", source, "--name", "tiny")


def test_datasets_of_every_format_become_plain_ones(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,label,id\n"good, very",positive,1\nbad,negative,2\n')
    (tmp_path / "prose.txt.gz").write_bytes(gzip.compress(b"One.\n\n  Two  lines. \n"))
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    assert "2 rows, negative, positive" in run(
        "dataset", "add", str(tmp_path / "rows.csv"), "--name", "rows", "--licence", "MIT"
    )
    assert "2 paragraphs" in run("dataset", "add", str(tmp_path / "prose.txt.gz"), "--name", "prose")
    with pytest.raises(DataInvalid, match=r"bad\.jsonl, line 2"):
        run("dataset", "add", str(tmp_path / "bad.jsonl"), "--name", "bad")
    shown = run("dataset", "list")
    assert "rows" in shown
    assert "prose" in shown
    assert "bad" not in shown
    store = BlobStore.from_settings(settings)
    contents = sorted(store.read(each) for each in store.list())
    assert contents == [
        b"One.\nTwo lines.\n",
        b'{"text": "good, very", "label": "positive"}\n{"text": "bad", "label": "negative"}\n',
    ]
    assert not list((settings.home / "blobs" / "tmp").iterdir())


def test_help_imports_no_heavy_modules(tmp_path: Path) -> None:
    code = """
import sys, typer
from post_server.cli import register
app = typer.Typer(); register(app)
heavy = {"torch", "transformers", "sqlalchemy", "fastapi", "celery", "alembic"} & sys.modules.keys()
sys.exit(", ".join(heavy) if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"POST_HOME": str(tmp_path)})
