"""The public corpus of distillation: tokenised and counted once, packed into blocks without padding."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from post_shared.data.batches import IGNORE_INDEX
from post_shared.data.tasks import TEXT, Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.files.atomic import replacing
from post_shared.model.language_model import LanguageModel
from post_shared.training.checkpoint import fingerprint

MASKED_SHARE = 0.15
"""Share of the tokens that a masked model has to predict (method §1)."""
RARITY = 0.7
"""Positions are drawn with weight count(token)^-0.7, so that rare tokens are learnt (method §1)."""
MAX_TEMPLATE_TEXT = 400
"""Characters of the longest paragraph that is put into a template: about the length of a task's text."""


@dataclass(frozen=True)
class Corpus:
    """``blocks`` (N, T) of token ids, with ``end`` between paragraphs; ``counts`` (V,) of the tokens in all blocks."""

    blocks: NDArray[np.int32]
    counts: NDArray[np.int64]
    end: int | None = None
    """The token after a paragraph (causal models)."""
    answers: bool = False
    """Whether paragraphs end in templates, so that the next token, the answer, is :data:`IGNORE_INDEX`."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.blocks.tobytes()).hexdigest()

    def block_indices(self, step: int, rows: int, seed: int) -> list[int]:
        """Indices of the blocks of ``step``, a function of (seed, step): each epoch is a new permutation."""
        rows = min(rows, len(self.blocks))
        epoch, batch = divmod(step, len(self.blocks) // rows)
        return _permutation(len(self.blocks), seed, epoch)[batch * rows : (batch + 1) * rows]

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """The blocks of ``step``: (rows, T)."""
        return self.take(self.block_indices(step, rows, seed))

    def take(self, indices: Sequence[int]) -> Tensor:
        """The blocks at ``indices``: (rows, T)."""
        return torch.from_numpy(self.blocks[indices].astype(np.int64))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch. Cached: shuffling a large corpus takes seconds, a step less than one."""
    permutation = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(permutation)  # noqa: S311  public data
    return permutation


def in_templates(paragraphs: Sequence[str], templates: Sequence[str], seed: int) -> list[str]:
    """Put each short paragraph into one of ``templates``, drawn with the seed.

    >>> in_templates(["A fine film."], ["{text}, it was"], seed=0)
    ['A fine film., it was']

    Raises:
        TaskInvalid: a template without exactly one text slot.
    """
    generator = random.Random(seed)  # noqa: S311  public data
    tasks = [Task(template) for template in templates]
    filled = []
    for text in paragraphs:
        task = generator.choice(tasks)
        filled.append(task.template_for("causal").replace(TEXT, text) if len(text) <= MAX_TEMPLATE_TEXT else text)
    return filled


def prepare_corpus(
    model: LanguageModel,
    paragraphs: Sequence[str],
    length: int,
    folder: Path | None,
    *,
    templates: Sequence[str] = (),
    seed: int = 0,
) -> Corpus:
    """Tokenise ``paragraphs`` and pack them into blocks of ``length`` tokens; a resumed run reads them from ``folder``.

    Raises:
        DataInvalid: the corpus doesn't fill a single block.
        InvalidInput: templates for a masked model, which answers within the text.
    """
    if templates:
        if model.kind == "masked":
            raise InvalidInput("templates are for causal models; a masked model answers within the text")
        paragraphs = in_templates(paragraphs, templates, seed)
    run_id = fingerprint(length, model.architecture, model.vocabulary, list(paragraphs))
    path = folder / f"corpus-{run_id[:16]}.npy" if folder else None
    if path and path.exists():
        blocks = np.load(path, allow_pickle=False)
    else:
        blocks = _pack(model, paragraphs, length)
        if path:
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, blocks, allow_pickle=False)
    return corpus_of(model, blocks, answers=bool(templates))


def corpus_of(model: LanguageModel, blocks: NDArray[np.int32], *, answers: bool) -> Corpus:
    """The corpus of ``blocks`` (N, T) that were packed for ``model``."""
    counts = np.bincount(blocks.ravel(), minlength=model.vocabulary).astype(np.int64)
    return Corpus(blocks, counts, _end_token(model), answers)


