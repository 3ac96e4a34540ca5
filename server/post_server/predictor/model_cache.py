"""The models and prompts that a predictor keeps in memory: the most recently used ones, up to its limits."""

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
class LoadedModel:
    """A model in memory, and its row."""

    row: ModelRow
    model: LanguageModel


class ModelCache:
    """Loads models and prompts from the store on first use."""

    def __init__(self, settings: Settings, database: Database, store: BlobStore) -> None:
        self._settings, self._database, self._store = settings, database, store
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._prompts = PromptCache(settings.predictor_prompt_bytes)

    def model(self, reference: str) -> LoadedModel:
        """The model with that id or name. Others are evicted first: at most ``predictor_models`` exist at a time.

        Raises:
            NotFound: there is no such model.
        """
        with self._database.read() as session:
            row = find_model(session, reference)
        if row.id not in self._models:
            while len(self._models) >= self._settings.predictor_models:
                evicted, _ = self._models.popitem(last=False)
                self._prompts.forget(model=evicted)
            self._models[row.id] = self._load(row)
        self._models.move_to_end(row.id)
        return self._models[row.id]

    def prompt(self, loaded: LoadedModel, prompt_id: str | None, spec: TaskSpec | None) -> ServedPrompt:
        """A prompt prepared for that model; without one, the task alone.

        Raises:
            NotFound: there is no such prompt (any more).
            PromptMismatch: the width of the prompt differs from the model's.
            InvalidInput: there is neither a prompt nor a task.
        """
        if prompt_id is None:
            if spec is None:
                raise InvalidInput("a prediction needs a prompt or a task")
            return ServedPrompt.of(loaded.model, Task.from_spec(spec), None)
        with self._database.read() as session:
            row = session.get(PromptRow, prompt_id)
        if row is None:
            raise NotFound(f"There is no prompt {prompt_id!r}.", prompt=prompt_id)
        if row.width != loaded.model.hidden_size:
            raise PromptMismatch(
                f"The prompt is {row.width} wide, the model {loaded.row.name} {loaded.model.hidden_size}.",
                width=row.width,
                hidden_size=loaded.model.hidden_size,
            )
        key = PromptKey(row.owner_key_id, loaded.row.id, row.id)
        return self._prompts.get(key, lambda: self._prepare(loaded.model, row))

    def _load(self, row: ModelRow) -> LoadedModel:
        folder = self._settings.home / "cache" / "predictor" / row.hash
        if not (folder / "config.json").exists():
            partial = folder.with_suffix(f".{id(self)}.part")
            shutil.rmtree(partial, ignore_errors=True)
            materialise_model(self._store, row, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return LoadedModel(row, load_stored(row, folder, self._settings))

    def _prepare(self, model: LanguageModel, row: PromptRow) -> ServedPrompt:
        file = read_prompt(self._store.read(row.sha256), max_bytes=self._settings.prompt_bytes)
        return ServedPrompt.of(model, Task.from_spec(file.task), torch.from_numpy(file.embeddings))
