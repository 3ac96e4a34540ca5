"""Texts that a predictor goes on with: those of all requests to one model, each by one token at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from post_server.predictor.detokenizer import TextSoFar
from post_shared.inference.generation import Decoder, DecodingRow
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.completions import Logprobs

MOST_ROWS = 16
"""Under way at once. More gain little on a CPU and make each slower."""
MOST_POSITIONS = 16_384
"""Of all rows together, padding included: it bounds the memory of their keys and values."""


@dataclass(eq=False)
class Text:
    """A text to go on with, and the text that came so far. ``one_line``: it ends with its first line."""

    row: DecodingRow
    so_far: TextSoFar
    one_line: bool = False
    logprobs: Logprobs | None = None
    seen: int = 0
    """Tokens of the row that were made into text."""
    ended: bool = False

    def follow(self) -> None:
        """Make text of the tokens that came since; end the row where its text ends."""
        for token in self.row.made[self.seen :]:
            if self.logprobs is not None:
                self.logprobs.tokens.append(self.so_far.piece(token.id))
                self.logprobs.token_logprobs.append(token.logprob or 0.0)
                self.logprobs.top_logprobs.append({self.so_far.piece(at): value for at, value in token.likeliest})
                self.logprobs.text_offset.append(len(self.so_far.text))
            self.so_far.push(token.id)
            self.seen += 1
            if self.so_far.stopped or (self.one_line and "\n" in self.so_far.text.lstrip()):
                self.row.finish = "stop"
                break
        if self.row.finish is not None and not self.ended:
            self.so_far.end()
            self.row.finish = "stop" if self.so_far.stopped else self.row.finish
            self.ended = True


class ContinuousBatch:
    """Goes on with texts on one model. They join and leave between two tokens; none waits for another's end."""

    def __init__(self, model: LanguageModel) -> None:
        """
        Raises:
            InvalidInput: the model can't generate.
        """
        self._decoder = Decoder(model)
        self._waiting: deque[Text] = deque()
        self._under_way: list[Text] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._under_way)

    def add(self, texts: Sequence[Text]) -> None:
        self._waiting.extend(texts)

    def drop(self, texts: Collection[Text]) -> None:
        """Go on with these no more."""
        self._waiting = deque(text for text in self._waiting if text not in texts)
        for text in self._under_way:
            if text in texts:
                text.row.finish = "stop"
        self._clear()

    def step(self) -> None:
        """One token for every text under way; before that, those that wait join as far as there is room."""
        joining = self._joining()
        if self._under_way:
            self._decoder.step()
        if joining:
            self._decoder.add([text.row for text in joining])
            self._under_way += joining
        for text in self._under_way:
            text.follow()
        self._clear()

    def _clear(self) -> None:
        self._decoder.drop_finished()
        self._under_way = [text for text in self._under_way if text.row.finish is None]

    def _joining(self) -> list[Text]:
        """The texts that may join now, in the order in which they came; one alone always may."""
        most = max((text.row.most for text in self._under_way), default=0)
        joining: list[Text] = []
        while self._waiting:
            count = len(self._under_way) + len(joining) + 1
            most = max(most, self._waiting[0].row.most)
            if count > 1 and (count > MOST_ROWS or count * most > MOST_POSITIONS):
                break
            joining.append(self._waiting.popleft())
        return joining
