"""The ledger composes correctly, charges before training and permanently, and enforces its caps."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
import torch
from dp_accounting import pld
from tokenizers import normalizers

from post_client.ledger import Charge, Ledger, Run
from post_client.privacy import Mechanism, PrivacyConfig, PrivacyPlan, compose
from post_client.privacy.statement import also_public
from post_client.tuning.search import search
from post_client.tuning.tune import TuneResult, encode_private, run_id_of, tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import BudgetExceeded, Cancelled, Conflict, DataInvalid, InvalidInput, LedgerInvalid
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
ROWS = [Row(f"{text} {at}", label) for at in range(5) for text, label in zip(TEXTS, LABELS, strict=True)]
ONE, TWO = Mechanism(1.0, 0.01, 300), Mechanism(0.8, 0.02, 200)
CONFIG = TuneOptions(num_virtual_tokens=2, steps=4, batch_size=8)
PRIVACY = PrivacyConfig(epsilon=8)


def charge(mechanism: Mechanism | None = ONE, unit: str = "row", delta: float = 1e-5) -> Charge:
    return Charge(unit, delta, mechanism)  # type: ignore[arg-type]


def spent(ledger: Ledger, rows: Sequence[Row], unit: str = "row") -> float:
    account = ledger.account(rows, unit)  # type: ignore[arg-type]
    assert account is not None
    return account.spent.epsilon


@pytest.fixture
def ledger(own_ledger: Path) -> Ledger:
    return Ledger(own_ledger)


# --- the identity of rows -----------------------------------------------------------------------------

SPELLINGS = ["Stra\u00dfe  NO. 5", "STRASSE no. 5", "\uff33\uff54rasse\u00a0No. 5", " strasse no. 5\n"]
"""One text, as far as the ledger goes: case, spaces, full width."""


def test_a_row_is_one_row_in_any_spelling_for_ledger_and_statement_alike(ledger: Ledger) -> None:
    ledger.reserve([Row(SPELLINGS[0], "good"), Row("other", "bad")], charge(ONE), "a")
    ledger.reserve([Row(SPELLINGS[2], "good"), Row("third", "bad")], charge(TWO), "b")
    for spelling in SPELLINGS:
        before, _ = ledger.foresee([Row(spelling, "good")], charge(ONE))
        assert before.epsilon == pytest.approx(compose([ONE, TWO], 2e-5).epsilon, rel=0.2)
        assert before.runs == 2
        assert also_public([Row(SPELLINGS[0])], [spelling]) == 1
    assert also_public([Row(SPELLINGS[0])], ["strasse no. 6"]) == 0


def former_ledger(path: Path, rows: Sequence[Row], unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger as version 1 wrote it, with one run on ``rows``."""
    with monkeypatch.context() as patch:
        patch.setattr("post_client.ledger.records.normalized", lambda text: " ".join(text.split()))
        with Ledger(path) as ledger:
            ledger.reserve(rows, charge(ONE, unit), "a", name="old", epsilon_cap=50.0)
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE data_sets DROP COLUMN normalization")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("unit", ["row", "user"])
def test_what_an_earlier_version_charged_still_counts(
    unit: str, own_ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(text, "good", str(at)) for at, text in enumerate([SPELLINGS[0], "Ann wrote", "plain text"])]
    former_ledger(own_ledger, rows, unit, monkeypatch)
    with Ledger(own_ledger) as ledger:
        (account,) = ledger.accounts()
        assert (account.name, account.epsilon_cap, len(account.runs)) == ("old", 50.0, 1)
        before, _ = ledger.foresee([Row("Ann  wrote", "good")], charge(TWO))  # one row, and not the whole data set
        assert before.runs == 1
        assert spent(ledger, rows, unit) == account.spent.epsilon
        ledger.reserve([replace(row, text=row.text.upper()) for row in rows], charge(TWO, unit), "b")
        (account,) = ledger.accounts()
        assert len(account.runs) == 2, "the same data set, not another one"
        assert account.epsilon_cap == 50.0


# --- composition --------------------------------------------------------------------------------------


