"""The provider's verbs of the ``post`` command. They act on this machine's store, not over HTTP.

Everything heavy is imported when a verb runs, so that ``post --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_shared.errors import Conflict, InvalidInput
from post_shared.schemas import DatasetKind, ModelRole, Role

if TYPE_CHECKING:
    from rich.table import Table

    from post_server.database import Database
    from post_server.settings import Settings
    from post_server.storage import BlobStore

Named = Annotated[str, typer.Option("--name", help="A short name in lower case: letters, digits, . _ -")]


def register(app: typer.Typer) -> None:
    """Add the provider's verbs."""
    app.add_typer(_models, name="model", rich_help_panel=_PANEL)
    app.add_typer(_datasets, name="dataset", rich_help_panel=_PANEL)
    app.add_typer(_keys, name="key", rich_help_panel=_PANEL)
    for name, verb in (("serve", serve), ("worker", worker), ("predictor", predictor)):
        app.command(name, rich_help_panel=_PANEL)(verb)


_PANEL = "Provider"
_models = typer.Typer(no_args_is_help=True, help="Target and student models in the store.")
_datasets = typer.Typer(no_args_is_help=True, help="Public datasets in the store.")
_keys = typer.Typer(no_args_is_help=True, help="API keys.")


# --- processes ----------------------------------------------------------------------------------------


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of all embedded parts.")] = None,
) -> None:
    """Run everything on this machine: the API, a worker, a predictor and an embedded broker."""
    from post_server.serve import main
    from post_server.settings import Settings

    given: dict[str, Any] = {"host": host, "port": port, "home": home}
    raise typer.Exit(main(Settings(**{name: value for name, value in given.items() if value is not None})))


def worker() -> None:
    """Run one worker for jobs; start as many as you like, on any host that reaches the same parts."""
    from post_server.settings import get_settings
    from post_server.worker import main

    raise typer.Exit(main(get_settings()))


def predictor() -> None:
    """Run one predictor, which answers questions to target models."""
    from post_server.predictor import main
    from post_server.settings import get_settings

    raise typer.Exit(main(get_settings()))


# --- models -------------------------------------------------------------------------------------------


@_models.command("add")
def add_model_(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a Hugging Face hub id.")],
    name: Named,
    gguf_file: Annotated[str | None, typer.Option(help="The .gguf file within a folder or hub id.")] = None,
) -> None:
    """Add a target model: load it, check it, store it as safetensors."""
    import tempfile

    from post_server.model_store import add_model, model_facts

    with _parts() as (_, database, store), tempfile.TemporaryDirectory() as folder:
        _check_name(name)
        _refuse_taken_name(database, name)
        from post_shared.language_model import LanguageModel

        if not Path(source).exists() and (source.count("/") != 1 or source.startswith(("/", ".", "~"))):
            raise InvalidInput(f"there is no folder or file {source!r}, and a hub id has the form owner/name")
        typer.echo(f"Loading {source} …", err=True)
        model = LanguageModel.load(source, device="cpu", gguf_file=gguf_file)
        model.save(Path(folder))
        with database.write() as session:
            row = add_model(session, store, Path(folder), name=name, role=ModelRole.TARGET, **model_facts(model))
    typer.echo(f"{row.id}  {row.name}  {row.architecture}, {row.layers} layers, {row.parameters:,} parameters")


@_models.command("list")
def list_models() -> None:
    """All models, newest first."""
    from sqlalchemy import select

    from post_server.records import ModelRow

    with _parts() as (_, database, _), database.read() as session:
        rows = session.scalars(select(ModelRow).order_by(ModelRow.created_at.desc())).all()
    table = _table("id", "name", "role", "architecture", "layers", "width", "parameters", "hash")
    for row in rows:
        facts = (str(row.layers), str(row.hidden_size), f"{row.parameters:,}", row.hash[:12])
        table.add_row(row.id, row.name, row.role.value, row.architecture, *facts)
    _show(table)


# --- datasets -----------------------------------------------------------------------------------------


