"""The models and prompts that a predictor keeps ready: the ones used last, and no more than it may."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from dataclasses import dataclass

import torch

from post_server.db.database import Database
from post_server.db.tables import ModelRow, PromptRow
from post_server.models.loading import load_stored
from post_server.models.service import find_model, materialise_model
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput, NotFound, PromptMismatch
from post_shared.files.prompt_file import read_prompt
from post_shared.inference.classification import PromptCache, PromptKey, ServedPrompt
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tasks import TaskSpec


@dataclass(frozen=True)
class ReadyModel:
    """A loaded model with its row."""

    row: ModelRow
    model: LanguageModel


class ModelCache:
    """Loads models and prompts from the store when they are first asked for."""

    def __init__(self, settings: Settings, database: Database, store: BlobStore) -> None:
        self._settings, self._database, self._store = settings, database, store
        self._models: OrderedDict[str, ReadyModel] = OrderedDict()
        self._prompts = PromptCache(settings.predictor_prompt_bytes)

    def model(self, reference: str) -> ReadyModel:
        """The model of that id or name. Room is made first, so that no more than ``predictor_models`` exist at a time.

        Raises:
            NotFound: there is none.
        """
        with self._database.read() as session:
            row = find_model(session, reference)
        if row.id not in self._models:
            while len(self._models) >= self._settings.predictor_models:
                gone, _ = self._models.popitem(last=False)
                self._prompts.forget(model=gone)
            self._models[row.id] = self._load(row)
        self._models.move_to_end(row.id)
        return self._models[row.id]

    def prompt(self, ready: ReadyModel, prompt_id: str | None, spec: TaskSpec | None) -> ServedPrompt:
        """A prompt ready for that model; without one, the task alone.

        Raises:
            NotFound: there is none (any more).
            PromptMismatch: the prompt has another width than the model.
            InvalidInput: neither a prompt nor a task.
        """
        if prompt_id is None:
            if spec is None:
                raise InvalidInput("a prediction needs a prompt or a task")
            return ServedPrompt.of(ready.model, Task.from_spec(spec), None)
        with self._database.read() as session:
            row = session.get(PromptRow, prompt_id)
        if row is None:
            raise NotFound(f"There is no prompt {prompt_id!r}.", prompt=prompt_id)
        if row.width != ready.model.hidden_size:
            raise PromptMismatch(
                f"The prompt is {row.width} wide, the model {ready.row.name} {ready.model.hidden_size}.",
                width=row.width,
                hidden_size=ready.model.hidden_size,
            )
        key = PromptKey(row.owner_key_id, ready.row.id, row.id)
        return self._prompts.get(key, lambda: self._prepare(ready.model, row))

    def _load(self, row: ModelRow) -> ReadyModel:
        folder = self._settings.home / "cache" / "predictor" / row.hash
        if not (folder / "config.json").exists():
            aside = folder.with_suffix(f".{id(self)}.part")
            shutil.rmtree(aside, ignore_errors=True)
            materialise_model(self._store, row, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        return ReadyModel(row, load_stored(row, folder, self._settings))

    def _prepare(self, model: LanguageModel, row: PromptRow) -> ServedPrompt:
        file = read_prompt(self._store.read(row.sha256), max_bytes=self._settings.prompt_bytes)
        return ServedPrompt.of(model, Task.from_spec(file.task), torch.from_numpy(file.embeddings))