def test_composition_agrees_with_an_independent_accountant() -> None:
    accountant = pld.PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for m in (ONE, TWO):
        step = dp_accounting.PoissonSampledDpEvent(m.rate, dp_accounting.GaussianDpEvent(m.noise_multiplier))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, m.steps))
    expected = accountant.get_epsilon(1e-5)
    composed = compose([ONE, TWO], 1e-5)
    assert composed.accountant == "PRV"
    assert expected * 0.999 <= composed.epsilon <= expected * 1.02
    assert composed.epsilon < compose([ONE], 1e-5).epsilon + compose([TWO], 1e-5).epsilon
    assert compose([TWO, ONE], 1e-5) == composed
    assert compose([Mechanism(1.0, 0.01, 100), Mechanism(1.0, 0.01, 200)], 1e-5) == compose([ONE], 1e-5)


def test_a_shared_row_is_charged_by_every_set_that_contains_it(ledger: Ledger) -> None:
    first, second, apart = ROWS[:20], ROWS[19:40], [Row("somebody else", "positive")] * 2
    ledger.reserve(first, charge(ONE), "a", name="first")
    alone = compose([ONE], 1e-5).epsilon
    assert spent(ledger, first) == alone
    assert ledger.foresee(apart, charge(TWO))[0].runs == 0
    ledger.reserve(second, charge(TWO), "b", name="second")
    both = compose([ONE, TWO], 1e-5).epsilon
    assert spent(ledger, first) == spent(ledger, second) == both, "row 19 is in both; the largest total counts"
    assert [account.shared for account in ledger.accounts()] == [("second",), ("first",)]
    before, after = ledger.foresee(ROWS[20:30], charge(ONE))
    assert (before.epsilon, after.epsilon) == (compose([TWO], 1e-5).epsilon, both)
    assert len(ledger.accounts()) == 2, "a preview stores nothing"


def test_order_and_labels_do_not_change_a_data_set(ledger: Ledger) -> None:
    ledger.reserve(ROWS, charge(), "a")
    changed = [Row(f" {row.text}  ", "other") for row in reversed(ROWS)]
    assert ledger.foresee(changed, charge())[0].runs == 1
    assert ledger.foresee([Row("new", "x")], charge())[0].runs == 0


def test_the_total_is_at_the_smallest_delta(ledger: Ledger) -> None:
    ledger.reserve(ROWS, charge(ONE, delta=1e-5), "a")
    ledger.reserve(ROWS, charge(TWO, delta=1e-7), "b")
    (account,) = ledger.accounts()
    assert (account.spent.delta, account.spent.epsilon) == (1e-7, compose([ONE, TWO], 1e-7).epsilon)


def test_no_bound_without_privacy_or_with_mixed_units(ledger: Ledger) -> None:
    rows = [Row(row.text, row.label, f"user {at % 4}") for at, row in enumerate(ROWS)]
    ledger.reserve(rows, charge(), "a")
    ledger.reserve(rows[:3], charge(unit="user"), "b")
    (by_row, by_user) = ledger.accounts()
    assert math.isinf(by_row.spent.epsilon)
    assert "mixed" in by_user.spent.why
    assert ledger.foresee(rows[10:], charge())[0].epsilon == compose([ONE], 1e-5).epsilon
    ledger.reserve(rows[10:], charge(None), "c")
    assert "no differential privacy" in ledger.foresee(rows[10:], charge())[0].why


def test_users_are_matched_by_name_and_not_by_common_texts(ledger: Ledger) -> None:
    first = [Row("ok", None, "ann"), Row("fine", None, "bob")]
    ledger.reserve(first, charge(ONE, "user"), "a")
    assert ledger.foresee([Row("ok", None, "carl")], charge(TWO, "user"))[0].runs == 0
    assert ledger.foresee([Row("new", None, "ann")], charge(TWO, "user"))[0].runs == 1
    with pytest.raises(DataInvalid, match="no user"):
        ledger.reserve([Row("ok", None)], charge(ONE, "user"), "b")


