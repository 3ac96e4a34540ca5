"""Search for the layers that a student keeps: each candidate is initialised on a few blocks and scored on others."""

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
from post_shared.training.progress_file import ProgressFile

MAX_TRIALS = 24
MOVES = (2, -2, 1, -1)
"""How far one kept layer is moved to make the next candidate."""

Layers = tuple[int, ...]


@dataclass(frozen=True)
class LayerChoice:
    """The kept layers, and L_cos of each candidate before training."""

    kept: Layers
    scores: dict[Layers, float] = field(default_factory=dict)


class LayerSearch:
    """Scores candidates. The target's hidden states are the same for all of them and computed once.

    The score is L_cos (Eq. 1) of the initialised student on ``held_out`` (B, T), text that no student was fitted on.
    It predicts L_ce after some training better than L_ce before training does, and needs no head.
    """

    def __init__(self, target: LanguageModel, student_init: str, blocks: Sequence[Tensor], held_out: Tensor) -> None:
        self._target, self._init, self._held_out = target, STUDENT_INITS[student_init], held_out
        self._states = TargetStates(target, blocks, prefetch=range(1, target.layers))
        self._reference: Tensor | None = None

    @torch.no_grad()
    def score(self, kept: Layers) -> float:
        """L_cos of the student of these layers before any training."""
        if self._reference is None:
            self._reference = self._target.hidden(self._held_out)  # (B, T, d)
        student = copy_student(self._target, kept)
        self._init(student, kept, self._states)
        return float(cosine_loss(self._reference, student.hidden(self._held_out)).mean())


def search_layers(
    score: Callable[[Layers], float],
    count: int,
    layers: int,
    *,
    max_trials: int = MAX_TRIALS,
    known: dict[Layers, float] | None = None,
    save: Callable[[dict[Layers, float]], None] = lambda scores: None,
    on_progress: ProgressCallback = ignore,
) -> LayerChoice:
    """Hill climbing from the best of :data:`PATTERNS`, in at most ``max_trials`` trials.

    ``known`` holds the scores of an interrupted search, which takes the same path again without computing them.
    ``save`` is called with all scores after each trial. The last layer is always kept: the head reads its output.

    Raises:
        InvalidInput: ``count`` isn't in 1..``layers - 1``, so there is nothing to choose.
    """
    if not 1 <= count < layers:
        raise InvalidInput(f"a search keeps 1 to {layers - 1} of {layers} layers, not {count}")
    scores: dict[Layers, float] = {}

    def trial(kept: Layers) -> float:
        if kept not in scores:
            scores[kept] = known[kept] if known and kept in known else score(kept)
            save({**(known or {}), **scores})
            best = min(scores.values())
            on_progress(Progress(len(scores), max_trials, "search", {"try_cos": scores[kept], "best_cos": best}))
        return scores[kept]

    patterns = {tuple(pattern(count, layers)) for pattern in PATTERNS.values()}
    best = min(sorted(kept for kept in patterns if kept[-1] == layers - 1), key=trial)
    improved = True
    while improved and len(scores) < max_trials:
        improved = False
        for kept in _neighbours(best):
            if len(scores) >= max_trials:
                break
            if kept not in scores and trial(kept) < scores[best]:
                best, improved = kept, True
                break
    return LayerChoice(best, scores)


def _neighbours(kept: Layers) -> Iterator[Layers]:
    """The candidates in which one layer is moved; the last one stays."""
    for move in MOVES:
        for index in range(len(kept) - 1):
            previous = kept[index - 1] if index else -1
            if previous < kept[index] + move < kept[index + 1]:
                yield (*kept[:index], kept[index] + move, *kept[index + 1 :])


class SearchProgress:
    """The scores of a search, saved after each trial."""

    def __init__(self, folder: Path, *run_id: object) -> None:
        self._file = ProgressFile(folder / "layers.json", fingerprint(*run_id))

    def read(self) -> dict[Layers, float]:
        """The scores that an interrupted search with the same run id has saved."""
        try:
            return {tuple(kept): float(score) for kept, score in self._file.read() or []}
        except (ValueError, TypeError):
            return {}

    def write(self, scores: dict[Layers, float]) -> None:
        self._file.write([[*pair] for pair in scores.items()])
