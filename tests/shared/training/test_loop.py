"""Laws of the training loop: killed and resumed equals undisturbed; the state of another run is ignored."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from post_shared.data.batches import Batch, ShuffledBatches
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, InvalidInput
from post_shared.method.losses import label_word_loss
from post_shared.model.encoding import encode_rows
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.loop import Clock, run_steps, train_prompt, warm_then_linear
from post_shared.training.optimizer import PromptAdam
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, per_row, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})


def train(checkpoint: Checkpoint | None = None, stop_at: int | None = None, steps: int = 12) -> Tensor:
    model = tiny_model()
    encoded = encode_rows(model, TASK, TEXTS, labels=LABELS)
    words = label_words(model, TASK)

    def loss(prompt: Tensor, batch: Batch) -> Tensor:
        return label_word_loss(words.of(model.answer_logits(batch, per_row(prompt, batch))), batch.labels)

    def on_progress(progress: Progress) -> None:
        if progress.step == stop_at:
            raise Cancelled("stop")

    start = SoftPrompt.random(model, 3).embeddings
    return train_prompt(
        PromptAdam(nn.Parameter(start.clone()), 0.05),
        loss,
        ShuffledBatches(encoded, 4, seed=0),
        steps=steps,
        learning_rate=0.05,
        stage="tune",
        on_progress=on_progress,
        checkpoint=checkpoint,
    )


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_cancelled_and_resumed_equals_undisturbed(tmp_path: Path, stop_at: int) -> None:
    kept = Checkpoint(tmp_path, "run")
    with pytest.raises(Cancelled):
        train(kept, stop_at)
    assert kept.begun()
    assert torch.equal(train(kept), train())


def test_a_kill_between_checkpoints_repeats_steps_and_ends_the_same(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, "run", every_seconds=0.0)

    class Killed(BaseException):
        pass

    before = kept.save

    def save(step: int, seconds: float, tensors: dict[str, Tensor]) -> None:
        if step == 5:
            raise Killed
        before(step, seconds, tensors)

    object.__setattr__(kept, "save", save)
    with pytest.raises(Killed):
        train(kept)
    assert torch.equal(train(Checkpoint(tmp_path, "run")), train())


def test_the_state_of_another_run_or_a_broken_file_is_ignored(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, "run")
    with pytest.raises(Cancelled):
        train(kept, stop_at=5)
    assert Checkpoint(tmp_path, "other").load() is None
    kept.path.write_bytes(kept.path.read_bytes()[:100])
    assert kept.load() is None
    assert torch.equal(train(kept), train())


def test_tuning_lowers_the_loss_and_changes_nothing_but_the_prompt() -> None:
    model = tiny_model()
    weights = [p.clone() for p in model.model.parameters()]
    seen: list[float] = []
    words, encoded = label_words(model, TASK), encode_rows(model, TASK, TEXTS, labels=LABELS)
    train_prompt(
        PromptAdam(nn.Parameter(SoftPrompt.random(model, 8).embeddings.clone()), 0.3),
        lambda prompt, batch: label_word_loss(
            words.of(model.answer_logits(batch, per_row(prompt, batch))), batch.labels
        ),
        ShuffledBatches(encoded, 8, seed=0),
        steps=100,
        learning_rate=0.3,
        stage="tune",
        on_progress=lambda progress: seen.append(progress.metrics["loss"]),
    )
    assert seen[-1] < 0.5 * seen[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_training() -> None:
    class Nothing:
        def state(self) -> dict[str, Tensor]:
            return {}

        def load_state(self, tensors: object) -> None: ...

    with pytest.raises(InvalidInput, match="not finite; lower the learning rate"):
        run_steps(lambda clock: {"loss": float("nan")}, Nothing(), steps=3, stage="tune")
    with pytest.raises(InvalidInput, match="how long"):
        Clock(None, None)


def test_the_schedule_rises_then_falls_to_zero() -> None:
    assert [warm_then_linear(x, 0.5) for x in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


def test_fingerprints_differ_when_anything_differs() -> None:
    digests = {fingerprint(*parts) for parts in [(1, "a"), (1, "b"), (torch.ones(2),), (torch.zeros(2),)]}
    assert len(digests) == 4
    exact = torch.nn.Linear(4, 4)
    rounded = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())  # the same values, but computations with them differ
    assert fingerprint(exact) != fingerprint(rounded)
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = train()
    with pytest.raises(Cancelled):
        train(Checkpoint(tmp_path, "this", 0.0), stop_at=3)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(_: object, path: Path, *__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("post_shared.training.checkpoint.save_file", full)
    monkeypatch.setattr(logging.getLogger("post"), "propagate", True)
    caplog.set_level(logging.WARNING, "post")
    assert torch.equal(train(Checkpoint(tmp_path, "this", 0.0)), undisturbed)
    assert "No space left" in caplog.text
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [kept]
