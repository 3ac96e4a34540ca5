"""Shadow prompts equal the prompts that `tune` makes from the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from post_client.audit.shadow_prompts import confidences, tune_shadows
from post_client.privacy import PrivacyConfig
from post_client.tuning.tune import tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, InvalidInput
from post_shared.inference.evaluation import classify
from post_shared.method.audit.lira import Members, random_halves
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, WORDS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")}, "Is the film good:")
WORD = WORDS.split()
ROWS = [Row(f"{text} {WORD[at % len(WORD)]} {WORD[at // 3]}", label)
        for at, (text, label) in enumerate(zip(TEXTS * 5, LABELS * 5, strict=True))]  # fmt: skip
CONFIG = TuneOptions(num_virtual_tokens=4, steps=5, batch_size=6, learning_rate=0.02, seed=3)
PRIVATE = PrivacyConfig(epsilon=8, batch_size=6, steps=5, seed=11)
PUBLIC = [f"a {first} film, {second}" for first in WORD[:5] for second in WORD[5:10]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("public", [None, PUBLIC], ids=["alone", "public"])
def test_shadow_prompts_are_the_prompts_that_tune_makes(
    family: str, privacy: PrivacyConfig | None, public: list[str] | None
) -> None:
    model = tiny_model(family, layers=2)
    members = random_halves(3, len(ROWS), seed=5)
    prompts = tune_shadows(model, TASK, ROWS, members, CONFIG, privacy=privacy, public=public).prompts
    for k, included in enumerate(members):
        rows = [row for row, is_member in zip(ROWS, included, strict=True) if is_member]
        config = TuneOptions(**vars(CONFIG) | {"seed": CONFIG.seed + k})
        budget = privacy and PrivacyConfig(**vars(privacy) | {"seed": 11 + k})
        single = tune(model, TASK, rows, config, privacy=budget, public=public).prompt.embeddings
        torch.testing.assert_close(prompts[k], single, rtol=0, atol=0)
    assert float((prompts[0] - prompts[1]).abs().max()) > 0.01, "different rows, different prompts"


def test_halves_are_halves_and_independent_of_each_other() -> None:
    members = random_halves(400, 41, seed=0)
    assert set(members.sum(1)) == {20}
    assert len(np.unique(members, axis=0)) == 400
    others = members[1:].mean(0)
    assert abs(np.corrcoef(members[0], others)[0, 1]) < 0.6, "other prompts' members reveal nothing about this prompt's"


@pytest.mark.parametrize("privacy", [None, PrivacyConfig(epsilon=8, batch_size=6, steps=5)], ids=["plain", "private"])
def test_a_cancelled_run_resumes_and_a_finished_one_is_kept(tmp_path: Path, privacy: PrivacyConfig | None) -> None:
    members = random_halves(3, len(ROWS), seed=5)
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        steps.append(progress.step)
        if steps == [1, 2, 3]:
            raise Cancelled("stopped by the test")

    def run() -> torch.Tensor:
        folder = tmp_path / "state"
        return tune_shadows(
            tiny_model(layers=2), TASK, ROWS, members, CONFIG, privacy=privacy, on_progress=stop, checkpoint=folder
        ).prompts

    with pytest.raises(Cancelled):
        run()
    first = run()
    assert steps == list(range(1, 16)), "three prompts of five steps"
    assert torch.equal(run(), first), "nothing is tuned again"
    assert steps == list(range(1, 16))
    if privacy is None:
        undisturbed = tune_shadows(tiny_model(layers=2), TASK, ROWS, members, CONFIG, privacy=None).prompts
        torch.testing.assert_close(first, undisturbed, rtol=0, atol=0)


def test_confidences_are_logits_of_the_own_labels_probability() -> None:
    model = tiny_model(layers=2)
    prompts = torch.randn(2, 4, model.hidden_size, generator=torch.Generator().manual_seed(0))
    computed = confidences(model, TASK, ROWS, prompts, CONFIG)
    for k, prompt in enumerate(prompts):
        probabilities = classify(model, TASK, [row.text for row in ROWS], prompt).double()
        own = probabilities[range(len(ROWS)), [TASK.labels.index(str(row.label)) for row in ROWS]].numpy()
        np.testing.assert_allclose(computed[k], np.log(own) - np.log1p(-own), atol=2e-3)


def test_rows_that_no_prompt_uses_have_no_effect() -> None:
    """A row in none of the halves may have any label: the prompts stay the same."""
    members: Members = random_halves(2, len(ROWS), seed=1)
    members[:, 7] = False
    other = list(ROWS)
    other[7] = Row(ROWS[7].text, "positive")
    assert ROWS[7].label == "negative"
    first, second = (
        tune_shadows(tiny_model(layers=2), TASK, rows, members, CONFIG, privacy=PRIVATE) for rows in (ROWS, other)
    )
    assert torch.equal(first.prompts, second.prompts)


def test_a_generation_task_is_refused() -> None:
    with pytest.raises(InvalidInput, match="scores classes"):
        tune_shadows(tiny_model(), Task("{text}"), ROWS, random_halves(2, 40, 0), CONFIG, privacy=None)
