"""Generation in which rows come and go: each has its own prompt, text, length and way to choose, and all share a step.

Rows are padded on the left, [padding, prompt, text, what was made], so that all continue at the same place.
Shapes: B rows, S positions of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel
from post_shared.model.prefix import Prefix, RowCache

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else drawn from the likeliest that make up ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """The same seed draws the same, whatever else is in the batch."""
    logprobs: int | None = None
    """None: no log-probabilities; k: of the token and of the k likeliest."""


class Token(NamedTuple):
    """One token that was made."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), the likeliest first."""


@dataclass(eq=False)
class DecodingRow:
    """A text to go on with, and what was made of it so far. ``finish`` may be set from outside to end it."""

    token_ids: Sequence[int]
    prefix: Prefix | None
    max_tokens: int
    sampling: Sampling = Sampling()
    made: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    broken: bool = False
    """The model's answers were no numbers; the row has ended."""

    @property
    def length(self) -> int:
        """Positions that are taken: the prompt's, the text's, and those of all that was made but the last."""
        return (0 if self.prefix is None else self.prefix.length) + len(self.token_ids) + max(0, len(self.made) - 1)

    @property
    def most(self) -> int:
        """Positions that may be taken in the end."""
        return self.length + self.max_tokens - len(self.made)


class Decoder:
    """Continues rows on one model, all those under way by one token a step."""

    def __init__(self, model: LanguageModel) -> None:
        """
        Raises:
            InvalidInput: the model can't go on with a text, or not from keys and values.
        """
        if model.kind != "causal":
            raise InvalidInput("a masked model can't generate; use a causal one")
        self.model = model
        self.rows: list[DecodingRow] = []
        self._none = model.prefix(torch.zeros(1, model.hidden_size)).emptied()
        self._ends = _end_tokens(model)
        self._draws: dict[DecodingRow, torch.Generator] = {}
        self._cache: RowCache | None = None

    @torch.no_grad()
    def add(self, rows: Sequence[DecodingRow]) -> None:
        """Read the rows' texts, all in one pass, and make each row's first token."""
        lengths = torch.tensor([len(row.token_ids) for row in rows])
        longest = int(lengths.max())
        padded = torch.tensor([[*row.token_ids, *[0] * (longest - len(row.token_ids))] for row in rows])  # (B, T)
        hidden, cache = self.model.read(padded, [row.prefix or self._none for row in rows])  # (B, T, d)
        logits = self.model.head(hidden[torch.arange(len(rows)), lengths - 1])  # (B, T, d) -> (B, V)
        for row in rows:
            self._draws[row] = torch.Generator()
            if row.sampling.seed is None:
                self._draws[row].seed()
            else:
                self._draws[row].manual_seed(row.sampling.seed)
        self._choose(rows, logits)
        self._admit(rows, cache, longest)
        self.drop_finished()

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        last = torch.tensor([[row.made[-1].id] for row in self.rows])  # (B, 1)
        lengths = torch.tensor([row.length for row in self.rows])
        assert self._cache is not None
        self._choose(self.rows, self.model.head(self.model.extend(last, self._cache, lengths)))
        self.drop_finished()

    def drop_finished(self) -> None:
        """Forget the rows that have ended, and the padding that only they needed."""
        left = [at for at, row in enumerate(self.rows) if row.finish is None]
        if len(left) == len(self.rows):
            return
        self._draws = {self.rows[at]: self._draws[self.rows[at]] for at in left}
        self.rows = [self.rows[at] for at in left]
        if not left:
            self._cache = None
            return
        # The newest token of a row isn't in the cache yet.
        assert self._cache is not None
        longest = max(row.length for row in self.rows)
        self._cache.keep(torch.tensor(left), RowCache.last(longest, self._cache.length, len(left)))

    def _admit(self, rows: Sequence[DecodingRow], cache: RowCache, longest: int) -> None:
        """[padding, prompt, text, padding] -> [padding, prompt, text], and into the cache of all."""
        lengths = torch.tensor([row.length for row in rows])
        before = torch.tensor([0 if row.prefix is None else row.prefix.length for row in rows])
        most, widest = int(lengths.max()), int(before.max())
        places = torch.arange(most) - (most - lengths)[:, None] + (widest - before)[:, None]  # (B, S)
        cache.keep(torch.arange(len(rows)), places.clamp(0, widest + longest - 1))
        self.rows = [*self.rows, *rows]
        if self._cache is None:
            self._cache = cache
            return
        self._cache.append(cache)

    def _choose(self, rows: Sequence[DecodingRow], logits: Tensor) -> None:
        """Append a token to each row, from its logits (B, V)."""
        logits = logits.cpu()
        chosen = logits.argmax(-1)  # (B, V) -> (B,)
        warm = [at for at, row in enumerate(rows) if row.sampling.temperature > 0]
        if warm:
            draws = torch.cat([torch.rand(1, generator=self._draws[rows[at]]) for at in warm])
            chosen[warm] = sample(logits[warm].nan_to_num(), [rows[at].sampling for at in warm], draws)
        asked = [at for at, row in enumerate(rows) if row.sampling.logprobs is not None]
        tokens = [Token(each) for each in chosen.tolist()]
        for at, chances in zip(asked, logits[asked].log_softmax(-1), strict=True):
            top = chances.topk(rows[at].sampling.logprobs or 0)
            likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            tokens[at] = Token(tokens[at].id, float(chances[tokens[at].id]), likeliest)
        broken = logits.isnan().any(-1).tolist()
        for row, token, bad in zip(rows, tokens, broken, strict=True):
            row.broken = bad
            if bad or token.id in self._ends:
                row.finish = "stop"
                continue
            row.made.append(token)
            if len(row.made) >= row.max_tokens:
                row.finish = "length"


def continuations(
    model: LanguageModel, rows: Sequence[Sequence[int]], prefix: Prefix | None, max_tokens: int
) -> list[str]:
    """Greedy continuations of token id rows behind one prompt, each cut at its first line break.

    Raises:
        InvalidInput: as :class:`Decoder`.
    """
    decoder, lines = Decoder(model), [DecodingRow(ids, prefix, max_tokens) for ids in rows]
    decoder.add(lines)
    while decoder.rows:
        decoder.step()
    made = [[token.id for token in line.made] for line in lines]
    texts = model.tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


def sample(logits: Tensor, sampling: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Tokens by inverse transform: logits (B, V) and uniform draws (B,) -> (B,)."""
    heat = torch.tensor([each.temperature for each in sampling])[:, None]
    most = torch.tensor([each.top_p for each in sampling])[:, None]
    chances, order = (logits / heat).softmax(-1).sort(-1, descending=True)
    before = chances.cumsum(-1) - chances
    chances = torch.where(before < most, chances, 0.0)
    chances[:, 0] = torch.where(most[:, 0] <= 0, 1.0, chances[:, 0])
    total = chances.cumsum(-1)
    place = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=order.shape[-1] - 1))[:, 0]


def _end_tokens(model: LanguageModel) -> set[int]:
    """The tokens that end a text, as the model's own generation settings have them."""
    known = getattr(model.model.generation_config, "eos_token_id", None)
    ends = known if isinstance(known, list) else [known, model.tokenizer.eos_token_id]
    return {int(each) for each in ends if each is not None}
