"""Continuous batching: the texts of all requests to one model are generated together, one token per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from post_server.predictor.detokenizer import IncrementalDetokenizer
from post_shared.inference.generation import Decoder, DecodingRow
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.completions import Logprobs

MAX_ROWS = 16
"""Rows generated at once. On a CPU more rows add little throughput and slow each one down."""
MAX_POSITIONS = 16_384
"""Of all rows together, padding included: it bounds the memory of their keys and values."""


@dataclass(eq=False)
class Text:
    """A text being generated, and its output so far. ``one_line``: it ends with its first line."""

    row: DecodingRow
    so_far: IncrementalDetokenizer
    one_line: bool = False
    logprobs: Logprobs | None = None
    decoded: int = 0
    """Tokens of the row that ``so_far`` has received."""
    ended: bool = False

    def decode_new_tokens(self) -> None:
        """Decode the tokens generated since the last call; end the row where its text ends."""
        for token in self.row.made[self.decoded :]:
            if self.logprobs is not None:
                self.logprobs.tokens.append(self.so_far.piece(token.id))
                self.logprobs.token_logprobs.append(token.logprob or 0.0)
                self.logprobs.top_logprobs.append({self.so_far.piece(id): logprob for id, logprob in token.likeliest})
                self.logprobs.text_offset.append(len(self.so_far.text))
            self.so_far.push(token.id)
            self.decoded += 1
            if self.so_far.stopped or (self.one_line and "\n" in self.so_far.text.lstrip()):
                self.row.finish = "stop"
                break
        if self.row.finish is not None and not self.ended:
            self.so_far.end()
            self.row.finish = "stop" if self.so_far.stopped else self.row.finish
            self.ended = True


class ContinuousBatch:
    """Generates texts on one model. They join and leave between two tokens; none waits for another to end."""

    def __init__(self, model: LanguageModel) -> None:
        """
        Raises:
            InvalidInput: the model can't generate.
        """
        self._decoder = Decoder(model)
        self._waiting: deque[Text] = deque()
        self._running: list[Text] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, texts: Sequence[Text]) -> None:
        self._waiting.extend(texts)

    def drop(self, texts: Collection[Text]) -> None:
        """Stop generating these texts."""
        self._waiting = deque(text for text in self._waiting if text not in texts)
        for text in self._running:
            if text in texts:
                text.row.finish = "stop"
        self._remove_finished()

    def step(self) -> None:
        """Generate one token for every running text, and let waiting texts join as far as the limits allow."""
        joining = self._take_joining()
        if self._running:
            self._decoder.step()
        if joining:
            self._decoder.add([text.row for text in joining])
            self._running += joining
        for text in self._running:
            text.decode_new_tokens()
        self._remove_finished()

    def _remove_finished(self) -> None:
        self._decoder.drop_finished()
        self._running = [text for text in self._running if text.row.finish is None]

    def _take_joining(self) -> list[Text]:
        """The texts that may join now, in order of arrival; a single text always may."""
        longest = max((text.row.most for text in self._running), default=0)
        joining: list[Text] = []
        while self._waiting:
            count = len(self._running) + len(joining) + 1
            longest = max(longest, self._waiting[0].row.most)
            if count > 1 and (count > MAX_ROWS or count * longest > MAX_POSITIONS):
                break
            joining.append(self._waiting.popleft())
        return joining
