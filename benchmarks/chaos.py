"""Injects faults at random times into real jobs on tiny models: none may be lost, run twice, hang or change its result.

``python -m benchmarks.chaos --runs 200 --json chaos.json`` resumes from the file. Each run is determined by the seed
and its own number, so ``--only 17`` repeats run 17.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from tests.server.server_harness import wait_for

from benchmarks.chaos_stage import FAULTS, ChaosStage
from post_client.resources.jobs import Job
from post_server.db.tables import JobRow, ModelRow, PromptRow
from post_server.jobs import notifier
from post_server.models.service import find_model
from post_shared.errors import DiskFull, JobFailed
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.prompts import PromptRole

PHASES = {
    "distil": ("ordered", "loading", "corpus", "start", "distil", "late"),
    "transfer": ("ordered", "loading", "precompute", "transfer", "late"),
}
"""The phases in which a fault is injected: a stage of the job, or "late" in its last stage."""
STEPS = 120
_LATE = 0.85
_FINAL_STATES = {state.value for state in JobState if state.ended}
_TIMEOUT = 600.0
_MAX_DELAY = 0.4


@dataclass(frozen=True)
class Plan:
    """The parameters of a run."""

    number: int
    kind: str
    phase: str
    fault: str
    delay: float
    seed: str

    @classmethod
    def draw(cls, seed: int, number: int) -> Plan:
        """The parameters of run ``number``. Faults take turns, so that few runs cover all; the rest is random."""
        dice = random.Random(f"{seed}:{number}")
        kind = dice.choice(sorted(PHASES))
        fault = sorted(FAULTS)[number % len(FAULTS)]
        return cls(number, kind, dice.choice(PHASES[kind]), fault, dice.uniform(0, _MAX_DELAY), f"{seed}:{number}:in")


@dataclass
class Outcome:
    """The result of a run."""

    plan: Plan
    seen: str = ""
    """The job's state, stage and progress when the fault was injected."""
    seconds: float = 0.0
    attempts: int = 0
    orders: int = 1
    problems: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {**asdict(self.plan), **{name: value for name, value in asdict(self).items() if name != "plan"}}


class Chaos:
    """A stage with all that the jobs need, and the results of undisturbed jobs."""

    def __init__(self, stage: ChaosStage) -> None:
        self.stage = stage
        stage.add_target()
        stage.add_corpus()
        stage.add_rows()
        first = self.create_job("distil", "undisturbed").wait(timeout=_TIMEOUT)
        with stage.database.read() as session:
            self.student = find_model(session, "undisturbed")
        self.prompt = stage.add_source_prompt(self.student)
        second = self.create_job("transfer", "").wait(timeout=_TIMEOUT)
        self.expected = {"distil": first.result["hash"], "transfer": self.prompt_hash(second.result["prompt_id"])}

    def create_job(self, kind: str, name: str) -> Job:
        """Create one job over HTTP."""
        client = self.stage.client
        if kind == "distil":
            sizes = {
                "steps": STEPS,
                "batch_tokens": 128,
                "sequence_length": 32,
                "keep_layers": 2,
                "student_init": "copy",
            }
            return client.distillations.create(target="target", name=name, corpus=["corpus"], **sizes)
        sizes = {"steps": STEPS, "batch_size": 4, "max_length": 32}
        return client.transfers.create(prompt=self.prompt.id, target="target", dataset="public", alpha=0.3, **sizes)

    def prompt_hash(self, prompt_id: str) -> str:
        """The hash of a target prompt's bytes."""
        with self.stage.database.read() as session:
            return session.get_one(PromptRow, prompt_id).sha256

    def run(self, plan: Plan) -> Outcome:
        """Create a job, inject the fault, wait for the job and check the result."""
        if plan.fault == "fill disk" and not self.stage.small_disk:
            return Outcome(plan, seen="skipped: no small disk can be mounted here")
        outcome, began, name = Outcome(plan), time.monotonic(), f"student-{plan.number}-{time.time_ns()}"
        job = self.create_job(plan.kind, name)
        try:
            outcome.seen = self._inject(plan, job.id)
            while True:
                try:
                    job.wait(timeout=_TIMEOUT)
                    break
                except DiskFull:  # as the error advises: free disk space and create the job again
                    if plan.fault != "fill disk" or outcome.orders > 3:
                        raise
                    outcome.orders += 1
                    job = self.create_job(plan.kind, name)
        except JobFailed as error:
            outcome.problems.append(f"failed: {error.code}: {error.detail}")
        except Exception as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
        outcome.problems += self._problems_of(plan.kind, job.id, name)
        outcome.attempts = self.stage.job(job.id).attempt
        outcome.seconds = round(time.monotonic() - began, 2)
        return outcome

    def _inject(self, plan: Plan, job_id: str) -> str:
        def due() -> bool:
            row = self.stage.job(job_id)
            late = row.progress >= _LATE
            first = PHASES[plan.kind].index(plan.phase)
            stages = PHASES[plan.kind][first:]
            reached = {"ordered": True, "loading": row.state is JobState.RUNNING, "late": late}
            return row.state.ended or late or reached.get(plan.phase, row.stage in stages)

        wait_for(due, _TIMEOUT, 0.01)
        time.sleep(plan.delay)
        row = self.stage.job(job_id)
        FAULTS[plan.fault](self.stage, job_id, random.Random(plan.seed))
        return f"{row.state.value} {row.stage or '-'} {row.progress:.2f}"

    # --- checks afterwards ----------------------------------------------------------------------------

    def _problems_of(self, kind: str, job_id: str, name: str) -> list[str]:
        row, events = self.stage.job(job_id), self.stage.events(job_id)
        ends = [event for event in events if event.data.get("state") in _FINAL_STATES]
        numbers = [event.sequence for event in events]
        checks = {
            f"it is {row.state.value}, not succeeded": row.state is JobState.SUCCEEDED,
            f"it ended {len(ends)} times": len(ends) == 1,
            "its events are not numbered without gaps": numbers == [*range(1, len(events) + 1)],
            "its output exists twice, or not at all": self._has_one_output(kind, name),
            "its result differs from the undisturbed one": self._result(kind, row.result or {}) == self.expected[kind],
            "its work folder still exists": self._ends(lambda: (self.stage.work / job_id).exists()),
            "its process is still running": self._ends(lambda: self.stage.job_process() is not None),
            "its notification is still in Redis": self._ends(lambda: notifier.waiting(self.stage.settings) != 0),
            "a blob's bytes don't match its name": all(map(self._is_intact, self.stage.store.list())),
        }
        return [problem for problem, holds in checks.items() if not holds]

    def _has_one_output(self, kind: str, name: str) -> bool:
        """One student with the name, or as many target prompts as successful transfers."""
        with self.stage.database.read() as session:

            def count(*where: Any) -> int:
                return session.scalar(select(func.count()).where(*where)) or 0

            if kind == "distil":
                return count(ModelRow.name == name) == 1
            done = count(JobRow.kind == JobKind.TRANSFER, JobRow.state == JobState.SUCCEEDED)
            return count(PromptRow.role == PromptRole.TARGET) == done

    def _result(self, kind: str, result: dict[str, Any]) -> str | None:
        if kind == "distil":
            return result.get("hash")
        return self.prompt_hash(result["prompt_id"]) if "prompt_id" in result else None

    def _ends(self, condition: Any) -> bool:
        try:
            wait_for(lambda: not condition(), 20.0)
        except AssertionError:
            return False
        return True

    def _is_intact(self, sha256: str) -> bool:
        digest = hashlib.sha256()
        for chunk in self.stage.store.open(sha256):
            digest.update(chunk)
        return digest.hexdigest() == sha256


