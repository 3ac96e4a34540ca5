"""The Min-K% attack (Shi et al. 2024; paper D.7, Table 22): was a text among those that a model was trained on?

A text that was trained on has few tokens that surprise the model. The score of a text is the mean log-probability of
its least likely tokens; members are expected to score higher. Min-K%++ (Zhang et al. 2024) first takes each token's
log-probability relative to the whole vocabulary's at its position. A masked model predicts each token from all others,
with the token masked (pseudo-likelihood): as many rows as the text has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel
from post_shared.training.progress import Progress, ProgressCallback, ignore

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""k: the share of the tokens, 1 being the mean log-likelihood. 0.2 is the authors' choice; see :data:`USUAL_SHARE`."""
USUAL_SHARE = 0.2
SCORES = ("min_k", "min_k_plus")
HEAD_POSITIONS = 256
"""Positions whose logits over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class TokenRows:
    """Texts as rows whose answers are the texts' own tokens; ``counts[n]`` tokens of text n are predicted, in order."""

    encoded: EncodedRows
    counts: tuple[int, ...]

    def places(self) -> Tensor:
        """Where each row's first token stands among the tokens of all texts: (rows,)."""
        lengths = torch.tensor([len(row.positions) for row in self.encoded.rows])
        return torch.cumsum(lengths, 0) - lengths


def token_rows(model: LanguageModel, texts: Sequence[str], max_length: int) -> TokenRows:
    """Tokenise ``texts``, each cut at ``max_length``. Special tokens are read but never predicted.

    Raises:
        InvalidInput: the model has fewer positions.
    """
    if max_length > model.max_length:
        raise InvalidInput(f"the model has {model.max_length} positions, not {max_length}: lower the maximum length")
    rows: list[EncodedRow] = []
    counts: list[int] = []
    for text in texts:
        found = model.tokenizer(text, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        ids, special = found.input_ids, found.special_tokens_mask
        asked = [at for at, mark in enumerate(special) if not mark and (at > 0 or model.kind == "masked")]
        if model.kind == "masked":
            mask = model.tokenizer.mask_token_id
            rows += [EncodedRow([*ids[:at], mask, *ids[at + 1 :]], [at], [ids[at]], None) for at in asked]
        elif asked:
            rows.append(EncodedRow(ids[:-1], [at - 1 for at in asked], [ids[at] for at in asked], None))
        counts.append(len(asked))
    return TokenRows(EncodedRows(tuple(rows)), tuple(counts))


def token_scores(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token; and the same less the mean of log p under p, divided by its standard deviation.

    (P, V), (P,) -> (2, P).
    """
    log = logits.log_softmax(-1)  # (P, V)
    chosen = log.gather(-1, tokens[:, None]).squeeze(-1)  # (P,)
    weight = log.exp()
    mean = (weight * log).sum(-1)
    variance = (weight * (log - mean[:, None]).square()).sum(-1)
    return torch.stack([chosen, (chosen - mean) / variance.clamp_min(1e-12).sqrt()])


def min_k(values: Tensor, share: float) -> float:
    """Mean of the ``share`` lowest of one text's token scores (n,), of one at least."""
    count = max(1, int(len(values) * share))
    return float(values.topk(count, largest=False).values.mean())


@torch.no_grad()
def score_tokens(
    model: LanguageModel, rows: TokenRows, *, batch_size: int = 16, on_progress: ProgressCallback = ignore
) -> Tensor:
    """Both scores of every predicted token of every text, text after text: (2, tokens), float64 on the CPU.

    Raises:
        InvalidInput: the model's answers are no numbers.
    """
    places = rows.places()
    scores = torch.empty(2, sum(rows.counts), dtype=torch.float64)
    batches = list(rows.encoded.in_order_of_length(batch_size))
    for step, batch in enumerate(batches, 1):
        at = torch.cat([torch.arange(len(rows.encoded.rows[row].positions)) + places[row] for row in batch.index])
        hidden = model.answer_hidden(batch)  # (P, d)
        pieces = zip(
            torch.split(hidden, HEAD_POSITIONS),
            torch.split(batch.tokens.to(hidden.device), HEAD_POSITIONS),
            strict=True,
        )
        scores[:, at] = torch.cat([token_scores(model.head(some), tokens) for some, tokens in pieces], 1).cpu().double()
        on_progress(Progress(step, len(batches), "tokens"))
    if not torch.isfinite(scores).all():
        raise InvalidInput("the model's answers to the texts are no numbers; it is broken")
    return scores


def text_scores(
    model: LanguageModel,
    texts: Sequence[str],
    max_length: int,
    *,
    shares: Sequence[float] = SHARES,
    batch_size: int = 16,
    on_progress: ProgressCallback = ignore,
) -> Tensor:
    """The attack's scores, higher for members: (texts, scores, shares), in the order of :data:`SCORES` and ``shares``.

    Raises:
        InvalidInput: a text without a token that can be predicted, or as :func:`score_tokens`.
    """
    rows = token_rows(model, texts, max_length)
    if 0 in rows.counts:
        raise InvalidInput(f"{rows.counts.count(0)} of {len(texts)} texts have no token that the model could predict")
    every = torch.split(
        score_tokens(model, rows, batch_size=batch_size, on_progress=on_progress), list(rows.counts), dim=1
    )
    scores = [[[min_k(kind, share) for share in shares] for kind in each] for each in every]
    return torch.tensor(scores, dtype=torch.float64)