def test_the_file_contains_no_texts_or_users_and_is_private(ledger: Ledger, own_ledger: Path) -> None:
    rows = [Row("an unmistakable sentence", "positive", "unmistakable-user")]
    run = ledger.reserve(rows, charge(unit="user"), "id-of-my-run")
    assert run.key in own_ledger.read_bytes()
    ledger.finish(run)
    content = own_ledger.read_bytes()
    for secret in (b"unmistakable", b"id-of-my-run", run.key):
        assert secret not in content, "the key of a finished run is overwritten, too"
    assert own_ledger.stat().st_mode & 0o077 == 0
    assert repr(run).find(run.key.hex()) == -1


def test_two_ledgers_hash_the_same_row_differently(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        with Ledger(tmp_path / name) as ledger:
            ledger.reserve(ROWS[:1], charge(), "w")
        hashes.append(sqlite3.connect(tmp_path / name).execute("SELECT row FROM records").fetchall())
    assert hashes[0] != hashes[1]


# --- caps ---------------------------------------------------------------------------------------------


def test_a_cap_refuses_with_figures_and_charges_nothing(ledger: Ledger) -> None:
    epsilon_cap = 1.01 * compose([ONE], 1e-5).epsilon
    ledger.reserve(ROWS, charge(ONE), "a", name="mine.jsonl", epsilon_cap=epsilon_cap)
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve(ROWS, charge(TWO), "b", name="mine.jsonl")
    assert refused.value.fields["would_be"] == compose([ONE, TWO], 1e-5).epsilon
    assert refused.value.fields["spent"] == spent(ledger, ROWS)
    assert f"{epsilon_cap:g}" in refused.value.detail
    with pytest.raises(BudgetExceeded, match="no bound"):
        ledger.reserve(ROWS, charge(None), "c")
    with pytest.raises(BudgetExceeded):
        ledger.reserve([*ROWS[3:5], Row("one_run more", "x")], charge(ONE), "d")
    with pytest.raises(BudgetExceeded):
        ledger.reserve(ROWS, charge(TWO), "e", epsilon_cap=100.0)
    assert [len(account.runs) for account in ledger.accounts()] == [1]
    ledger.set_epsilon_cap(ROWS, "row", 100.0)
    ledger.reserve(ROWS, charge(TWO), "f")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidInput):
            ledger.set_epsilon_cap(ROWS, "row", wrong)


def test_a_cap_that_comes_with_a_resumed_run_is_kept(own_ledger: Path) -> None:
    with Ledger(own_ledger) as ledger:
        ledger.reserve(ROWS, charge(), "w")
    with Ledger(own_ledger) as ledger:
        assert ledger.reserve(ROWS, charge(), "w", epsilon_cap=0.5).resumed
        account = ledger.account(ROWS, "row")
        assert account is not None
        assert account.epsilon_cap == 0.5
        with pytest.raises(BudgetExceeded):
            ledger.reserve(ROWS, charge(), "another")


def test_concurrent_runs_can_not_exceed_the_cap_together(own_ledger: Path) -> None:
    epsilon_cap, outcomes = 1.01 * compose([ONE], 1e-5).epsilon, []
    Ledger(own_ledger).close()

    def reserve(number: int) -> None:
        with Ledger(own_ledger) as ledger:
            try:
                outcomes.append(ledger.reserve(ROWS, charge(ONE), f"run {number}", epsilon_cap=epsilon_cap))
            except BudgetExceeded as error:
                outcomes.append(error)

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, Run) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, BudgetExceeded) for outcome in outcomes) == 5


# --- interrupted runs ---------------------------------------------------------------------------------


