"""Incremental detokenization: which text is certain after each token, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "�"
"""What a tokenizer returns for bytes that don't form a whole character yet."""


class IncrementalDetokenizer:
    """The text of the tokens pushed so far. ``text`` holds only what is certain: it only grows."""

    def __init__(self, tokenizer: Any, before: int | None = None, stop: Sequence[str] = ()) -> None:
        """``before`` is the token before the first one: some tokenizers drop the space at the beginning of a text."""
        self._tokenizer, self._stop = tokenizer, [string for string in stop if string]
        self._ids = [] if before is None else [before]
        self._skip = len(self._decode())
        self.text = ""
        self.stopped = False
        """A stop string was found; ``text`` ends before it."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain with it."""
        self._ids.append(token)
        text = self._until_stop(self._decode()[self._skip :].rstrip(_REPLACEMENT))
        return self._extend(text if self.stopped else text[: len(text) - self._held_back(text)])

    def piece(self, token: int) -> str:
        """The text of a token by itself."""
        return str(self._tokenizer.decode([token]))

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        return "" if self.stopped else self._extend(self._until_stop(self._decode()[self._skip :]))

    def _until_stop(self, text: str) -> str:
        """``text``, of which every character is certain, up to its first stop string."""
        starts = [start for string in self._stop if (start := text.find(string)) >= 0]
        self.stopped = bool(starts)
        return text[: min(starts, default=len(text))]

    def _extend(self, text: str) -> str:
        added = text[len(self.text) :]
        self.text += added
        return added

    def _held_back(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a stop string."""
        counts = [
            count
            for string in self._stop
            for count in range(1, min(len(string), len(text) + 1))
            if text.endswith(string[:count])
        ]
        return max(counts, default=0)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
