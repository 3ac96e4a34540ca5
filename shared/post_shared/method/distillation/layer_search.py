"""Which layers a student keeps, found by trying: each candidate is started from a few blocks and scored on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from post_shared.errors import InvalidInput
from post_shared.method.distillation.layer_selection import PATTERNS
from post_shared.method.distillation.student_init import STUDENT_INITS, TargetStates
from post_shared.method.losses import cosine_loss
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.training.checkpoint import fingerprint
from post_shared.training.progress import Progress, ProgressCallback, ignore
from post_shared.training.progress_file import Notes

TRIES = 24
MOVES = (2, -2, 1, -1)
"""How far one kept layer is moved to make the next candidate."""

Kept = tuple[int, ...]


@dataclass(frozen=True)
class LayerChoice:
    """The kept layers, and L_cos right after the start of each pattern that was tried for them."""

    kept: Kept
    scores: dict[Kept, float] = field(default_factory=dict)


class LayerSearch:
    """Tries patterns of kept layers. What all of them share is computed once: the target on the blocks.

    The score is L_cos (Eq. 1) of the started student on ``held`` (B, T), text that no start was fitted on. It told
    best which pattern has the lowest L_ce after some training, better than L_ce itself, and needs no head.
    """

    def __init__(self, target: LanguageModel, start: str, blocks: Sequence[Tensor], held: Tensor) -> None:
        self._target, self._start, self._held = target, STUDENT_INITS[start], held
        self._states = TargetStates(target, blocks, ahead=range(1, target.layers))
        self._wanted: Tensor | None = None

    @torch.no_grad()
    def score(self, kept: Kept) -> float:
        """L_cos of the student of these layers before any training."""
        if self._wanted is None:
            self._wanted = self._target.hidden(self._held)  # (B, T, d)
        student = copy_student(self._target, kept)
        self._start(student, kept, self._states)
        return float(cosine_loss(self._wanted, student.hidden(self._held)).mean())


def search_layers(
    score: Callable[[Kept], float],
    count: int,
    layers: int,
    *,
    tries: int = TRIES,
    known: dict[Kept, float] | None = None,
    keep: Callable[[dict[Kept, float]], None] = lambda scores: None,
    on_progress: ProgressCallback = ignore,
) -> LayerChoice:
    """The best of the named patterns, then of its neighbours as long as one is better, in at most ``tries`` tries.

    ``known`` are scores of an interrupted search: it goes the same way again without trying these. ``keep`` is
    handed all scores after each try. The last layer is kept always: the head reads its output.

    Raises:
        InvalidInput: not 1 to ``layers - 1`` layers, so there is nothing to choose.
    """
    if not 1 <= count < layers:
        raise InvalidInput(f"a search is for 1 to {layers - 1} of {layers} layers, not {count}")
    scores: dict[Kept, float] = {}

    def tried(kept: Kept) -> float:
        if kept not in scores:
            scores[kept] = known[kept] if known and kept in known else score(kept)
            keep({**(known or {}), **scores})
            best = min(scores.values())
            on_progress(Progress(len(scores), tries, "search", {"try_cos": scores[kept], "best_cos": best}))
        return scores[kept]

    shapes = {tuple(shape(count, layers)) for shape in PATTERNS.values()}
    best = min(sorted(kept for kept in shapes if kept[-1] == layers - 1), key=tried)
    moved = True
    while moved and len(scores) < tries:
        moved = False
        for kept in _neighbours(best):
            if len(scores) >= tries:
                break
            if kept not in scores and tried(kept) < scores[best]:
                best, moved = kept, True
                break
    return LayerChoice(best, scores)


def _neighbours(kept: Kept) -> Iterator[Kept]:
    """The pattern with one layer moved; the last one stays."""
    for move in MOVES:
        for place in range(len(kept) - 1):
            low = kept[place - 1] if place else -1
            if low < kept[place] + move < kept[place + 1]:
                yield (*kept[:place], kept[place] + move, *kept[place + 1 :])


class SearchNotes:
    """The scores of a search, noted after each try."""

    def __init__(self, folder: Path, *run_id: object) -> None:
        self._notes = Notes(folder / "layers.json", fingerprint(*run_id))

    def read(self) -> dict[Kept, float]:
        """What an interrupted search of the same work has found."""
        try:
            return {tuple(kept): float(score) for kept, score in self._notes.read() or []}
        except (ValueError, TypeError):
            return {}

    def write(self, scores: dict[Kept, float]) -> None:
        self._notes.write([[*pair] for pair in scores.items()])
