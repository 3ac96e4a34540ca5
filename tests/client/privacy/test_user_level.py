"""Privacy per user: a user counts for c, however many rows; the average of iterates; a search under one budget."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from post_client.ledger import Ledger
from post_client.privacy import PrivacyConfig, PrivacyPlan, SeededRandomness, UserDPSGD
from post_client.privacy.user_level import rows_by_user, users_of
from post_client.tuning.search import learning_rates, search
from post_client.tuning.tune import tune, tuning_objective
from post_shared.data.batches import EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput, PrivacyInvalid
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.optimizer import Loss
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"positive": ("good", "great"), "negative": ("bad", "terrible")})
CLIP = 1e-3
ROWS = [Row(f"{text} {at}", label) for at in range(4) for text, label in zip(TEXTS, LABELS, strict=True)]
USERS = [0] * 9 + [1, 2, 3] * 5 + [4] * 8
NAMED = [Row(row.text, row.label, f"user {user}") for row, user in zip(ROWS, USERS, strict=True)]


@cache
def setting() -> tuple[LanguageModel, EncodedRows, Loss]:
    model = tiny_model(layers=1)
    encoded = encode_rows(model, TASK, [row.text for row in ROWS], labels=[row.label for row in ROWS])
    return model, encoded, tuning_objective(model, TASK)


def clipped_sum(users: list[int], *, clip: float = CLIP) -> Tensor:
    """The clipped sum of a step on all rows of ``users``."""
    _, encoded, loss = setting()
    start = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    optimizer = UserDPSGD(
        nn.Parameter(start), 0.01, users=USERS, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=2,
        randomness=SeededRandomness(0),
    )  # fmt: skip
    members = rows_by_user(USERS)
    optimizer.update(loss, encoded.batch([row for user in users for row in members[user]]))
    return optimizer.summed_gradient.clone()


@settings(max_examples=15)
@given(st.sets(st.integers(0, 4), max_size=4), st.integers(0, 4))
def test_one_more_user_moves_the_clipped_sum_by_at_most_c(users: set[int], extra: int) -> None:
    moved = clipped_sum(sorted(users | {extra})) - clipped_sum(sorted(users - {extra}))
    assert float(moved.norm()) <= CLIP * (1 + 1e-6)


def test_a_user_is_clipped_as_a_whole() -> None:
    _, encoded, loss = setting()
    start = nn.Parameter(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    members = rows_by_user(USERS)
    expected = torch.zeros(3, 32, dtype=torch.float64)
    for user in (0, 2):
        total = sum(torch.autograd.grad(loss(start, encoded.batch([row])).sum(), start)[0] for row in members[user])
        assert isinstance(total, Tensor)
        expected += total.double() * min(1.0, CLIP / float(total.norm()))
    torch.testing.assert_close(clipped_sum([0, 2]), expected, rtol=1e-2, atol=CLIP * 1e-3)


def test_the_budget_and_its_statement_are_per_user() -> None:
    privacy = PrivacyConfig(epsilon=8, unit="user", batch_size=2, steps=3)
    result = tune(tiny_model(layers=1), TASK, NAMED, TuneOptions(num_virtual_tokens=2), privacy=privacy)
    statement = result.statement
    assert statement is not None
    assert statement.sampling_rate == 2 / 5, "users are sampled"
    assert statement.expected_batch_size == 2
    document = json.loads(statement.json())
    assert document["unit"].startswith("one user")
    assert "user" in document["neighbours"]
    assert "any one user" in statement.words()
    assert any("several user names" in limit for limit in document["not_covered"])
    for delta in (0.2, 0.1):  # 1/5 and more is refused: five users, though 32 rows
        config = PrivacyConfig(epsilon=8, unit="user", delta=delta, batch_size=2, steps=3)
        if delta < 1 / 5:
            assert PrivacyPlan.make(config, 5, batch_size=2, steps=3).delta == delta
        else:
            with pytest.raises(PrivacyInvalid):
                tune(tiny_model(layers=1), TASK, NAMED, TuneOptions(num_virtual_tokens=2), privacy=config)


def test_every_row_names_its_user() -> None:
    assert users_of(NAMED) == USERS
    with pytest.raises(DataInvalid, match="1 of 33 rows name no user"):
        users_of([*NAMED, Row("x", "positive")])
    with pytest.raises(PrivacyInvalid):
        PrivacyConfig(unit="family")  # type: ignore[arg-type]


# --- the iterate that is kept -------------------------------------------------------------------------


def test_the_average_is_that_of_the_second_half_whatever_the_scores() -> None:
    config, seen = TuneOptions(num_virtual_tokens=2, steps=6, batch_size=8), []
    privacy = PrivacyConfig(epsilon=8, seed=1, batch_size=8, steps=6)
    model = tiny_model(layers=1)
    for steps in (4, 5, 6):
        stopped = _iterate(model, config, privacy, steps)
        seen.append(stopped)
    average = tune(
        model,
        TASK,
        ROWS,
        TuneOptions(num_virtual_tokens=2, steps=6, batch_size=8, average_iterates=True),
        privacy=privacy,
    )
    torch.testing.assert_close(average.prompt.embeddings, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)
    assert average.statement is not None
    assert "average" in average.statement.mechanism
    with pytest.raises(InvalidInput, match="average_iterates"):
        TuneOptions(average_iterates="best")  # type: ignore[arg-type]


def _iterate(model: object, config: TuneOptions, privacy: PrivacyConfig, step: int) -> Tensor:
    """The prompt after ``step`` of all steps."""
    from post_shared.method.tuning import tune as tuning

    kept: list[Tensor] = []

    class Watching(tuning.Averaged):
        def update(self, loss: Loss, batch: object) -> float | None:
            value = super().update(loss, batch)  # type: ignore[arg-type]
            kept.append(self.prompt.detach().clone())
            return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "Averaged", Watching)
        watched = TuneOptions(num_virtual_tokens=2, steps=6, batch_size=8, average_iterates=True)
        tune(model, TASK, ROWS, watched, privacy=privacy)  # type: ignore[arg-type]
    return kept[step - 1]


# --- a search -----------------------------------------------------------------------------------------


def test_a_search_is_charged_for_all_trials_and_chooses_by_public_rows(own_ledger: Path) -> None:
    model, config = tiny_model(layers=1), TuneOptions(num_virtual_tokens=2, steps=3, batch_size=8)
    privacy, judge = PrivacyConfig(epsilon=8), [Row(f"{row.text} too", row.label) for row in ROWS]
    with Ledger(own_ledger) as ledger:
        found = search(model, TASK, ROWS, config, trials=3, judge=judge, privacy=privacy, reserve=ledger.reserve)
        (account,) = ledger.accounts()
    assert [trial.learning_rate for trial in found.trials] == learning_rates(0.02, 3) == [0.01, 0.02, 0.04]
    assert len(account.runs) == 1
    mechanism = account.runs[0].charge.mechanism
    assert mechanism is not None
    assert mechanism.steps == 9, "three trials of three steps"
    statement = found.best.statement
    assert statement is not None
    assert (statement.trials, statement.steps, statement.noise_multiplier) == (3, 3, mechanism.noise_multiplier)
    assert account.spent.epsilon == statement.epsilon_spent <= 8
    assert "3 trials" in statement.words()
    assert statement.also_public == 0
    judged = search(model, TASK, ROWS, config, trials=2, judge=[*judge, ROWS[3]], privacy=privacy)
    assert judged.best.statement is not None
    assert judged.best.statement.also_public == 1, "what judges enters without noise"
    with Ledger(own_ledger) as ledger:  # not kept yet: the same search again is the same
        again = search(model, TASK, ROWS, config, trials=3, judge=judge, privacy=privacy, reserve=ledger.reserve)
        assert len(ledger.accounts()[0].runs) == 1
    assert torch.equal(again.best.prompt.embeddings, found.best.prompt.embeddings)
    with pytest.raises(InvalidInput):
        search(model, TASK, ROWS, config, trials=1, judge=judge, privacy=privacy)
