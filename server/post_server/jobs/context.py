"""What a running job may use: its row, the stores, the settings, its own folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from post_server.db.database import Database
from post_server.db.tables import DatasetRow, JobRow, ModelRow, PromptRow
from post_server.models.service import materialise_model
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.data.rows import Row, read_corpus, read_rows
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput, NotFound
from post_shared.files.prompt_file import PromptFile, read_prompt
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.prompts import PromptRole
from post_shared.training.progress import ProgressCallback

if TYPE_CHECKING:
    from post_shared.model.language_model import LanguageModel

Outcome = Callable[[Session], dict[str, Any]]
"""Adds a job's new rows and returns its result. It runs in the transaction that ends the job."""


@dataclass(frozen=True)
class JobContext:
    """A job and everything it may use. ``scratch`` starts empty; ``checkpoint`` survives a lost process."""

    job: JobRow
    database: Database
    store: BlobStore
    settings: Settings
    on_progress: ProgressCallback
    checkpoint: Path
    scratch: Path

    def load(self, row: ModelRow, *, for_training: bool = False) -> LanguageModel:
        """A stored model, memory-mapped from links to its blobs; ``for_training`` in the faster data type."""
        from post_server.models.loading import load_stored  # imports torch, which the API must not

        folder = self.scratch / row.id
        if not folder.exists():
            materialise_model(self.store, row, folder)
        return load_stored(row, folder, self.settings, for_training=for_training)

    def texts(self, row: DatasetRow) -> list[str]:
        """The texts of a public dataset."""
        kind = "txt" if row.kind is DatasetKind.CORPUS else "jsonl"
        return read_corpus(self.store.local_path(row.sha256), format=kind)  # type: ignore[arg-type]

    def rows(self, row: DatasetRow) -> list[Row]:
        """The labelled rows of a public dataset."""
        if row.kind is not DatasetKind.ROWS:
            raise InvalidInput(f"the dataset {row.name} is a corpus; rows with labels are needed")
        return read_rows(self.store.local_path(row.sha256), format="jsonl")


def find_stored_prompt(session: Session, prompt_id: str, role: PromptRole | None = None) -> PromptRow:
    row = session.get(PromptRow, prompt_id)
    if row is None or (role is not None and row.role is not role):
        raise NotFound(f"There is no {role.value + ' ' if role else ''}prompt {prompt_id!r}.", prompt=prompt_id)
    return row


def read_stored_prompt(context: JobContext, row: PromptRow) -> tuple[PromptFile, Task]:
    file = read_prompt(context.store.read(row.sha256), max_bytes=context.settings.prompt_bytes)
    return file, Task.from_spec(file.task)