# --- many runs ----------------------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of runs by fault, and the runs with problems."""
    return {
        "runs": len(runs),
        "by_fault": dict(sorted(Counter(run["fault"] for run in runs).items())),
        "struck_at": dict(sorted(Counter(" ".join(run["seen"].split()[:2]) for run in runs).items())),
        "attempts": sum(run["attempts"] for run in runs),
        "with_problems": [run["number"] for run in runs if run["problems"]],
    }


def run_all(plans: Sequence[Plan], save: Any, deadline: float) -> None:
    """Run the plans until the deadline; after a run with problems, on a new stage."""
    remaining = list(plans)
    while remaining and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(prefix="post-") as folder:
            stage = ChaosStage(Path(folder))
            try:
                chaos = Chaos(stage)
                while remaining and time.monotonic() < deadline:
                    outcome = chaos.run(remaining.pop(0))
                    save(outcome, stage.log() if outcome.problems else "")
                    if outcome.problems:
                        break
            finally:
                stage.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the runs to run (again)")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no run after this time")
    parser.add_argument("--json", type=Path, default=Path("chaos.json"))
    options = parser.parse_args(argv)
    document = json.loads(options.json.read_text()) if options.json.exists() else {"seed": options.seed, "runs": []}
    if document["seed"] != options.seed:
        parser.error(f"{options.json} has runs with seed {document['seed']}; use another file")
    numbers = options.only or range(options.runs)
    document["runs"] = [run for run in document["runs"] if options.only is None or run["number"] not in options.only]
    known = {run["number"] for run in document["runs"]}
    plans = [Plan.draw(options.seed, number) for number in numbers if number not in known]

    def save(outcome: Outcome, log: str) -> None:
        document["runs"].append(outcome.document())
        document["summary"] = summary(document["runs"])
        temporary = options.json.with_suffix(".part")
        temporary.write_text(json.dumps(document, indent=1))
        temporary.replace(options.json)
        plan = outcome.plan
        print(f"{plan.number:4} {plan.kind:9} {plan.fault:14} at {outcome.seen:28} {outcome.seconds:7.2f} s", end="  ")
        print("; ".join(outcome.problems) or "ok", flush=True)
        if log:
            options.json.with_suffix(f".{plan.number}.log").write_text(log)

    run_all(plans, save, time.monotonic() + options.minutes * 60)
    figures = document.get("summary", {})
    print(json.dumps({"seed": options.seed, **figures}))
    return 1 if figures.get("with_problems") else 0


if __name__ == "__main__":
    sys.exit(main())
