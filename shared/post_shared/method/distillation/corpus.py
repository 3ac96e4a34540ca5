"""Public text for distillation: tokenised and counted once, packed into blocks without padding."""

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

from post_shared.data.batches import OPEN
from post_shared.data.tasks import TEXT, Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.model.language_model import LanguageModel
from post_shared.training.checkpoint import fingerprint

MASKED_SHARE = 0.15
"""Share of the tokens that a masked model has to predict (method §1)."""
RARITY = 0.7
"""Positions are drawn with weight count(token)^-0.7, so that rare tokens are learnt."""


FORM_LETTERS = 400
"""Longest paragraph that is put into an answer form: about what a task's text has."""


@dataclass(frozen=True)
class Corpus:
    """``blocks`` (N, T) of token ids, paragraphs joined by the token ``end``; ``counts`` (V,) over all of them."""

    blocks: NDArray[np.int32]
    counts: NDArray[np.int64]
    end: int | None = None
    """The token after a paragraph (causal models)."""
    answers: bool = False
    """Whether paragraphs end in answer forms, so that what follows them is open."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.blocks.tobytes()).hexdigest()

    def numbers(self, step: int, rows: int, seed: int) -> list[int]:
        """The blocks of ``step``: every epoch is a fresh permutation, a function of (seed, step)."""
        rows = min(rows, len(self.blocks))
        epoch, place = divmod(step, len(self.blocks) // rows)
        return _order(len(self.blocks), seed, epoch)[place * rows : (place + 1) * rows]

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """Block rows of ``step``, (rows, T)."""
        return self.rows(self.numbers(step, rows, seed))

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """These blocks, (rows, T)."""
        return torch.from_numpy(self.blocks[numbers].astype(np.int64))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch. Kept: a large corpus takes seconds to shuffle, a step less than one."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311  public data
    return order


def in_templates(paragraphs: Sequence[str], forms: Sequence[str], seed: int) -> list[str]:
    """Put each short paragraph into one of ``forms``, drawn by the seed.

    >>> in_templates(["A fine film."], ["{text}, it was"], seed=0)
    ['A fine film., it was']

    Raises:
        TaskInvalid: a form without exactly one text slot.
    """
    generator = random.Random(seed)  # noqa: S311  public data
    tasks = [Task(form) for form in forms]
    put = []
    for text in paragraphs:
        task = generator.choice(tasks)
        put.append(task.template_for("causal").replace(TEXT, text) if len(text) <= FORM_LETTERS else text)
    return put


def prepare_corpus(
    model: LanguageModel,
    paragraphs: Sequence[str],
    length: int,
    keep: Path | None,
    *,
    templates: Sequence[str] = (),
    seed: int = 0,
) -> Corpus:
    """Tokenise and pack ``paragraphs``; with ``keep``, the work is done once and read back by a resumed run.

    Raises:
        DataInvalid: the corpus doesn't fill a single block.
        InvalidInput: answer forms for a masked model, which answers within a text.
    """
    if templates:
        if model.kind == "masked":
            raise InvalidInput("answer forms are for causal models; a masked model answers within a text")
        paragraphs = in_templates(paragraphs, templates, seed)
    work = fingerprint(length, model.architecture, model.vocabulary, list(paragraphs))
    path = keep / f"corpus-{work[:16]}.npy" if keep else None
    if path and path.exists():
        blocks = np.load(path, allow_pickle=False)
    else:
        blocks = _pack(model, paragraphs, length)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            with aside.open("wb") as file:
                np.save(file, blocks, allow_pickle=False)
            aside.replace(path)
    return corpus_of(model, blocks, answers=bool(templates))


def corpus_of(model: LanguageModel, blocks: NDArray[np.int32], *, answers: bool) -> Corpus:
    """The corpus that was packed into ``blocks`` (N, T) for ``model``."""
    counts = np.bincount(blocks.ravel(), minlength=model.vocabulary).astype(np.int64)
    return Corpus(blocks, counts, _end_token(model), answers)


def _pack(model: LanguageModel, paragraphs: Sequence[str], length: int) -> NDArray[np.int32]:
    tokenizer = model.tokenizer
    begin = [tokenizer.cls_token_id] if model.kind == "masked" and tokenizer.cls_token_id is not None else []
    end = [tokenizer.sep_token_id] if model.kind == "masked" and tokenizer.sep_token_id is not None else []
    between = [] if (token := _end_token(model)) is None else [token]
    stream: list[int] = []
    for at in range(0, len(paragraphs), 1000):
        for ids in tokenizer(list(paragraphs[at : at + 1000]), add_special_tokens=False).input_ids:
            stream += [*ids, *between]
    inner = length - len(begin) - len(end)
    count = len(stream) // inner
    if count == 0:
        raise DataInvalid(f"the corpus has {len(stream)} tokens, fewer than one block of {length}; add public text")
    packed = np.asarray(stream[: count * inner], dtype=np.int32).reshape(count, inner)
    edges = [np.full((count, 1), token, dtype=np.int32) for token in (*begin, *end)]
    return np.concatenate([*edges[: len(begin)], packed, *edges[len(begin) :]], axis=1)


def _end_token(model: LanguageModel) -> int | None:
    """What stands after a paragraph; a masked model's blocks have their own ends."""
    return model.tokenizer.eos_token_id if model.kind == "causal" else None


@dataclass(frozen=True)
class TokenTargets:
    """What a model is asked on one batch. n predicted positions."""

    inputs: Tensor
    """(B, T): what the models read."""
    rows: Tensor
    """(n,)"""
    positions: Tensor
    """(n,): where the answer is read."""
    tokens: Tensor
    """(n,): the token expected there; :data:`OPEN` where only the target model's own answer counts."""


def next_token(
    block: Tensor, share: float, generator: torch.Generator, *, answer_end: int | None = None
) -> TokenTargets:
    """A causal model's objective at a random ``share`` of the positions.

    With ``answer_end``, every position before that token is predicted too: there an answer form has its answer.
    The text doesn't hold it, so it is open.
    """
    rows, length = block.shape
    following = block[:, 1:]  # (B, T - 1)
    count = max(1, round(following.numel() * share))
    wanted = torch.zeros(following.numel(), dtype=torch.bool)
    wanted[torch.randperm(following.numel(), generator=generator)[:count]] = True
    tokens = following.clone()
    if answer_end is not None:
        ends = following == answer_end
        wanted |= ends.flatten()
        tokens[ends] = OPEN
    row, position = wanted.view(rows, length - 1).nonzero(as_tuple=True)
    return TokenTargets(block, row, position, tokens[row, position])


def masked_tokens(
    block: Tensor, mask_token: int, vocabulary: int, counts: NDArray[np.int64], generator: torch.Generator
) -> TokenTargets:
    """A masked model's objective: 15 % of the tokens, rare ones first; 80 % masked, 10 % random, 10 % kept."""
    weight = torch.from_numpy(np.maximum(counts, 1).astype(np.float64) ** -RARITY)[block].flatten()  # (B·T,)
    count = max(1, round(block.numel() * MASKED_SHARE))
    chosen = torch.multinomial(weight, count, generator=generator).sort().values
    row, position = chosen // block.shape[1], chosen % block.shape[1]
    fate = torch.rand(count, generator=generator)
    some = torch.randint(vocabulary, (count,), generator=generator)
    tokens = block[row, position]
    replaced = torch.where(fate < 0.8, torch.full_like(tokens, mask_token), torch.where(fate < 0.9, some, tokens))
    inputs = block.clone()
    inputs[row, position] = replaced
    return TokenTargets(inputs, row, position, tokens)
