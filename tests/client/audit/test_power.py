"""The one-run audit refutes faulty runs and doesn't refute sound ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from post_client.audit import audit_in_one_run, evidence
from post_client.audit.canaries import DataCanaries, Finding
from post_client.privacy import PrivacyConfig, PromptDPSGD, SeededRandomness, noise_for
from post_client.tuning.tune import tuning_objective
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, InvalidInput
from post_shared.model.encoding import encode_rows
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, WORDS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
WORD = WORDS.split()
MORE_ROWS = [Row(f"{text} {WORD[at % len(WORD)]} {WORD[at // 12 % len(WORD)]}", label)
             for at, (text, label) in enumerate(zip(TEXTS * 32, LABELS * 32, strict=True))]  # fmt: skip
ROWS = MORE_ROWS[:128]
CONFIG = TuneOptions(num_virtual_tokens=4, steps=30, batch_size=12)
CLAIM = PrivacyConfig(epsilon=1.0, delta=1e-5)


def findings(privacy: PrivacyConfig = CLAIM, **options: object) -> list[Finding]:
    return audit_in_one_run(tiny_model(layers=2), TASK, ROWS, CONFIG, privacy, **options)  # type: ignore[arg-type]


def finding_of_128_canaries() -> Finding:
    """The finding of 128 gradient canaries in a run with fresh randomness; 64 can be too few for a bound above 1."""
    config = TuneOptions(num_virtual_tokens=8, steps=30, batch_size=24)
    _, gradient = audit_in_one_run(tiny_model(layers=2), TASK, MORE_ROWS, config, CLAIM)
    assert gradient.evidence.canaries == 128
    return gradient


def test_a_sound_run_is_not_refuted() -> None:
    data, gradient = findings()
    assert [data.kind, gradient.kind] == ["data", "gradient"]
    for each in (data, gradient):
        assert each.claimed == 1.0
        assert each.evidence.canaries == 64
        assert not each.refuted


def test_a_run_without_noise_that_claims_epsilon_1_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_client.privacy.dp_optimizer.gaussian", lambda randomness, shape, *_: np.zeros(shape))
    gradient = finding_of_128_canaries()
    assert gradient.evidence.epsilon > 1.0
    assert gradient.refuted


def test_a_run_that_does_not_clip_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: PromptDPSGD, gradients: Tensor) -> None:
        self.master.summed_grad += 200 * gradients.double().sum(0)

    monkeypatch.setattr(PromptDPSGD, "clip_and_accumulate", keep)
    assert finding_of_128_canaries().refuted


def test_several_runs_at_once_include_different_canaries() -> None:
    results = findings(runs=3, canaries=20)
    assert [each.kind for each in results] == ["data"] * 3 + ["gradient"] * 3
    included = DataCanaries.choose(TASK, ROWS, 20, 3, seed=0).included
    assert len(np.unique(included, axis=0)) == 3


def test_data_canaries_have_wrong_labels_and_leave_the_other_rows_alone() -> None:
    canaries = DataCanaries.choose(TASK, ROWS, 50, 4, seed=1)
    different = [index for index, row in enumerate(canaries.rows) if row != ROWS[index]]
    assert different == canaries.indices.tolist()
    assert all(canaries.rows[index].text == ROWS[index].text for index in different)
    members = canaries.members()
    assert members[:, [index for index in range(len(ROWS)) if index not in different]].all()
    assert 0.3 < members[:, canaries.indices].mean() < 0.7


@pytest.mark.parametrize("canaries", [0, 65])
def test_too_many_or_no_canaries_are_refused(canaries: int) -> None:
    with pytest.raises(InvalidInput, match="canaries for 128 rows"):
        findings(canaries=canaries)


def test_more_canaries_than_directions_are_refused() -> None:
    with pytest.raises(InvalidInput, match="directions"):
        audit_in_one_run(
            tiny_model(layers=2), TASK, ROWS, TuneOptions(num_virtual_tokens=1, steps=2), CLAIM, canaries=64
        )


def test_a_killed_audit_resumes_with_its_scores(tmp_path: Path) -> None:
    seeded = PrivacyConfig(epsilon=1.0, delta=1e-5, seed=2)
    undisturbed = findings(seeded)

    def stop(progress: Progress) -> None:
        if progress.step == 20:
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        findings(seeded, on_progress=stop, checkpoint=tmp_path)
    assert findings(seeded, checkpoint=tmp_path) == undisturbed


# --- PEFT's prompt tuning with Opacus's hooks ---------------------------------------------------------

CLIP, RUNS, DELTA = 1e-4, 200_000, 1e-6


def hooked_sums() -> tuple[Tensor, Tensor, DPOptimizer]:
    """Clipped sums of one step of PEFT with Opacus's hooks on a row, and on that row together with another one."""
    torch.manual_seed(0)
    model = tiny_model("llama", layers=2)
    encoded = encode_rows(model, TASK, ["a superb film"] * 2, labels=["positive", "negative"])
    words = [model.tokenizer(" " + word, add_special_tokens=False).input_ids[0] for word in ("bad", "good")]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    hooked = GradSampleModule(get_peft_model(model.model, config), loss_reduction="sum").train()
    trained = [weight for weight in hooked.parameters() if weight.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.0),
        noise_multiplier=noise_for(1.0, DELTA, 1.0, 1),
        max_grad_norm=CLIP,
        expected_batch_size=1,
        loss_reduction="sum",
    )

    def clipped(weights: list[float]) -> Tensor:
        """The second row has a larger weight than the first: a canary may have any gradient."""
        batch = encoded.batch(range(len(weights)))
        optimizer.zero_grad()
        logits = hooked(input_ids=batch.token_ids, attention_mask=batch.attention_mask).logits
        answers = logits[batch.rows, batch.positions + 1][:, words]  # (B, 1 + T, V) -> (B, 2)
        losses = nn.functional.cross_entropy(answers, batch.labels, reduction="none")
        (losses @ torch.tensor(weights)).backward()
        optimizer.step()
        return trained[0].summed_grad.clone()  # type: ignore[attr-defined,no-any-return]

    return clipped([1.0]), clipped([1.0, 1000.0]), optimizer


