"""Laws of tuning without label bias: the bias is measured on public text, and per-row gradients stay per-row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from post_client.privacy import PrivacyConfig
from post_client.privacy.dp_optimizer import PromptDPSGD
from post_client.privacy.randomness import SeededRandomness
from post_client.tuning.tune import tune, tuning_objective
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, DataInvalid, InvalidInput
from post_shared.method.tuning.label_bias import MIN_TEXTS, CalibratedLoss
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "neutral": ("fine",), "positive": ("good", "great")})
PUBLIC = [f"{text} {word}" for text in TEXTS for word in ("plot", "nice")]
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture(params=["llama", "roberta"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def measured(model: LanguageModel, prompt: torch.Tensor, *, per_row: bool = True) -> CalibratedLoss:
    loss = CalibratedLoss(model, TASK, PUBLIC, batch_size=len(PUBLIC), max_length=64, reserved=4, per_row=per_row)
    loss.measure(0, prompt)
    return loss


def mean_scores(model: LanguageModel, prompt: torch.Tensor) -> torch.Tensor:
    """The slow path: centred class scores of every public text, averaged."""
    encoded = encode_rows(model, TASK, PUBLIC, 64, reserved=4)
    scores = label_words(model, TASK).of(model.answer_logits(encoded.batch(range(len(PUBLIC))), prompt))
    return (scores - scores.mean(1, keepdim=True)).mean(0)


def test_the_bias_and_its_gradient_are_those_of_public_text(model: LanguageModel) -> None:
    prompt = SoftPrompt.random(model, 4, seed=1).embeddings
    calibrated = measured(model, prompt).bias
    assert calibrated is not None
    torch.testing.assert_close(calibrated.of(prompt)[0], mean_scores(model, prompt), rtol=1e-3, atol=1e-4)
    step = 1e-2 * torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        calibrated.of(prompt + step)[0] - calibrated.of(prompt)[0],
        mean_scores(model, prompt + step) - mean_scores(model, prompt),
        rtol=0.1,
        atol=1e-3,
    )


@pytest.mark.parametrize("per_row", [True, False])
def test_gradients_are_those_of_the_loss_written_out(model: LanguageModel, *, per_row: bool) -> None:
    """Cross-entropy of the scores minus the public mean, plus KL(uniform || mean), differentiated through both."""
    batch = encode_rows(model, TASK, TEXTS, 64, labels=LABELS, reserved=4).batch(range(8))
    ours, slow = (SoftPrompt.random(model, 4, seed=1).embeddings.clone().requires_grad_() for _ in range(2))
    loss = measured(model, ours, per_row=per_row)
    for part in batch.split(3):  # one backward pass through the bias, however many parts a step has
        loss(ours, part).sum().backward()
    loss.backward()
    mean = mean_scores(model, slow)
    scores = label_words(model, TASK).of(model.answer_logits(batch, slow)) - mean
    uniform = torch.nn.functional.kl_div(mean.log_softmax(0), torch.full((3,), 1 / 3), reduction="sum")
    (torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum") + 8 * uniform).backward()
    assert ours.grad is not None
    assert slow.grad is not None
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-2, atol=1e-3 * float(slow.grad.abs().max()))


def test_a_rows_gradient_depends_on_no_other_row(model: LanguageModel) -> None:
    prompt = torch.nn.Parameter(SoftPrompt.random(model, 4, seed=1).embeddings.clone())
    loss = measured(model, prompt)
    optimizer = PromptDPSGD(
        prompt,
        0.1,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4.0,
        randomness=SeededRandomness(0),
    )
    encoded = encode_rows(model, TASK, TEXTS, 64, labels=LABELS, reserved=4)
    for computed in optimizer.row_gradients(loss, encoded.batch(range(8))):
        leaf = prompt.detach().clone()[None].requires_grad_()
        loss(leaf, encoded.batch([computed.row])).sum().backward()
        assert leaf.grad is not None
        assert torch.equal(computed.gradient, leaf.grad[0])


def test_the_shared_gradient_is_removed_before_clipping() -> None:
    """With the bias subtracted and balanced, the rows' gradients no longer add up along the bias."""
    model = tiny_model()
    prompt = SoftPrompt.random(model, 4, seed=1).embeddings
    loss = measured(model, prompt)
    assert loss.bias is not None
    loss.bias = type(loss.bias)(loss.bias.prompt, torch.zeros(3), loss.bias.gradient)  # balanced: no KL term
    batch = encode_rows(model, TASK, PUBLIC, 64, labels=["positive"] * len(PUBLIC), reserved=4).batch(
        range(len(PUBLIC))
    )

    def along_bias(loss_function: object) -> float:
        leaf = prompt.expand(len(batch), -1, -1).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_function(leaf, batch).sum(), leaf)  # type: ignore[operator]
        direction = loss.bias.gradient[2].flatten()  # type: ignore[union-attr]
        return abs(float(gradient.flatten(1).mean(0) @ direction))

    assert along_bias(loss) < 0.3 * along_bias(tuning_objective(model, TASK))


