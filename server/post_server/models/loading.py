"""Loads a stored model. Only the log says why it can't be loaded: owners may not see that."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from post_server.db.tables import ModelRow
from post_server.settings import Settings
from post_shared.errors import IntegrityError, InvalidInput
from post_shared.model.devices import parse_memory
from post_shared.model.language_model import LanguageModel

log = logging.getLogger("post.models")


def load_stored(row: ModelRow, folder: Path, settings: Settings, *, for_training: bool = False) -> LanguageModel:
    """The model whose files are in ``folder``; see :meth:`LanguageModel.load` for its dtype.

    Raises:
        IntegrityError: it can't be loaded. Owners see this error, so it names neither the folder nor the cause.
    """
    try:
        memory = parse_memory(settings.device_memory)
        return LanguageModel.load(
            folder,
            device=settings.device,
            dtype=None if settings.precision == "auto" else getattr(torch, settings.precision),
            for_training=for_training,
            memory=memory,
            offload_folder=folder / "offload",
        )
    except InvalidInput as error:
        log.error("model can't be loaded: %s", error.detail, extra={"model": row.id})
        raise IntegrityError(f"The model {row.name} can't be loaded; the provider's log says why.") from error