def own_sums() -> tuple[Tensor, Tensor]:
    """The same rows through POST's own step."""
    model = tiny_model("llama", layers=2)
    encoded = encode_rows(model, TASK, ["a superb film"] * 2, labels=["positive", "negative"])
    loss, sums = tuning_objective(model, TASK), []
    for rows in ([0], [0, 1]):
        optimizer = PromptDPSGD(
            nn.Parameter(torch.randn(1, 32, generator=torch.Generator().manual_seed(0))), 0.0, noise_multiplier=0.0,
            max_grad_norm=CLIP, expected_batch_size=1, randomness=SeededRandomness(0),
        )  # fmt: skip
        optimizer.update(lambda prompt, batch: loss(prompt, batch) * 1000, encoded.batch(rows))
        sums.append(optimizer.summed_gradient.float())
    return sums[0], sums[1]


def bound_of(without: Tensor, together: Tensor, optimizer: DPOptimizer) -> float:
    """The bound from many one-step runs on disjoint data sets, each with or without a canary: together as private as
    one of them.

    Opacus's optimizer adds the noise, to the stacked sums of all runs.
    """
    included = np.random.default_rng(0).random(RUNS) < 0.5
    stack = nn.Parameter(torch.zeros(RUNS, *without.shape))
    optimizer.param_groups[0]["params"][:] = [stack]
    stack.grad_sample = torch.zeros(1, *stack.shape)  # type: ignore[attr-defined]
    stack.summed_grad = torch.where(torch.tensor(included)[:, None, None], together, without)  # type: ignore[attr-defined]
    torch.manual_seed(1)
    optimizer.add_noise()
    assert stack.grad is not None
    scores = (stack.grad * (together - without)).sum((1, 2))
    return evidence(scores.double().numpy(), included, DELTA).epsilon


def test_the_audit_refutes_peft_with_opacus_hooks_and_not_post() -> None:
    without, together, optimizer = hooked_sums()
    assert bound_of(without, together, optimizer) > 1.0
    assert bound_of(*own_sums(), optimizer) < 1.0