@_datasets.command("add")
def add_dataset_(
    source: Annotated[Path, typer.Argument(help="JSON Lines, CSV, TSV or Parquet for rows; text for a corpus.")],
    name: Named,
    kind: Annotated[DatasetKind | None, typer.Option(help="By default, text is a corpus, all else rows.")] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX id or a few words.")] = None,
) -> None:
    """Add public data. Never add private data: it stays with its owner."""
    from post_server.dataset_store import add_dataset, copy_as_dataset, summarise

    _check_name(name)
    plain_text = source.name.removesuffix(".gz").endswith(".txt")
    kind = kind or (DatasetKind.CORPUS if plain_text else DatasetKind.ROWS)
    with _parts() as (_, database, store):
        copy = store.new_file()
        try:
            copy_as_dataset(source, kind, copy)
            summary = summarise(copy, kind)
            with database.write() as session:
                row, _ = add_dataset(session, store, copy, summary, name=name, kind=kind, licence=licence)
        finally:
            copy.unlink(missing_ok=True)
    labels = "no labels" if row.labels is None else ", ".join(row.labels[:12]) or "free answers"
    typer.echo(f"{row.id}  {row.name}  {row.rows:,} {'paragraphs' if kind is DatasetKind.CORPUS else 'rows'}, {labels}")


@_datasets.command("list")
def list_datasets() -> None:
    """All public datasets, newest first."""
    from sqlalchemy import select

    from post_server.records import DatasetRow

    with _parts() as (_, database, _), database.read() as session:
        rows = session.scalars(select(DatasetRow).order_by(DatasetRow.created_at.desc())).all()
    table = _table("id", "name", "kind", "rows", "labels", "licence")
    for row in rows:
        labels = "" if row.labels is None else ", ".join(row.labels[:12])
        table.add_row(row.id, row.name, row.kind.value, f"{row.rows:,}", labels, row.licence or "")
    _show(table)


# --- keys ---------------------------------------------------------------------------------------------


@_keys.command("create")
def create_key_(
    name: Annotated[str, typer.Option("--name", help="Who it is for.")],
    role: Annotated[Role, typer.Option(help="owner: tunes and asks; provider: may do everything.")],
) -> None:
    """Make an API key. It is printed once, on standard output, and can't be shown again."""
    from post_server.keys import create_key

    _check_label(name)
    with _parts() as (_, database, _), database.write() as session:
        row, text = create_key(session, name=name, role=role)
    typer.echo(f"{row.id}  {row.name} ({row.role}): keep the key safe, it can't be shown again.", err=True)
    typer.echo(text)


@_keys.command("list")
def list_keys_() -> None:
    """All API keys, without their secrets."""
    from post_server.keys import list_keys

    with _parts() as (_, database, _), database.read() as session:
        rows = list_keys(session)
    table = _table("id", "name", "role", "created", "revoked")
    for row in rows:
        revoked = f"{row.revoked_at:%Y-%m-%d %H:%M}" if row.revoked_at else ""
        table.add_row(row.id, row.name, row.role.value, f"{row.created_at:%Y-%m-%d %H:%M}", revoked)
    _show(table)


@_keys.command("revoke")
def revoke_key_(key: Annotated[str, typer.Argument(help="Its id, or its name if only one valid key has it.")]) -> None:
    """End an API key at once."""
    from post_server.keys import revoke_key

    with _parts() as (_, database, _), database.write() as session:
        row = revoke_key(session, key)
    typer.echo(f"{row.id}  {row.name}: revoked")


# --- parts --------------------------------------------------------------------------------------------


@contextmanager
def _parts() -> Iterator[tuple[Settings, Database, BlobStore]]:
    """The store that the settings name, its schema up to date."""
    from post_server.database import Database
    from post_server.settings import get_settings
    from post_server.storage import BlobStore

    settings = get_settings()
    database = Database.from_settings(settings)
    try:
        database.migrate()
        yield settings, database, BlobStore.from_settings(settings)
    finally:
        database.dispose()


def _check_name(name: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from post_shared.schemas import Name

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise InvalidInput(f"{name!r} is no name: lower-case letters, digits, '.', '_', '-', at most 63.") from None


def _check_label(name: str) -> None:

    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise InvalidInput("The name of a key has 1 to 64 printable characters.")


def _refuse_taken_name(database: Database, name: str) -> None:
    """Before minutes of loading, not after them."""
    from sqlalchemy import select

    from post_server.records import ModelRow

    with database.read() as session:
        if session.scalar(select(ModelRow.id).where(ModelRow.name == name)) is not None:
            raise Conflict(f"There already is a model named {name!r}; choose another name.")


def _table(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def _show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
