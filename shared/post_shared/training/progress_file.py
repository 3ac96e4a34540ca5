"""Intermediate results of a run, in a JSON file beside its checkpoint."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

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
        """Write to a temporary file, flush, rename. A full disk only logs a warning; a restart repeats the work."""
        if self._path is None:
            return
        partial = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                json.dump({"run_id": self._run_id, "content": content}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError as error:
            log.warning("%s was not saved: %s", self._path.name, error)
        finally:
            partial.unlink(missing_ok=True)
