"""The core with the demo's real model and text. Slow: downloads 106 MB once and then takes minutes."""

from __future__ import annotations

import pytest
import torch

from post_client.demo import fetch, texts
from post_client.demo.settings import DemoSettings
from post_client.tuning.tune import tune
from post_shared.data.tasks import Task
from post_shared.inference.evaluation import classify
from post_shared.method.distillation.corpus import next_token, prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.transfer.transfer import transfer
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.distillation import distillation_losses
from tests.models import per_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TASK = Task.preset("sst2")


@pytest.fixture(scope="module")
def data() -> texts.DemoTexts:
    files = fetch.fetch()
    return texts.make_texts(fetch.snippets(files), fetch.news(files), DemoSettings(test_rows=64))


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    torch.set_num_threads(2)
    return LanguageModel.load(fetch.model_file(fetch.fetch()), device="cpu")


def test_the_gguf_file_gives_a_model_that_saves_and_loads_as_safetensors(target: LanguageModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert (target.kind, target.layers, target.hidden_size, target.vocabulary) == ("causal", 30, 576, 49152)
    assert target.parameters == 134_515_008
    target.save(tmp_path)
    reloaded = LanguageModel.load(tmp_path, device="cpu")
    ids = torch.tensor([target.tokenizer("A fine film, it was").input_ids])
    assert torch.equal(reloaded.hidden(ids), target.hidden(ids))


def test_padded_batch_and_prefix_equal_single_rows(target: LanguageModel, data: texts.DemoTexts) -> None:
    batch = encode_rows(target, TASK, [row.text for row in data.test[:6]]).batch(range(6))
    prompt = SoftPrompt.from_text(target, TASK.description, 10).embeddings
    with torch.no_grad():
        together = target.answer_logits(batch, per_row(prompt, batch))
        alone = torch.cat([target.answer_logits(batch.encoded.batch([at]), prompt) for at in range(6)])
        after = target.answer_logits(batch, target.prefix(prompt))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, alone, rtol=1e-3, atol=1e-3)


def test_all_presets_fit_the_real_tokenizer(target: LanguageModel) -> None:
    from post_shared.data.tasks import preset_names
    from post_shared.model.verbalizer import label_words

    for name in preset_names():
        task = Task.preset(name)
        if not task.is_generation:
            assert label_words(target, task).weights.shape[0] == len(task.labels)


def test_distil_tune_transfer_each_lower_their_loss_on_real_text(target: LanguageModel, data: texts.DemoTexts) -> None:
    reports: list[Progress] = []
    config = DistilOptions(keep_layers=4, steps=10, init_tokens=4_000, templates=("{text}, it was",))
    student = distil(target, data.corpus[:3000], config, on_progress=reports.append)
    corpus = prepare_corpus(target, data.corpus[3000:3400], 64, None)
    held_out = next_token(corpus.batch(0, 8, 0), 0.25, torch.Generator().manual_seed(0))
    with torch.no_grad():
        distilled = distillation_losses(target, student, held_out)
        copied = distillation_losses(target, copy_student(target, [0, 1, 28, 29]), held_out)
    assert float(distilled["ce"]) < 0.6 * float(copied["ce"])
    reports.clear()
    tuned = tune(
        student,
        TASK,
        data.train[:512],
        TuneOptions(num_virtual_tokens=10, steps=30, max_length=64),
        privacy=None,
        on_progress=reports.append,
    )
    assert reports[-1].metrics["loss"] < reports[0].metrics["loss"]
    public = [row.text for row in data.public[:32]]
    transferred = transfer(
        target, student, TASK, tuned.prompt, public, TransferOptions(steps=40, batch_size=8, max_rows=32, max_length=64)
    )
    assert transferred.last_loss < transferred.first_loss
    scores = classify(target, TASK, [row.text for row in data.test], transferred.prompt.embeddings)
    assert scores.shape == (64, 2)
    torch.testing.assert_close(scores.sum(1), torch.ones(64))