def test_an_unfinished_run_resumes_at_no_cost_and_a_finished_one_is_charged_again(own_ledger: Path) -> None:
    with Ledger(own_ledger) as ledger:
        first = ledger.reserve(ROWS, charge(), "w")
        with pytest.raises(Conflict, match="already running"), Ledger(own_ledger) as other:
            other.reserve(ROWS, charge(), "w")
        (alias := own_ledger.with_name("alias")).symlink_to(own_ledger)
        with pytest.raises(Conflict, match="already running"), Ledger(alias) as other:
            other.reserve(ROWS, charge(), "w")
        assert ledger.run(first.id).state == "running"
    with Ledger(own_ledger) as ledger:
        assert ledger.run(first.id).state == "interrupted"
        again = ledger.reserve(ROWS, charge(), "w")
        assert (again.id, again.key, again.resumed) == (first.id, first.key, True)
        assert spent(ledger, ROWS) == compose([ONE], 1e-5).epsilon
        ledger.finish(again)
        assert ledger.run(first.id).state == "finished"
        fresh = ledger.reserve(ROWS, charge(), "w")
        assert fresh.id != first.id
        assert fresh.key != first.key
        assert spent(ledger, ROWS) == compose([ONE, ONE], 1e-5).epsilon
        for other_id in ("v", "w "):
            assert not ledger.reserve(ROWS, charge(), other_id).resumed
    assert not list(own_ledger.parent.glob(f"*.run-{first.id}")), "its lock is deleted"


def test_a_charge_survives_a_kill(own_ledger: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from post_client.ledger import Charge, Ledger
from post_client.privacy import Mechanism
from post_shared.data.rows import Row
Ledger(Path({str(own_ledger)!r})).reserve([Row("x", "y")], Charge("row", 1e-5, Mechanism(1.0, 0.01, 300)), "w")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=120)
    assert done.returncode == -9
    with Ledger(own_ledger) as ledger:
        assert spent(ledger, [Row("x", "y")]) == compose([ONE], 1e-5).epsilon
        assert ledger.accounts()[0].runs[0].state == "interrupted"


def cancelled_run(ledger: Ledger, step: int, checkpoint: Path | None) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        one_run(ledger, checkpoint, stop)


def one_run(ledger: Ledger, checkpoint: Path | None = None, on_progress: object = lambda progress: None) -> TuneResult:
    return tune(
        tiny_model(layers=1), TASK, ROWS, CONFIG, privacy=PRIVACY, on_progress=on_progress,  # type: ignore[arg-type]
        checkpoint=checkpoint, checkpoint_seconds=0.0, reserve=ledger.reserve,
    )  # fmt: skip


@pytest.mark.parametrize("saved", [True, False], ids=["from a checkpoint", "from the beginning"])
def test_a_restarted_run_releases_the_same_prompt(saved: bool, own_ledger: Path, tmp_path: Path) -> None:
    """Repeated steps draw the same batch and the same noise, so the prompt reveals nothing more."""
    folder = tmp_path if saved else None
    with Ledger(own_ledger) as ledger:
        cancelled_run(ledger, 3, folder)
    with Ledger(own_ledger) as ledger:
        resumed = one_run(ledger, folder)
    with Ledger(own_ledger) as ledger:
        again = one_run(ledger)  # not finished, so it is still the same run
        assert torch.equal(again.prompt.embeddings, resumed.prompt.embeddings)
        assert len(ledger.accounts()[0].runs) == 1
        assert again.run is not None
        ledger.finish(again.run)
    with Ledger(own_ledger) as ledger:
        other = one_run(ledger, folder)
        assert not torch.equal(other.prompt.embeddings, resumed.prompt.embeddings), "new randomness: a new run"
        assert len(ledger.accounts()[0].runs) == 2


def test_whatever_changes_a_gradient_changes_the_run_id() -> None:
    """Two prompts with equal noise and different gradients would reveal the difference without any noise."""

    def run_id(student: LanguageModel, task: Task = TASK) -> str:
        return run_id_of(student, task, ROWS, CONFIG, PRIVACY, None, encode_private(student, task, ROWS, CONFIG))

    same, changed, tokens, exact = (tiny_model(layers=1) for _ in range(4))
    assert run_id(same) == run_id(tiny_model(layers=1))
    changed.config.rms_norm_eps = 0.1
    tokens.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    exact.model.to(torch.float64)
    reordered = replace(TASK, label_words=dict(list((TASK.label_words or {}).items())[::-1]))
    others = [run_id(changed), run_id(tokens), run_id(exact), run_id(same, replace(TASK, description="Is it good?"))]
    others.append(run_id(same, reordered))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        others.append(run_id(same))
    for name, other in (("_sources", "of another day"), ("processor", "of another make")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"post_client.tuning.tune.{name}", lambda *_, other=other: other)
            others.append(run_id(same))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
        others.append(run_id(same))
    encoded = encode_private(same, TASK, ROWS, CONFIG)
    other_tokens = replace(encoded, rows=(replace(encoded.rows[0], token_ids=[5, *encoded.rows[0].token_ids]),))
    others.append(run_id_of(same, TASK, ROWS, CONFIG, PRIVACY, None, other_tokens))
    biased = tiny_model(layers=1)
    biased.model.register_buffer("correction", torch.tensor([2**24]), persistent=False)
    others.append(run_id(biased))
    biased.model.correction += 1  # not even float32 tells them apart
    others.append(run_id(biased))
    kernel, ends = tiny_model(layers=1), tiny_model(layers=1)
    kernel.model.set_attn_implementation("eager")
    ends.tokenizer.eos_token = "<s>"
    others += [run_id(kernel), run_id(ends)]
    assert run_id(same) not in others
    assert len(set(others)) == 14


