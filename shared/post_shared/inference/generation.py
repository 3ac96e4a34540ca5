"""Continuous batching of generation: rows join and leave between steps, each with its own prompt, text and sampling.

Rows are padded on the left, [padding, prompt, text, generated tokens], so that all continue at the same position.
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
    """How a token is chosen: greedily at temperature 0, else drawn from the most likely that make up ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    logprobs: int | None = None
    """k: return log-probabilities of the token and of the k most likely; None: none."""


class Token(NamedTuple):
    """One generated token."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), the most likely first."""


@dataclass(eq=False)
class DecodingRow:
    """A text being generated, and its tokens so far. A caller may set ``finish`` to end it."""

    token_ids: Sequence[int]
    prefix: Prefix | None
    max_tokens: int
    sampling: Sampling = Sampling()
    made: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    broken: bool = False
    """The model's outputs were NaN; the row has ended."""

    @property
    def length(self) -> int:
        """Positions in use: those of the prompt, the text, and all generated tokens but the last."""
        return (0 if self.prefix is None else self.prefix.length) + len(self.token_ids) + max(0, len(self.made) - 1)

    @property
    def most(self) -> int:
        """Positions in use when ``max_tokens`` are generated."""
        return self.length + self.max_tokens - len(self.made)


class Decoder:
    """Generates rows on one model: one token per step for all active rows."""

    def __init__(self, model: LanguageModel) -> None:
        """
        Raises:
            InvalidInput: the model is masked, or has no key/value prefix.
        """
        if model.kind != "causal":
            raise InvalidInput("a masked model can't generate; use a causal one")
        self.model = model
        self.rows: list[DecodingRow] = []
        self._empty_prefix = model.prefix(torch.zeros(1, model.hidden_size)).emptied()
        self._end_tokens = _end_tokens(model)
        self._generators: dict[DecodingRow, torch.Generator] = {}
        self._cache: RowCache | None = None

    @torch.no_grad()
    def add(self, rows: Sequence[DecodingRow]) -> None:
        """Run the rows' texts in one pass, and generate the first token of each."""
        lengths = torch.tensor([len(row.token_ids) for row in rows])
        longest = int(lengths.max())
        padded = torch.tensor([[*row.token_ids, *[0] * (longest - len(row.token_ids))] for row in rows])  # (B, T)
        hidden, cache = self.model.read(padded, [row.prefix or self._empty_prefix for row in rows])  # (B, T, d)
        logits = self.model.head(hidden[torch.arange(len(rows)), lengths - 1])  # (B, T, d) -> (B, V)
        for row in rows:
            self._generators[row] = torch.Generator()
            if row.sampling.seed is None:
                self._generators[row].seed()
            else:
                self._generators[row].manual_seed(row.sampling.seed)
        self._choose(rows, logits)
        self._admit(rows, cache, longest)
        self.drop_finished()

    @torch.no_grad()
    def step(self) -> None:
        """Generate one token for each active row."""
        last = torch.tensor([[row.made[-1].id] for row in self.rows])  # (B, 1)
        lengths = torch.tensor([row.length for row in self.rows])
        assert self._cache is not None
        self._choose(self.rows, self.model.head(self.model.extend(last, self._cache, lengths)))
        self.drop_finished()

    def drop_finished(self) -> None:
        """Remove the rows that have ended, and the padding that only they needed."""
        active = [i for i, row in enumerate(self.rows) if row.finish is None]
        if len(active) == len(self.rows):
            return
        self._generators = {self.rows[i]: self._generators[self.rows[i]] for i in active}
        self.rows = [self.rows[i] for i in active]
        if not active:
            self._cache = None
            return
        # The newest token of a row isn't in the cache yet.
        assert self._cache is not None
        longest = max(row.length for row in self.rows)
        self._cache.keep(torch.tensor(active), RowCache.last(longest, self._cache.length, len(active)))

    def _admit(self, rows: Sequence[DecodingRow], cache: RowCache, longest: int) -> None:
        """Move [padding, prompt, text, padding] to [padding, prompt, text], and append it to the cache."""
        lengths = torch.tensor([row.length for row in rows])
        prompts = torch.tensor([0 if row.prefix is None else row.prefix.length for row in rows])
        width, max_prompt = int(lengths.max()), int(prompts.max())
        positions = torch.arange(width) - (width - lengths)[:, None] + (max_prompt - prompts)[:, None]  # (B, S)
        cache.keep(torch.arange(len(rows)), positions.clamp(0, max_prompt + longest - 1))
        self.rows = [*self.rows, *rows]
        if self._cache is None:
            self._cache = cache
            return
        self._cache.append(cache)

    def _choose(self, rows: Sequence[DecodingRow], logits: Tensor) -> None:
        """Append a token to each row, from its logits (B, V)."""
        logits = logits.cpu()
        chosen = logits.argmax(-1)  # (B, V) -> (B,)
        sampled = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        if sampled:
            draws = torch.cat([torch.rand(1, generator=self._generators[rows[i]]) for i in sampled])
            chosen[sampled] = sample(logits[sampled].nan_to_num(), [rows[i].sampling for i in sampled], draws)
        with_logprobs = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        tokens = [Token(token) for token in chosen.tolist()]
        for i, logprobs in zip(with_logprobs, logits[with_logprobs].log_softmax(-1), strict=True):
            top = logprobs.topk(rows[i].sampling.logprobs or 0)
            likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            tokens[i] = Token(tokens[i].id, float(logprobs[tokens[i].id]), likeliest)
        has_nan = logits.isnan().any(-1).tolist()
        for row, token, broken in zip(rows, tokens, has_nan, strict=True):
            row.broken = broken
            if broken or token.id in self._end_tokens:
                row.finish = "stop"
                continue
            row.made.append(token)
            if len(row.made) >= row.max_tokens:
                row.finish = "length"


def continuations(
    model: LanguageModel, rows: Sequence[Sequence[int]], prefix: Prefix | None, max_tokens: int
) -> list[str]:
    """Greedy continuations of rows of token ids with one prompt, each up to its first line break.

    Raises:
        InvalidInput: as :class:`Decoder`.
    """
    decoder, decoding = Decoder(model), [DecodingRow(ids, prefix, max_tokens) for ids in rows]
    decoder.add(decoding)
    while decoder.rows:
        decoder.step()
    generated = [[token.id for token in row.made] for row in decoding]
    texts = model.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


def sample(logits: Tensor, sampling: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Tokens by inverse transform sampling: logits (B, V) and uniform draws (B,) -> (B,)."""
    temperature = torch.tensor([each.temperature for each in sampling])[:, None]
    top_p = torch.tensor([each.top_p for each in sampling])[:, None]
    probabilities, tokens = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p, probabilities, 0.0)
    probabilities[:, 0] = torch.where(top_p[:, 0] <= 0, 1.0, probabilities[:, 0])
    cumulative = probabilities.cumsum(-1)
    rank = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return tokens.gather(-1, rank.clamp(max=tokens.shape[-1] - 1))[:, 0]


def _end_tokens(model: LanguageModel) -> set[int]:
    """The tokens that end a text, according to the model's generation config and tokenizer."""
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured, model.tokenizer.eos_token_id]
    return {int(token) for token in tokens if token is not None}
