"""Intermediate results of a run, in a JSON file beside its checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from post_shared.files.atomic import replacing

log = logging.getLogger("post.job")


class ProgressFile:
    """JSON in the file ``path``; the content of a run with another ``run_id`` is ignored.

    Without a path nothing is saved.
    """

    def __init__(self, path: Path | None, run_id: str) -> None:
        self._path, self._run_id = path, run_id

    def read(self) -> Any:
        """The content written last; None if this run has written nothing."""
        try:
            document = json.loads(self._path.read_text("utf-8")) if self._path else {}
            return document["content"] if document.get("run_id") == self._run_id else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, content: Any) -> None:
        """Atomically. A full disk only logs a warning; a restart repeats the work."""
        if self._path is None:
            return
        try:
            with replacing(self._path) as partial:
                partial.write_text(json.dumps({"run_id": self._run_id, "content": content}), "utf-8")
        except OSError as error:
            log.warning("%s was not saved: %s", self._path.name, error)
