"""Loading a stored model. What is wrong with it is the provider's to know, and stands in the log."""

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


def load_stored(row: ModelRow, folder: Path, settings: Settings, *, teaches: bool = False) -> LanguageModel:
    """The model whose files were laid out in ``folder``; see :meth:`LanguageModel.load` for what it computes in.

    Raises:
        IntegrityError: it can't be loaded; owners read this, so neither the folder nor the cause is in it.
    """
    try:
        memory = parse_memory(settings.device_memory)
        return LanguageModel.load(
            folder,
            device=settings.device,
            dtype=torch.float32 if settings.precision == "float32" else None,
            teaches=teaches,
            memory=memory,
            offload_folder=folder / "offload",
        )
    except InvalidInput as error:
        log.error("model can't be loaded: %s", error.detail, extra={"model": row.id})
        raise IntegrityError(f"The model {row.name} can't be loaded; the provider's log says why.") from error
