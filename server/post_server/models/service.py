"""Stored models: a row with facts and a list of files, each of which is a blob."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from post_server.db.database import guard
from post_server.db.tables import ModelRow
from post_server.storage.blob_store import BlobStore, copy_to
from post_shared.errors import Conflict, NotFound
from post_shared.files.model_folder import check_safe, manifest, model_hash
from post_shared.schemas.models import Model, ModelFile, ModelManifest, ModelRole

if TYPE_CHECKING:
    from post_shared.model.language_model import LanguageModel


def model_facts(model: LanguageModel) -> dict[str, Any]:
    """The facts about a loaded model that :func:`add_model` takes."""
    return {
        "kind": model.kind,
        "architecture": type(model.model).__name__,
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "vocabulary": model.vocabulary,
        "parameters": sum(weight.numel() for weight in model.model.parameters()),
    }


def add_model(
    session: Session,
    store: BlobStore,
    folder: Path,
    *,
    name: str,
    role: ModelRole,
    target_id: str | None = None,
    kind: str,
    architecture: str,
    layers: int,
    hidden_size: int,
    vocabulary: int,
    parameters: int,
) -> ModelRow:
    """Store a saved model and add its row. The same model under the same name returns the existing row.

    The files are stored before the session's first statement, so that a new write session doesn't lock the
    database meanwhile.

    Raises:
        ModelUnsafe: the folder contains something that POST refuses to load.
        Conflict: the name belongs to another model.
    """
    check_safe(folder)
    files = manifest(folder)
    digest = model_hash(files)
    for file in files:
        if store.put(folder / file.path) != file.sha256:
            raise Conflict(f"{file.path} changed while it was being stored; add the model again.")
    guard(session)
    for file in files:
        if not store.exists(file.sha256):  # garbage collection has removed an old, unreferenced copy
            store.put(folder / file.path)
    existing = session.scalar(select(ModelRow).where(ModelRow.name == name))
    if existing is not None:
        if existing.hash == digest:
            return existing
        raise Conflict(f"A model named {name!r} ({existing.id}) already exists; choose another name.")
    row = ModelRow(
        name=name,
        role=role,
        hash=digest,
        kind=kind,
        architecture=architecture,
        layers=layers,
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        parameters=parameters,
        size_bytes=sum(file.size for file in files),
        files=[file.model_dump(mode="json") for file in files],
        target_id=target_id,
    )
    session.add(row)
    session.flush()
    return row


def find_model(session: Session, reference: str, role: ModelRole | None = None) -> ModelRow:
    """The model with that id or name.

    Raises:
        NotFound: there is none, or it has another role.
    """
    row = session.scalar(select(ModelRow).where(or_(ModelRow.id == reference, ModelRow.name == reference)))
    if row is None or (role is not None and row.role is not role):
        raise NotFound(f"There is no {role.value + ' ' if role else ''}model {reference!r}.", model=reference)
    return row


def find_model_by_hash(session: Session, digest: str) -> ModelRow | None:
    """The oldest model with that hash; models with the same hash have the same bytes."""
    return session.scalar(select(ModelRow).where(ModelRow.hash == digest).order_by(ModelRow.created_at))


def materialise_model(store: BlobStore, row: ModelRow, folder: Path) -> Path:
    """Put the model's files into an empty folder, for loading. They may be hard links, so don't write to them."""
    for file in model_files(row):
        copy_to(store, file.sha256, folder / file.path)
    return folder


def model_files(row: ModelRow) -> list[ModelFile]:
    """The model's files, sorted by path."""
    return [ModelFile.model_validate(file) for file in row.files]


def model_document(row: ModelRow) -> Model:
    """The row as the API shows it."""
    return Model.model_validate({name: getattr(row, name) for name in Model.model_fields})


def manifest_document(row: ModelRow) -> ModelManifest:
    """The list of files with their hashes."""
    return ModelManifest(model_id=row.id, name=row.name, hash=row.hash, files=model_files(row))
