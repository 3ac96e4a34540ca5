"""The models and prompts that a predictor keeps ready: the ones used last, and no more than it may."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from post_server.database import Database
from post_server.ml.loading import load_stored
from post_server.model_store import find_model, materialise_model
from post_server.records import ModelRow, PromptRow
from post_server.settings import Settings
from post_server.storage import BlobStore
from post_shared.errors import NotFound, PromptMismatch
from post_shared.language_model import LanguageModel
from post_shared.prefixes import Prefix
from post_shared.prompt_file import read_prompt
from post_shared.tasks import Task

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LastUsed(Generic[K, V]):
    """At most ``size`` values; the one that wasn't used for longest goes first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, made if need be. Room is made first, so that never more than ``size`` exist."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while len(self._kept) >= self._size:
            self._kept.popitem(last=False)
        self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class ReadyPrompt:
    """A prompt with its task. ``prefix`` is the key/value cache, which only causal models have."""

    task: Task
    embeddings: Tensor
    prefix: Prefix | None

    @property
    def for_classes(self) -> Tensor | Prefix:
        return self.embeddings if self.prefix is None else self.prefix


@dataclass
class ReadyModel:
    """A loaded model and the prompts used with it."""

    row: ModelRow
    model: LanguageModel
    prompts: LastUsed[str, ReadyPrompt] = field(default_factory=lambda: LastUsed(1))


class Shelf:
    """Loads models and prompts from the store when they are first asked for."""

    def __init__(self, settings: Settings, database: Database, store: BlobStore) -> None:
        self._settings, self._database, self._store = settings, database, store
        self._models: LastUsed[str, ReadyModel] = LastUsed(settings.predictor_models)

    def model(self, reference: str) -> ReadyModel:
        """The model of that id or name.

        Raises:
            NotFound: there is none.
        """
        with self._database.read() as session:
            row = find_model(session, reference)
        return self._models.get(row.id, lambda: self._load(row))

    def prompt(self, ready: ReadyModel, prompt_id: str) -> ReadyPrompt:
        """A prompt, ready for that model.

        Raises:
            NotFound: there is none (any more).
            PromptMismatch: the prompt has another width than the model.
        """
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
        return ready.prompts.get(row.id, lambda: self._prepare(ready.model, row))

    def _load(self, row: ModelRow) -> ReadyModel:
        folder = self._settings.home / "cache" / "predictor" / row.hash
        if not (folder / "config.json").exists():
            aside = folder.with_suffix(f".{id(self)}.part")
            shutil.rmtree(aside, ignore_errors=True)
            materialise_model(self._store, row, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        model = load_stored(row, folder, self._settings.device)
        return ReadyModel(row, model, LastUsed(self._settings.predictor_prompts))

    def _prepare(self, model: LanguageModel, row: PromptRow) -> ReadyPrompt:
        file = read_prompt(self._store.read(row.sha256), max_bytes=self._settings.prompt_bytes)
        embeddings = torch.from_numpy(file.embeddings)
        prefix = model.prefix(embeddings) if model.keeps_prefix else None
        return ReadyPrompt(Task.from_form(file.task), embeddings, prefix)
