"""Laws of the baselines: a label bias doesn't count, a public text decides nothing else, proxies add up."""

from __future__ import annotations

import pytest
import torch

from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.method.transfer.baselines import calibrated_scores, proxy_scores
from post_shared.method.transfer.teacher_outputs import model_outputs
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from tests.models import TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
PUBLIC = [f"{text} nice" for text in TEXTS]


def biased(model: LanguageModel, label: str, amount: float) -> LanguageModel:
    """The same model whose head favours the words of a label for every text."""
    core = model.model
    head = torch.nn.Linear(model.hidden_size, model.vocabulary)
    head.weight = torch.nn.Parameter(core.get_output_embeddings().weight.detach().clone())
    head.bias = torch.nn.Parameter(torch.zeros(model.vocabulary))
    tokens = [
        model.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in (TASK.label_words or {})[label]
    ]
    with torch.no_grad():
        head.bias[tokens] = amount
    core.set_output_embeddings(head)
    return LanguageModel(core, model.tokenizer)


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_label_bias_changes_nothing(ensemble: bool) -> None:
    plain = calibrated_scores(tiny_model(), TASK, TEXTS, PUBLIC, ensemble=ensemble)
    favoured = calibrated_scores(biased(tiny_model(), "positive", 50.0), TASK, TEXTS, PUBLIC, ensemble=ensemble)
    torch.testing.assert_close(favoured, plain, rtol=1e-3, atol=1e-3)


def test_over_the_public_texts_themselves_no_class_is_favoured() -> None:
    scores = calibrated_scores(tiny_model(), TASK, PUBLIC, PUBLIC)
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.sum(1), torch.zeros(len(PUBLIC)), rtol=0, atol=1e-3)


def test_one_question_is_the_plain_template() -> None:
    model = tiny_model()
    rows = encode_rows(model, TASK, [*TEXTS, *PUBLIC])
    scores = model_outputs(model, rows, label_words(model, TASK))
    expected = (scores[:, 1] - scores[:, 0])[: len(TEXTS)] - (scores[:, 1] - scores[:, 0])[len(TEXTS) :].mean()
    found = calibrated_scores(model, TASK, TEXTS, PUBLIC, ensemble=False)
    assert torch.equal((found[:, 1] - found[:, 0]) > 0, expected > 0)


def test_a_proxy_moves_the_targets_scores_as_the_prompt_moves_the_students() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4, seed=1)
    rows, words = encode_rows(target, TASK, TEXTS), label_words(target, TASK)
    change = model_outputs(student, rows, words, prompt) - model_outputs(student, rows, words)
    expected = model_outputs(target, rows, words) + change
    torch.testing.assert_close(proxy_scores(target, student, TASK, prompt, TEXTS), expected, rtol=1e-3, atol=1e-3)


def test_what_can_not_be_compared_is_refused() -> None:
    with pytest.raises(InvalidInput, match="classes"):
        calibrated_scores(tiny_model(), Task("{text}"), TEXTS, PUBLIC)
    with pytest.raises(DataInvalid, match="public text"):
        calibrated_scores(tiny_model(), TASK, TEXTS, [])