def _pack(model: LanguageModel, paragraphs: Sequence[str], length: int) -> NDArray[np.int32]:
    tokenizer = model.tokenizer
    begin = [tokenizer.cls_token_id] if model.kind == "masked" and tokenizer.cls_token_id is not None else []
    end = [tokenizer.sep_token_id] if model.kind == "masked" and tokenizer.sep_token_id is not None else []
    separator = [] if (token := _end_token(model)) is None else [token]
    stream: list[int] = []
    for start in range(0, len(paragraphs), 1000):
        for ids in tokenizer(list(paragraphs[start : start + 1000]), add_special_tokens=False).input_ids:
            stream += [*ids, *separator]
    inner = length - len(begin) - len(end)
    count = len(stream) // inner
    if count == 0:
        raise DataInvalid(f"the corpus has {len(stream)} tokens, fewer than one block of {length}; add public text")
    packed = np.asarray(stream[: count * inner], dtype=np.int32).reshape(count, inner)
    edges = [np.full((count, 1), token, dtype=np.int32) for token in (*begin, *end)]
    return np.concatenate([*edges[: len(begin)], packed, *edges[len(begin) :]], axis=1)


def _end_token(model: LanguageModel) -> int | None:
    """The token after a paragraph; None for a masked model, whose blocks have their own special tokens."""
    return model.tokenizer.eos_token_id if model.kind == "causal" else None


@dataclass(frozen=True)
class TokenTargets:
    """The positions of one batch at which tokens are predicted, n in all, and the tokens expected there."""

    inputs: Tensor
    """(B, T): the models' input."""
    rows: Tensor
    """(n,): row of each predicted position."""
    positions: Tensor
    """(n,): position in the row at which the prediction is read."""
    tokens: Tensor
    """(n,): the expected token; :data:`IGNORE_INDEX` where only the target model's distribution counts (no L_lm)."""


def next_token(
    block: Tensor, share: float, generator: torch.Generator, *, answer_end: int | None = None
) -> TokenTargets:
    """A causal model's targets at a random ``share`` of the positions.

    With ``answer_end``, every position before that token is a target too: a template's answer is predicted there.
    The text doesn't contain the answer, so the token is :data:`IGNORE_INDEX`.
    """
    rows, length = block.shape
    following = block[:, 1:]  # (B, T - 1)
    count = max(1, round(following.numel() * share))
    predicted = torch.zeros(following.numel(), dtype=torch.bool)
    predicted[torch.randperm(following.numel(), generator=generator)[:count]] = True
    tokens = following.clone()
    if answer_end is not None:
        ends = following == answer_end
        predicted |= ends.flatten()
        tokens[ends] = IGNORE_INDEX
    row, position = predicted.view(rows, length - 1).nonzero(as_tuple=True)
    return TokenTargets(block, row, position, tokens[row, position])


def masked_tokens(
    block: Tensor, mask_token: int, vocabulary: int, counts: NDArray[np.int64], generator: torch.Generator
) -> TokenTargets:
    """A masked model's targets: 15 % of the tokens, preferably rare ones; 80 % masked, 10 % random, 10 % unchanged."""
    weight = torch.from_numpy(np.maximum(counts, 1).astype(np.float64) ** -RARITY)[block].flatten()  # (B·T,)
    count = max(1, round(block.numel() * MASKED_SHARE))
    chosen = torch.multinomial(weight, count, generator=generator).sort().values
    row, position = chosen // block.shape[1], chosen % block.shape[1]
    draw = torch.rand(count, generator=generator)
    other = torch.randint(vocabulary, (count,), generator=generator)
    tokens = block[row, position]
    replaced = torch.where(draw < 0.8, torch.full_like(tokens, mask_token), torch.where(draw < 0.9, other, tokens))
    inputs = block.clone()
    inputs[row, position] = replaced
    return TokenTargets(inputs, row, position, tokens)
