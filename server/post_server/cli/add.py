"""``post model`` and ``post dataset``: the stored models and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_server.cli.context import services
from post_shared.cli.output import AsJson, plain_table, print_json, print_table
from post_shared.errors import Conflict, InvalidInput
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.models import ModelRole

if TYPE_CHECKING:
    from post_server.db.database import Database

NameOption = Annotated[str, typer.Option("--name", help="A short name: lower-case letters, digits, '.', '_', '-'.")]
models = typer.Typer(no_args_is_help=True, help="Stored target and student models.")
datasets = typer.Typer(no_args_is_help=True, help="Stored public datasets.")


# --- models -------------------------------------------------------------------------------------------


@models.command("add")
def add_model_(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a Hugging Face hub id.")],
    name: NameOption,
    gguf_file: Annotated[str | None, typer.Option(help="The .gguf file within a folder or hub id.")] = None,
) -> None:
    """Add a target model: load it, check it and store it as safetensors."""
    import tempfile

    from post_server.auth.audit_log import local_user, record
    from post_server.models.service import add_model, model_facts

    with services() as (_, database, store), tempfile.TemporaryDirectory() as folder:
        _check_name(name)
        _refuse_taken_name(database, name)
        from post_shared.model.language_model import LanguageModel

        typer.echo(f"Loading {source} …", err=True)
        staged, saved = Path(folder, "source"), Path(folder, "saved")
        staged.mkdir()
        model = LanguageModel.load(_checked_source(source, gguf_file, staged), device="cpu")
        model.save(saved)
        with database.write() as session:
            row = add_model(session, store, saved, name=name, role=ModelRole.TARGET, **model_facts(model))
            record(session, local_user(), "model.add", row.id)
    typer.echo(f"{row.id}  {row.name}  {row.architecture}, {row.layers} layers, {row.parameters:,} parameters")


@models.command("list")
def list_models(json: AsJson = False) -> None:
    """All models, newest first."""
    from sqlalchemy import select

    from post_server.db.tables import ModelRow
    from post_server.models.service import model_document

    with services() as (_, database, _), database.read() as session:
        rows = session.scalars(select(ModelRow).order_by(ModelRow.created_at.desc())).all()
    if json:
        print_json([model_document(row).model_dump(mode="json") for row in rows])
        return
    table = plain_table("id", "name", "role", "architecture", "layers", "width", "parameters", "hash")
    for row in rows:
        facts = (str(row.layers), str(row.hidden_size), f"{row.parameters:,}", row.hash[:12])
        table.add_row(row.id, row.name, row.role.value, row.architecture, *facts)
    print_table(table)


# --- datasets -----------------------------------------------------------------------------------------


@datasets.command("add")
def add_dataset_(
    source: Annotated[Path, typer.Argument(help="JSON Lines, CSV, TSV or Parquet for rows; text for a corpus.")],
    name: NameOption,
    kind: Annotated[DatasetKind | None, typer.Option(help="Default: corpus for text, rows for other files.")] = None,
    licence: Annotated[str | None, typer.Option(help="An SPDX id or a few words.")] = None,
) -> None:
    """Add a public dataset. Private data must never be added: it stays with its owner."""
    from post_server.auth.audit_log import local_user, record
    from post_server.datasets.service import add_dataset, copy_as_dataset, summarise
    from post_server.storage.blob_references import uploaded_early

    _check_name(name)
    plain_text = source.name.removesuffix(".gz").endswith(".txt")
    kind = kind or (DatasetKind.CORPUS if plain_text else DatasetKind.ROWS)
    with services() as (_, database, store):
        copy = store.new_file()
        try:
            copy_as_dataset(source, kind, copy)
            summary = summarise(copy, kind)
            with uploaded_early(database, store, copy, summary.sha256), database.write() as session:
                row, is_new = add_dataset(session, store, copy, summary, name=name, kind=kind, licence=licence)
                if is_new:
                    record(session, local_user(), "dataset.add", row.id)
        finally:
            copy.unlink(missing_ok=True)
    labels = "no labels" if row.labels is None else ", ".join(row.labels[:12]) or "free answers"
    typer.echo(f"{row.id}  {row.name}  {row.rows:,} {'paragraphs' if kind is DatasetKind.CORPUS else 'rows'}, {labels}")


@datasets.command("list")
def list_datasets(json: AsJson = False) -> None:
    """All public datasets, newest first."""
    from sqlalchemy import select

    from post_server.datasets.service import dataset_document
    from post_server.db.tables import DatasetRow

    with services() as (_, database, _), database.read() as session:
        rows = session.scalars(select(DatasetRow).order_by(DatasetRow.created_at.desc())).all()
    if json:
        print_json([dataset_document(row).model_dump(mode="json") for row in rows])
        return
    table = plain_table("id", "name", "kind", "rows", "labels", "licence")
    for row in rows:
        labels = "" if row.labels is None else ", ".join(row.labels[:12])
        table.add_row(row.id, row.name, row.kind.value, f"{row.rows:,}", labels, row.licence or "")
    print_table(table)


def _checked_source(source: str, gguf_file: str | None, staged: Path) -> Path:
    """A folder or a GGUF file within ``staged`` with nothing but what POST loads, checked before any library loads it.

    Raises:
        InvalidInput: there is no such model.
        ModelUnsafe: a file is unsafe.
    """
    from post_shared.files.model_folder import SUFFIXES, place_file, stage

    folder = Path(source)
    if not folder.exists():
        if source.count("/") != 1 or source.startswith(("/", ".", "~")):
            raise InvalidInput(f"there is no folder or file {source!r}, and a hub id has the form owner/name")
        folder = _download(source, [gguf_file] if gguf_file else [f"*{suffix}" for suffix in SUFFIXES])
    if folder.is_file() and folder.suffix == ".gguf":
        folder, gguf_file = folder.parent, folder.name
    if gguf_file is None:
        if not folder.is_dir():
            raise InvalidInput(f"{source!r} is neither a folder nor a .gguf file")
        stage(folder, staged)
        return staged
    file = folder / gguf_file
    if Path(gguf_file).name != gguf_file or not file.is_file():
        raise InvalidInput(f"there is no file {gguf_file!r} in {source!r}")
    place_file(file.resolve(), staged / "model.gguf")
    return staged / "model.gguf"


def _download(hub_id: str, patterns: list[str]) -> Path:
    """The snapshot of a hub repository, without files of other types."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInput(f"can't download {hub_id!r}: {error}") from error


def _check_name(name: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from post_shared.schemas.common import Name

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise InvalidInput(
            f"{name!r} is not a valid name: up to 63 lower-case letters, digits, '.', '_' and '-'."
        ) from None


def _refuse_taken_name(database: Database, name: str) -> None:
    """Checked before the model is loaded, which may take minutes."""
    from sqlalchemy import select

    from post_server.db.tables import ModelRow

    with database.read() as session:
        if session.scalar(select(ModelRow.id).where(ModelRow.name == name)) is not None:
            raise Conflict(f"A model named {name!r} already exists; choose another name.")
