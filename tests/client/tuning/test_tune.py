"""Laws of tuning on private data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from post_client.privacy import PrivacyConfig
from post_client.tuning.tune import encode_private, starting_prompt, tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, DataInvalid, InvalidInput, TaskInvalid
from post_shared.inference.evaluation import evaluate
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import SAMPLE_POSITIONS
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")}, "Is the film good:")
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
CONFIG = TuneOptions(num_virtual_tokens=8, steps=80, batch_size=8, learning_rate=0.3)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_plain_prompt_learns_the_task_and_has_no_statement(family: str) -> None:
    model = tiny_model(family)
    result = tune(model, TASK, ROWS, CONFIG, privacy=None)
    assert result.statement is None
    assert evaluate(model, TASK, ROWS, result.prompt.embeddings).accuracy > 0.8


def test_private_tuning_states_what_it_guarantees_and_reports_what_it_spent() -> None:
    reports: list[Progress] = []
    rows = ROWS * 20
    privacy = PrivacyConfig(epsilon=8, batch_size=16, steps=10)
    result = tune(tiny_model(), TASK, rows, CONFIG, privacy=privacy, on_progress=reports.append)
    assert result.statement is not None
    assert result.statement.private
    assert result.statement.epsilon_spent <= 8
    assert result.statement.delta < 1 / len(rows)
    spent = [progress.metrics["epsilon"] for progress in reports]
    assert len(spent) == 10
    assert spent == sorted(spent)
    assert 0 < spent[-1] <= 8


def test_two_private_runs_differ_and_two_seeded_ones_do_not() -> None:
    def run(seed: int | None) -> torch.Tensor:
        privacy = PrivacyConfig(epsilon=8, batch_size=4, steps=4, seed=seed)
        return tune(tiny_model(), TASK, ROWS * 20, CONFIG, privacy=privacy).prompt.embeddings

    assert not torch.equal(run(None), run(None))
    assert torch.equal(run(1), run(1))


@pytest.mark.parametrize("privacy", [None, PrivacyConfig(epsilon=8, batch_size=4, steps=8, seed=3)])
def test_cancelled_and_resumed_equals_undisturbed(tmp_path: Path, privacy: PrivacyConfig | None) -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=8, batch_size=4)

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        tune(tiny_model(), TASK, ROWS * 20, config, privacy=privacy, on_progress=stop, checkpoint=tmp_path)
    resumed = tune(tiny_model(), TASK, ROWS * 20, config, privacy=privacy, checkpoint=tmp_path)
    undisturbed = tune(tiny_model(), TASK, ROWS * 20, config, privacy=privacy)
    assert torch.equal(resumed.prompt.embeddings, undisturbed.prompt.embeddings)


def test_a_checkpoint_of_other_data_is_not_resumed(tmp_path: Path) -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=4, batch_size=4)

    def stop(progress: Progress) -> None:
        raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        tune(tiny_model(), TASK, ROWS, config, privacy=None, on_progress=stop, checkpoint=tmp_path)
    steps: list[int] = []
    other = [*ROWS[:-1], Row("a superb story", "positive")]
    tune(
        tiny_model(), TASK, other, config, privacy=None, on_progress=lambda p: steps.append(p.step), checkpoint=tmp_path
    )
    assert steps == [1, 2, 3, 4]


def test_generation_learns_free_answers() -> None:
    model, task = tiny_model(), Task("{text} The story is")
    rows = [Row(text, "good" if label == "positive" else "bad") for text, label in zip(TEXTS, LABELS, strict=True)]
    result = tune(
        model, task, rows, TuneOptions(num_virtual_tokens=10, steps=300, batch_size=8, learning_rate=0.3), privacy=None
    )
    assert evaluate(model, task, rows, result.prompt.embeddings).accuracy > 0.6


def test_the_initial_prompt_states_the_task() -> None:
    model = tiny_model()
    ids = model.tokenizer("Is the film good:").input_ids
    first = model.embed(torch.tensor(ids[:5]))
    torch.testing.assert_close(starting_prompt(model, TASK, TuneOptions(num_virtual_tokens=5)).embeddings, first)
    assert starting_prompt(model, Task("{text}", TASK.label_words), TuneOptions(num_virtual_tokens=3)).length == 3
    vocabulary = model.embed(torch.arange(model.vocabulary))
    for row in starting_prompt(model, TASK, TuneOptions(num_virtual_tokens=5, prompt_init="random")).embeddings:
        assert (vocabulary == row).all(dim=1).any()


def test_bad_input_is_refused_before_anything_is_trained() -> None:
    model = tiny_model()
    for rows, message in [
        ([], "no rows"),
        ([Row("x", None)], "no label"),
        ([Row("x", "positive")] * 3, "all 3 rows have the label 'positive'"),
        ([*ROWS, Row("x", "sports")], "sports"),
    ]:
        with pytest.raises(DataInvalid, match=message):
            tune(model, TASK, rows, CONFIG, privacy=None)
    task = Task("{text}, it was", {"negative": ("cinematographic",), "positive": ("good",)})
    with pytest.raises(TaskInvalid, match="tokens"):
        tune(model, task, ROWS, CONFIG, privacy=None)
    with pytest.raises(InvalidInput, match="don't fit"):
        tune(model, TASK, ROWS, TuneOptions(num_virtual_tokens=200), privacy=None)
    for change in ({"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"prompt_init": "zeros"}):
        with pytest.raises(InvalidInput):
            TuneOptions(**change)  # type: ignore[arg-type]


def test_a_plain_step_runs_the_prompt_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-row gradients need one copy of the prompt per row; without privacy that would be wasted work."""
    model, rows, config = tiny_model(), ROWS[:8], TuneOptions(num_virtual_tokens=8, steps=1, batch_size=8)
    shapes: list[torch.Size] = []
    last_hidden = LanguageModel.last_hidden

    def recording(self: LanguageModel, **inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            shapes.append(inputs["inputs_embeds"].shape[:2])
        return last_hidden(self, **inputs)

    monkeypatch.setattr(LanguageModel, "last_hidden", recording)
    tune(model, TASK, rows, config, privacy=None)
    encoded = encode_private(model, TASK, rows, config)
    (step,) = [shape for shape in shapes if shape[1] > SAMPLE_POSITIONS + 1]  # the memory plan's sample isn't a step
    assert step[0] == 1
    assert step[1] <= config.num_virtual_tokens + len(rows) * encoded.whole.longest