def test_runs_are_charged_before_the_first_step_and_bad_input_never(ledger: Ledger) -> None:
    charged_runs: list[int] = []
    one_run(ledger, on_progress=lambda progress: charged_runs.append(len(ledger.accounts()[0].runs)))
    assert charged_runs[0] == 1
    runs = ledger.accounts()[0].runs
    assert runs[0].charge.mechanism == PrivacyPlan.make(PRIVACY, 40, batch_size=8, steps=4).mechanism
    model = tiny_model(layers=1)
    for rows in (ROWS[:1], [Row("x", "sports"), *ROWS]):
        with pytest.raises(DataInvalid):
            tune(model, TASK, rows, CONFIG, privacy=PRIVACY, reserve=ledger.reserve)
    long = TuneOptions(num_virtual_tokens=2, steps=4, max_length=10**6)
    for task, config, public in ((TASK, CONFIG, ["x"]), (Task("{text} so"), CONFIG, TEXTS * 9), (TASK, long, None)):
        with pytest.raises((DataInvalid, InvalidInput)):
            tune(model, task, ROWS[1:], config, privacy=PRIVACY, public=public, reserve=ledger.reserve)
    with pytest.raises(InvalidInput, match="fit the model"):
        search(model, TASK, ROWS[1:], long, trials=2, judge=ROWS, privacy=PRIVACY, reserve=ledger.reserve)
    assert len(ledger.accounts()) == 1
    tune(model, TASK, ROWS, CONFIG, privacy=None, reserve=ledger.reserve)
    tune(model, TASK, ROWS[:9], CONFIG, privacy=PrivacyConfig(seed=1), reserve=ledger.reserve)
    accounts = ledger.accounts()
    assert len(accounts) == 2
    assert all(math.isinf(account.spent.epsilon) for account in accounts), "no privacy, and a seeded run has none"


# --- the file -----------------------------------------------------------------------------------------


def test_an_unusable_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this isn't a database, but it is long enough to be read as one " * 20)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    Ledger(tmp_path / "damaged").close()
    with sqlite3.connect(tmp_path / "damaged") as damaged:
        damaged.execute("DELETE FROM salt")
    for path in (tmp_path / "text", tmp_path / "other", tmp_path / "damaged", tmp_path, Path("/proc/ledger.db")):
        with pytest.raises(LedgerInvalid, match=str(path)):
            Ledger(path)
    with pytest.raises(LedgerInvalid, match="isn't a ledger or is damaged"):
        Ledger(tmp_path / "text")


def test_a_full_disk_charges_nothing_and_leaves_the_ledger_intact(own_ledger: Path) -> None:
    resource = pytest.importorskip("resource")
    with Ledger(own_ledger) as ledger:
        ledger.reserve(ROWS, charge(), "a")
        many = [Row(f"row {at}", "x") for at in range(5000)]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (own_ledger.stat().st_size, hard))
        try:
            with pytest.raises(LedgerInvalid, match=r"can't be read or written.* use another file"):
                ledger.reserve(many, charge(), "b")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [account.rows for account in ledger.accounts()] == [40]
        ledger.reserve(many, charge(), "b")
    assert sqlite3.connect(own_ledger).execute("PRAGMA integrity_check").fetchone() == ("ok",)
