"""Laws of the teacher cache: equal to a fresh pass, never a half-written record, and never more than the budget."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from post_server.settings import Settings
from post_shared.errors import Cancelled
from post_shared.method.distillation.corpus import prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.teacher_cache import CACHE_BYTES, CacheBudget, TeacherCache
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model

PARAGRAPHS = [" ".join(TEXTS)] * 12
ROUNDED = CacheBudget(2**24)
EXACT = CacheBudget(2**24, torch.float32)
CONFIG = DistilOptions(keep_layers=2, batch_tokens=128, sequence_length=32, steps=30)


def counted(model: LanguageModel) -> list[int]:
    """Rows of each pass of the model from now on; a hook would be copied to its students."""
    rows: list[int] = []
    hidden = LanguageModel.hidden.__get__(model)

    def count(token_ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(token_ids))
        return hidden(token_ids)

    model.hidden = count  # type: ignore[method-assign]
    return rows


def blocks_of(target: LanguageModel) -> torch.Tensor:
    return torch.from_numpy(prepare_corpus(target, PARAGRAPHS, 32, None).blocks.astype(np.int64))


def cache_of(target: LanguageModel, folder: Path, blocks: torch.Tensor, cache_budget: CacheBudget) -> TeacherCache:
    return TeacherCache(folder, "corpus", (blocks.shape[0], blocks.shape[1]), target, cache_budget)


def test_states_are_computed_once_and_then_read_from_the_file(tmp_path: Path) -> None:
    target = tiny_model("llama")
    blocks, passes = blocks_of(target), counted(target)
    exact, rounded = cache_of(target, tmp_path, blocks, EXACT), cache_of(target, tmp_path, blocks, ROUNDED)
    fresh = target.hidden(blocks[:4])
    for cache, bound in ((exact, 0.0), (rounded, 2.0**-11)):
        passes.clear()
        first = cache.hidden([0, 1, 2, 3], blocks[:4])
        again = cache.hidden([3, 1], blocks[[3, 1]])
        assert passes == [4]
        assert torch.equal(again, first[[3, 1]])  # computed and cached states are the same
        assert bool(((first - fresh).abs() <= bound * fresh.abs() + 2.0**-25).all())
        cache.hidden([0, 5, 6], blocks[[0, 5, 6]])
        assert passes == [4, 2]
        other = cache_of(target, tmp_path, blocks, EXACT if cache is exact else ROUNDED)
        assert torch.equal(other.hidden([2], blocks[2:3]), first[2:3])
        assert passes == [4, 2]  # as in another process


def test_states_of_a_16_bit_target_are_stored_exactly(tmp_path: Path) -> None:
    target = tiny_model("llama")
    target.model.to(torch.bfloat16)
    blocks = blocks_of(target)
    cache = cache_of(target, tmp_path, blocks, ROUNDED)
    fresh = target.hidden(blocks[:2])
    cache.hidden([0, 1], blocks[:2])
    assert torch.equal(cache.hidden([0, 1], blocks[:2]), fresh)


def test_a_damaged_record_is_never_read(tmp_path: Path) -> None:
    """As a killed process may leave it at any byte, or from another target."""
    target = tiny_model("llama")
    blocks = blocks_of(target)
    cache = cache_of(target, tmp_path, blocks, ROUNDED)
    first = cache.hidden([0, 1], blocks[:2])
    record = cache.path.stat().st_size // cache.capacity
    content = cache.path.read_bytes()
    for cut in (1, 7, 8, 9, record // 2, record - 1):  # the last bytes of block 1 are missing, or zero
        damaged = bytearray(content)
        damaged[2 * record - cut : 2 * record] = bytes(cut)
        cache.path.write_bytes(damaged)
        passes = counted(target)
        assert torch.equal(cache_of(target, tmp_path, blocks, ROUNDED).hidden([0, 1], blocks[:2]), first)
        assert passes == ([1] if bytes(damaged) != content else [])
    swapped = content[record : 2 * record] + content[:record] + content[2 * record :]
    cache.path.write_bytes(swapped)
    passes = counted(target)
    assert torch.equal(cache_of(target, tmp_path, blocks, ROUNDED).hidden([0, 1], blocks[:2]), first)
    assert passes == [2]
    other = tiny_model("llama", seed=9)
    assert cache_of(other, tmp_path, blocks, ROUNDED).path != cache.path


def test_a_small_budget_caches_the_first_blocks_only(tmp_path: Path) -> None:
    target = tiny_model("llama")
    blocks = blocks_of(target)
    record = 32 * 32 * 2 + 8
    cache = cache_of(target, tmp_path, blocks, CacheBudget(3 * record + record // 2))
    indices = list(range(len(blocks)))
    fresh, passes = cache.hidden(indices, blocks), counted(target)
    assert torch.equal(cache.hidden(indices, blocks), fresh)
    assert passes == [len(blocks) - 3]
    assert cache.path.stat().st_size == 3 * record
    none = cache_of(target, tmp_path / "none", blocks, CacheBudget(record - 1))
    assert torch.equal(none.hidden([0], blocks[:1]), target.hidden(blocks[:1]))
    assert not (tmp_path / "none").exists()


def test_a_full_disk_does_not_stop_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model("llama")
    blocks = blocks_of(target)
    cache = cache_of(target, tmp_path, blocks, EXACT)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert torch.equal(cache.hidden([0, 1], blocks[:2]), target.hidden(blocks[:2]))
    monkeypatch.undo()
    passes = counted(target)
    cache.hidden([0, 1], blocks[:2])
    assert passes == [2]


def test_states_beyond_the_range_of_the_type_are_not_stored(tmp_path: Path) -> None:
    target = tiny_model("llama")
    target.body.norm.weight.data.mul_(1e6)
    blocks = blocks_of(target)
    cache, fresh = cache_of(target, tmp_path, blocks, ROUNDED), target.hidden(blocks[:1])
    assert torch.equal(cache.hidden([0], blocks[:1]), fresh)
    assert torch.equal(cache.hidden([0], blocks[:1]), fresh)


def test_distillation_with_cached_states_equals_distillation_without(tmp_path: Path) -> None:
    target, seen = tiny_model("llama"), list[Progress]()
    plain = distil(target, PARAGRAPHS, CONFIG, on_progress=seen.append)
    count = len(blocks_of(target))
    assert CONFIG.steps is not None
    assert CONFIG.steps * CONFIG.rows > 3 * count  # three passes and more
    passes = counted(target)
    exact = distil(target, PARAGRAPHS, CONFIG, checkpoint=tmp_path / "exact", cache_budget=EXACT)
    assert sum(passes) <= 2 * (count + CONFIG.rows)  # the corpus once, and the initialisation
    for actual, expected in zip(exact.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(actual, expected)
    losses: list[float] = []
    record_loss = lambda p: losses.append(p.metrics["loss"]) if p.stage == "distil" else None  # noqa: E731
    distil(target, PARAGRAPHS, CONFIG, on_progress=record_loss, checkpoint=tmp_path / "rounded", cache_budget=ROUNDED)
    plain_losses = [p.metrics["loss"] for p in seen if p.stage == "distil"]
    assert losses == pytest.approx(plain_losses, rel=2e-3)
    assert not list(tmp_path.rglob("*.states"))  # deleted at the end


def test_a_resumed_run_reads_the_cached_states(tmp_path: Path) -> None:
    target = tiny_model("llama")

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 25:
            raise Cancelled("stop")

    undisturbed = distil(target, PARAGRAPHS, CONFIG, checkpoint=tmp_path / "a", cache_budget=ROUNDED)
    with pytest.raises(Cancelled):
        distil(target, PARAGRAPHS, CONFIG, on_progress=stop, checkpoint=tmp_path / "b", cache_budget=ROUNDED)
    passes = counted(target)
    resumed = distil(target, PARAGRAPHS, CONFIG, checkpoint=tmp_path / "b", cache_budget=ROUNDED)
    assert passes == []
    for actual, expected in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("change", [{"steps": 1}, {"alignment": 1.0}], ids=["one pass", "alignment"])
def test_no_states_are_cached_that_no_later_pass_could_read(tmp_path: Path, change: dict[str, float]) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "distil":
            assert not list(tmp_path.glob("*.states"))

    config = CONFIG.replace(**{"steps": 12, **change})  # type: ignore[arg-type]
    distil(tiny_model("llama"), PARAGRAPHS, config, on_progress=stop, checkpoint=tmp_path, cache_budget=ROUNDED)
    masked = CONFIG.replace(student_init="copy", steps=12)  # other tokens are masked in each pass
    distil(tiny_model("roberta"), PARAGRAPHS, masked, on_progress=stop, checkpoint=tmp_path, cache_budget=ROUNDED)


def test_the_default_of_the_setting_is_that_of_the_module() -> None:
    """The settings repeat it, since importing the module would load torch."""
    assert Settings.model_fields["teacher_cache_bytes"].default == CACHE_BYTES
