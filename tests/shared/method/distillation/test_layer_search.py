"""Laws of the choice of layers: the patterns, the search, and how an interrupted search resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from post_shared.errors import Cancelled, InvalidInput
from post_shared.method.distillation import distil as distillation
from post_shared.method.distillation.corpus import Corpus, prepare_corpus
from post_shared.method.distillation.distil import choose_layers, distil
from post_shared.method.distillation.layer_search import LayerChoice, Layers, LayerSearch, SearchProgress, search_layers
from post_shared.method.distillation.layer_selection import PATTERNS, chosen_layers
from post_shared.method.distillation.student_init import TargetStates, least_squares
from post_shared.method.losses import cosine_loss
from post_shared.model.layers import copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model
from tests.shared.method.distillation.test_teacher_cache import counted

PARAGRAPHS = [" ".join(TEXTS)] * 40
CONFIG = DistilOptions(keep_layers=3, layer_pattern="search", steps=2, batch_tokens=64, sequence_length=32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layers", [2, 5, 12, 30])
def test_every_pattern_gives_ascending_layers_with_the_last_one(pattern: str, layers: int) -> None:
    for count in range(2, layers + 1):
        kept = chosen_layers(count, layers, pattern)
        assert kept == sorted(set(kept))
        assert (len(kept), kept[0], kept[-1]) == (count, 0, layers - 1)


def test_the_search_ends_at_a_pattern_with_no_better_neighbour() -> None:
    best = (1, 4, 7, 11)
    choice = search_layers(lambda kept: sum(abs(a - b) for a, b in zip(kept, best, strict=True)), 4, 12, max_trials=200)
    assert choice.kept == best
    assert choice.scores[best] == min(choice.scores.values()) == 0
    assert all(kept[-1] == 11 and list(kept) == sorted(set(kept)) for kept in choice.scores)
    few = search_layers(lambda kept: float(kept[0]), 4, 12, max_trials=5)
    assert len(few.scores) == 5
    for count in (0, 12):
        with pytest.raises(InvalidInput, match="a search keeps 1 to 11 of 12 layers"):
            search_layers(lambda kept: 0.0, count, 12)


def test_an_interrupted_search_takes_the_same_path_without_scoring_again(tmp_path: Path) -> None:
    saved = SearchProgress(tmp_path, "run")
    assert saved.read() == {}
    scored: list[Layers] = []

    def score(kept: Layers) -> float:
        scored.append(kept)
        return float(sum((layer - 3 * index) ** 2 for index, layer in enumerate(kept)))

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        search_layers(score, 4, 12, save=saved.write, on_progress=stop)
    assert list(saved.read()) == scored
    resumed = search_layers(score, 4, 12, known=saved.read(), save=saved.write)
    assert len(scored) == len(set(scored)) == len(resumed.scores)
    assert resumed == search_layers(score, 4, 12)

    def at_once(progress: Progress) -> None:
        raise Cancelled("stop")

    known = saved.read()
    with pytest.raises(Cancelled):
        search_layers(score, 4, 12, known=known, save=saved.write, on_progress=at_once)
    assert saved.read() == known, "a search that is stopped again at once loses nothing"
    assert SearchProgress(tmp_path, "another run").read() == {}
    (tmp_path / "layers.json").write_text('{"run_id": ')
    assert saved.read() == {}


def test_candidates_share_one_pass_of_the_target_and_score_as_if_initialised_alone() -> None:
    target = tiny_model("llama", layers=6)
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None)
    blocks = [corpus.batch(0, 4, 0), corpus.batch(1, 4, 0)]
    held_out = corpus.batch(2, 4, 0)
    passes = counted(target)
    search = LayerSearch(target, "least_squares", blocks, held_out)
    scores = {kept: search.score(kept) for kept in [(0, 3, 5), (0, 1, 5), (2, 4, 5)]}
    assert passes == [4, 4, 4]  # two batches for all fits, and the held-out text
    for kept, score in scores.items():
        alone = copy_student(target, kept)
        least_squares(alone, kept, TargetStates(target, blocks))
        expected = cosine_loss(target.hidden(held_out), alone.hidden(held_out)).mean()
        assert score == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_distillation_keeps_the_best_candidate_and_reports_it(family: str, tmp_path: Path) -> None:
    target, choices = tiny_model(family, layers=5), list[LayerChoice]()
    student_init = "least_squares" if family == "llama" else "copy"
    config = DistilOptions(**{**vars(CONFIG), "student_init": student_init})
    stages: list[str] = []
    student = distil(
        target,
        PARAGRAPHS,
        config,
        chosen=choices.append,
        checkpoint=tmp_path,
        on_progress=lambda p: stages.append(p.stage),
    )
    choice = choices[0]
    assert student.layers == len(choice.kept) == 3
    assert choice.scores[choice.kept] == min(choice.scores.values())
    assert {tuple(pattern(3, 5)) for pattern in PATTERNS.values()} <= set(choice.scores)
    assert stages.count("search") == len(choice.scores)
    named = distil(
        target, PARAGRAPHS, DistilOptions(**{**vars(config), "keep_layers": choice.kept, "layer_pattern": "front"})
    )
    for actual, expected in zip(student.model.parameters(), named.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_resumed_distillation_does_not_search_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model("llama", layers=5)

    def stop(progress: Progress) -> None:
        if progress.stage == "distil":
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        distil(target, PARAGRAPHS, CONFIG, on_progress=stop, checkpoint=tmp_path)

    class NoSearch(LayerSearch):
        def score(self, kept: Layers) -> float:
            raise AssertionError(kept)

    monkeypatch.setattr(distillation, "LayerSearch", NoSearch)
    resumed = distil(target, PARAGRAPHS, CONFIG, checkpoint=tmp_path)
    monkeypatch.undo()
    undisturbed = distil(target, PARAGRAPHS, CONFIG)
    for actual, expected in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("blocks", [2, 3, 9, 40, 100, 127, 300])
def test_no_candidate_is_scored_on_text_that_it_was_fitted_on(blocks: int) -> None:
    numbered = np.arange(blocks, dtype=np.int32)[:, None].repeat(64, 1)
    corpus = Corpus(numbered, np.zeros(blocks, dtype=np.int64))
    fitted, held_out = distillation._search_split(corpus, DistilOptions(sequence_length=64, steps=1))
    fitted_blocks, scored_blocks = ({int(row[0]) for row in rows} for rows in (torch.cat(fitted), held_out))
    assert fitted_blocks
    assert scored_blocks
    assert not fitted_blocks & scored_blocks
    assert len(scored_blocks) == min(64, blocks // 2)


def test_named_layers_are_not_searched_for() -> None:
    target = tiny_model("llama", layers=5)
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None)

    def choose(**change: object) -> LayerChoice:
        return choose_layers(target, corpus, DistilOptions(**{**vars(CONFIG), **change}))

    assert choose(keep_layers=(0, 4), layer_pattern="front") == LayerChoice((0, 4))
    assert choose(layer_pattern="even") == LayerChoice((0, 2, 4))
    for change in ({"keep_layers": (0, 4)}, {"layer_pattern": "odd"}):
        with pytest.raises(InvalidInput, match="layer_pattern"):
            choose(**change)
