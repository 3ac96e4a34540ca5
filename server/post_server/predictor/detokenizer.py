"""Text out of tokens as they come: what can be shown already, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"
"""What a tokenizer gives for bytes that are no whole character yet."""


class TextSoFar:
    """The text of the tokens pushed so far. ``text`` is what is certain: it only grows."""

    def __init__(self, tokenizer: Any, before: int | None = None, stop: Sequence[str] = ()) -> None:
        """``before`` is the token in front of the first: some tokenizers eat the space at a text's beginning."""
        self._tokenizer, self._stop = tokenizer, [each for each in stop if each]
        self._ids = [] if before is None else [before]
        self._skip = len(self._decode())
        self.text = ""
        self.stopped = False
        """A stop text came; ``text`` ends before it."""

    def push(self, token: int) -> str:
        """Add a token; the text that became certain with it."""
        self._ids.append(token)
        known = self._until_stop(self._decode()[self._skip :].rstrip(_BROKEN))
        return self._grow(known if self.stopped else known[: len(known) - self._held_back(known)])

    def piece(self, token: int) -> str:
        """The text of a token by itself."""
        return str(self._tokenizer.decode([token]))

    def end(self) -> str:
        """No token will follow; the rest of the text."""
        return "" if self.stopped else self._grow(self._until_stop(self._decode()[self._skip :]))

    def _until_stop(self, text: str) -> str:
        """``text`` (certain from its first to its last character) to where its first stop text begins."""
        places = [place for each in self._stop if (place := text.find(each)) >= 0]
        self.stopped = bool(places)
        return text[: min(places, default=len(text))]

    def _grow(self, whole: str) -> str:
        more = whole[len(self.text) :]
        self.text += more
        return more

    def _held_back(self, text: str) -> int:
        """Characters at the end that may become a stop text."""
        ends = [
            count
            for each in self._stop
            for count in range(1, min(len(each), len(text) + 1))
            if text.endswith(each[:count])
        ]
        return max(ends, default=0)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
