"""The Min-K% attack (Shi et al. 2024; paper App. D.7, Table 22): was a text in a model's training data?

A training text contains few tokens that surprise the model. The score of a text is the mean log-probability of its
least likely tokens; members are expected to score higher. Min-K%++ (Zhang et al. 2024) first standardises each token's
log-probability over the vocabulary at its position. A masked model predicts each token from all others, with that token
masked (pseudo-likelihood), so a text takes as many rows as it has tokens.
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
"""k, the share of the tokens; 1 is the mean log-likelihood. The authors use :data:`USUAL_SHARE`."""
USUAL_SHARE = 0.2
SCORES = ("min_k", "min_k_plus")
HEAD_POSITIONS = 256
"""Positions whose logits over the vocabulary are in memory at a time."""


@dataclass(frozen=True)
class TokenRows:
    """Texts as rows whose answers are their own tokens, in order; ``counts[n]`` tokens of text n are predicted."""

    encoded: EncodedRows
    counts: tuple[int, ...]

    def offsets(self) -> Tensor:
        """Index of each row's first token among the predicted tokens of all texts: (rows,)."""
        lengths = torch.tensor([len(row.positions) for row in self.encoded.rows])
        return torch.cumsum(lengths, 0) - lengths


def token_rows(model: LanguageModel, texts: Sequence[str], max_length: int) -> TokenRows:
    """Tokenise ``texts``, each truncated to ``max_length`` tokens. Special tokens are inputs but never predicted.

    Raises:
        InvalidInput: the model has fewer positions.
    """
    if max_length > model.max_length:
        raise InvalidInput(f"the model has {model.max_length} positions, not {max_length}; lower max_length")
    rows: list[EncodedRow] = []
    counts: list[int] = []
    for text in texts:
        encoding = model.tokenizer(text, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        ids, special = encoding.input_ids, encoding.special_tokens_mask
        predicted = [i for i, is_special in enumerate(special) if not is_special and (i > 0 or model.kind == "masked")]
        if model.kind == "masked":
            mask = model.tokenizer.mask_token_id
            rows += [EncodedRow([*ids[:i], mask, *ids[i + 1 :]], [i], [ids[i]], None) for i in predicted]
        elif predicted:
            rows.append(EncodedRow(ids[:-1], [i - 1 for i in predicted], [ids[i] for i in predicted], None))
        counts.append(len(predicted))
    return TokenRows(EncodedRows(tuple(rows)), tuple(counts))


def token_scores(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token (Min-K%), and (log p - mean) / standard deviation, both of log p under p (Min-K%++).

    (P, V), (P,) -> (2, P).
    """
    log_p = logits.log_softmax(-1)  # (P, V)
    score = log_p.gather(-1, tokens[:, None]).squeeze(-1)  # (P,)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(-1)
    return torch.stack([score, (score - mean) / variance.clamp_min(1e-12).sqrt()])


def min_k(values: Tensor, share: float) -> float:
    """Mean of the lowest ``share`` of one text's token scores (n,), at least of one."""
    count = max(1, int(len(values) * share))
    return float(values.topk(count, largest=False).values.mean())


@torch.no_grad()
def score_tokens(
    model: LanguageModel, rows: TokenRows, *, batch_size: int = 16, on_progress: ProgressCallback = ignore
) -> Tensor:
    """Both scores of every predicted token, text after text: (2, tokens), float64 on the CPU.

    Raises:
        InvalidInput: the model's outputs are NaN or infinite.
    """
    offsets = rows.offsets()
    scores = torch.empty(2, sum(rows.counts), dtype=torch.float64)
    batches = list(rows.encoded.in_order_of_length(batch_size))
    for step, batch in enumerate(batches, 1):
        indices = torch.cat([torch.arange(len(rows.encoded.rows[i].positions)) + offsets[i] for i in batch.index])
        hidden = model.answer_hidden(batch)  # (P, d)
        chunks = zip(
            torch.split(hidden, HEAD_POSITIONS),
            torch.split(batch.tokens.to(hidden.device), HEAD_POSITIONS),
            strict=True,
        )
        batch_scores = torch.cat([token_scores(model.head(states), tokens) for states, tokens in chunks], 1)
        scores[:, indices] = batch_scores.cpu().double()
        on_progress(Progress(step, len(batches), "tokens"))
    if not torch.isfinite(scores).all():
        raise InvalidInput("the model's outputs for the texts are NaN or infinite; its weights are broken")
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
        InvalidInput: a text without a token to predict, or as :func:`token_rows` and :func:`score_tokens`.
    """
    rows = token_rows(model, texts, max_length)
    if 0 in rows.counts:
        raise InvalidInput(f"{rows.counts.count(0)} of {len(texts)} texts have no token that the model can predict")
    per_text = torch.split(
        score_tokens(model, rows, batch_size=batch_size, on_progress=on_progress), list(rows.counts), dim=1
    )
    scores = [[[min_k(values, share) for share in shares] for values in text] for text in per_text]
    return torch.tensor(scores, dtype=torch.float64)
