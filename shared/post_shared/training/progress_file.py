"""What long work has found so far, in a file beside its checkpoint."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("post.job")


class Notes:
    """Plain JSON in the file ``path``; what another ``work`` noted there isn't ours and is ignored.

    Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, run_id: str) -> None:
        self._path, self._run_id = path, run_id

    def read(self) -> Any:
        """What was written last; None if there is nothing of this work."""
        try:
            notes = json.loads(self._path.read_text("utf-8")) if self._path else {}
            return notes["content"] if notes.get("run_id") == self._run_id else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, content: Any) -> None:
        """Written aside, flushed, renamed. A full disk ends no work: the log says so, and a restart repeats it."""
        if self._path is None:
            return
        aside = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("w", encoding="utf-8") as file:
                json.dump({"run_id": self._run_id, "content": content}, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
        except OSError as error:
            log.warning("%s: nothing kept: %s", self._path.name, error)
        finally:
            aside.unlink(missing_ok=True)
