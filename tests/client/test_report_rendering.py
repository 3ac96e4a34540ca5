"""A report as tables and a figure, and the commands that show it, over the real API with a finished job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from post_client import Client
from post_client.report_rendering import markdown, sections
from post_server.jobs import states
from post_shared.errors import Conflict, Forbidden, InvalidInput
from post_shared.schemas.reports import TradeOffReport
from tests.client.terminal import Captured, post
from tests.server.http_harness import TASK, HttpHarness
from tests.server.reports.test_reports import ORDER, example


@pytest.fixture
def job(http_harness: HttpHarness, provider: Client) -> str:
    """A queued report job."""
    http_harness.add_pair()
    http_harness.add_dataset()
    http_harness.add_dataset("seen", b"One text.\n", "corpus")
    http_harness.add_dataset("unseen", b"Another text.\n", "corpus")
    job = provider.reports.create(student="small", tasks={"public": TASK}, members=["seen"], non_members=["unseen"])
    assert {name: job.document.request[name] for name in ORDER} == ORDER
    return job.id


def finish(http_harness: HttpHarness, job: str) -> None:
    with http_harness.database.write() as session:
        _, lease = states.claim(session, job, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        states.finish(session, lease, example(job))


def test_the_client_reads_the_servers_report(
    http_harness: HttpHarness, provider: Client, owner: Client, job: str
) -> None:
    with pytest.raises(Conflict, match="queued"):
        provider.reports.get(job)
    finish(http_harness, job)
    assert provider.reports.get(job) == TradeOffReport.model_validate(example(job))
    assert [each.id for each in provider.reports.list()] == [job]
    with pytest.raises(Forbidden):
        owner.reports.get(job)
    with pytest.raises(InvalidInput, match="steps"):
        provider.reports.create(
            student="small", tasks={"public": TASK}, members=["a"], non_members=["b"], tuning={"steps": 0}
        )


def test_a_report_is_shown_and_saved(
    http_harness: HttpHarness, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("POST_URL", http_harness.url)
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["provider"])
    monkeypatch.setenv("COLUMNS", "200")
    finish(http_harness, job)
    folder = tmp_path / "new" / "report"
    assert post("report", "show", job, "--out", folder) == 0
    shown = capsys.readouterr().out
    report = TradeOffReport.model_validate(example(job))
    for section in sections(report):
        assert section.title in shown
        assert all(cell in shown for row in section.rows for cell in row)
    assert TradeOffReport.model_validate_json((folder / "report.json").read_bytes()) == report
    assert (folder / "report.md").read_text("utf-8") == markdown(report)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert post("report", "show", job, "--json") == 0
    assert json.loads(capsys.readouterr().out) == example(job)


@pytest.mark.parametrize("option", ["public", "=sst2", "public=", "public=sst2 --public public=imdb"])
def test_a_public_task_is_a_dataset_and_a_task(option: str, capsys: Captured) -> None:
    line = f"report make small --public {option} --members seen --non-members unseen"
    assert post(*line.split()) == 2
    assert "--public" in capsys.readouterr().err


def test_tables_explain_their_figures() -> None:
    report = TradeOffReport.model_validate(example())
    text = markdown(report)
    assert "0.750 (0.500 to 1.000)" in text
    assert "fewer than 100 non-members" in text
    assert "fewer than 100" not in markdown(TradeOffReport.model_validate(example(non_members=100)))
    widths = [{len(section.columns), *map(len, section.rows)} for section in sections(report)]
    assert all(len(width) == 1 for width in widths)
    unknown = TradeOffReport.model_validate({**example(), "recorded_loss": None})
    assert "No distillation job is known" in markdown(unknown)