@pytest.mark.parametrize("privacy", [None, PrivacyConfig(epsilon=8, seed=0)])
def test_tuning_with_public_texts(privacy: PrivacyConfig | None) -> None:
    model, config = tiny_model(), TuneOptions(num_virtual_tokens=4, steps=3, batch_size=4, max_length=32)
    rows = ROWS * 20
    results = [tune(model, TASK, rows, config, privacy=privacy, public=public) for public in (None, PUBLIC)]
    prompts = [result.prompt.embeddings for result in results]
    assert all(torch.isfinite(prompt).all() for prompt in prompts)
    assert not torch.equal(prompts[0], prompts[1]), "public texts have an effect"
    if privacy is not None:
        assert results[1].statement is not None
        assert results[0].statement is not None
        assert results[1].statement.epsilon_spent == results[0].statement.epsilon_spent, "at no privacy cost"


def test_public_texts_that_cannot_help_are_refused() -> None:
    model, config = tiny_model(), TuneOptions(num_virtual_tokens=4, steps=1, max_length=32)
    with pytest.raises(DataInvalid, match=str(MIN_TEXTS)):
        tune(model, TASK, ROWS, config, privacy=None, public=["one text"] * 100)
    with pytest.raises(InvalidInput, match="generation"):
        tune(model, Task("{text} Answer:"), ROWS, config, privacy=None, public=PUBLIC)


def test_outputs_for_public_texts_that_are_not_finite_are_refused() -> None:
    """Otherwise a private run would return noise alone, with a valid but useless privacy claim."""
    model = tiny_model()
    model.model.get_input_embeddings().weight.data[model.tokenizer(" plot").input_ids[0]] = torch.nan
    with pytest.raises(InvalidInput, match="public texts are NaN or infinite"):
        measured(model, torch.zeros(4, model.hidden_size))


@pytest.mark.parametrize("privacy", [None, PrivacyConfig(epsilon=8, seed=0)])
def test_a_resumed_run_with_public_texts_equals_an_undisturbed_one(
    privacy: PrivacyConfig | None, tmp_path: Path
) -> None:
    model, config = tiny_model(), TuneOptions(num_virtual_tokens=4, steps=6, batch_size=4, max_length=32)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        tune(model, TASK, ROWS * 9, config, privacy=privacy, public=PUBLIC, on_progress=stop, checkpoint=tmp_path)
    resumed = tune(model, TASK, ROWS * 9, config, privacy=privacy, public=PUBLIC, checkpoint=tmp_path)
    undisturbed = tune(model, TASK, ROWS * 9, config, privacy=privacy, public=PUBLIC)
    assert torch.equal(resumed.prompt.embeddings, undisturbed.prompt.embeddings)
