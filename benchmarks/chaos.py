"""Faults at random moments of real jobs on tiny models: nothing is lost, done twice, stuck or changed by them.

``python -m benchmarks.chaos --runs 200 --json chaos.json`` goes on where the file ends. Each run is drawn from the seed
and its own number alone, so ``--only 17`` plays number 17 again.
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
"""The moments at which a fault strikes: a stage of the job, or "late" in its last one."""
STEPS = 120
_LATE = 0.85
_ENDS = {state.value for state in JobState if state.ended}
_PATIENCE = 600.0
_MOST_DELAY = 0.4


@dataclass(frozen=True)
class Plan:
    """What a run's number stands for."""

    number: int
    kind: str
    phase: str
    fault: str
    delay: float
    seed: str

    @classmethod
    def draw(cls, seed: int, number: int) -> Plan:
        """Every fault in turn, so that few runs meet them all; the moment is drawn."""
        dice = random.Random(f"{seed}:{number}")
        kind = dice.choice(sorted(PHASES))
        fault = sorted(FAULTS)[number % len(FAULTS)]
        return cls(number, kind, dice.choice(PHASES[kind]), fault, dice.uniform(0, _MOST_DELAY), f"{seed}:{number}:in")


@dataclass
class Found:
    """What came of a run."""

    plan: Plan
    seen: str = ""
    """Where the job was when the fault struck."""
    seconds: float = 0.0
    attempts: int = 0
    orders: int = 1
    problems: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {**asdict(self.plan), **{name: value for name, value in asdict(self).items() if name != "plan"}}


class Chaos:
    """A stage with everything that the jobs need, and what they make when nothing disturbs them."""

    def __init__(self, stage: ChaosStage) -> None:
        self.stage = stage
        stage.add_target()
        stage.add_corpus()
        stage.add_rows()
        first = self.order("distil", "undisturbed").wait(timeout=_PATIENCE)
        with stage.database.read() as session:
            self.student = find_model(session, "undisturbed")
        self.prompt = stage.add_source_prompt(self.student)
        second = self.order("transfer", "").wait(timeout=_PATIENCE)
        self.expected = {"distil": first.result["hash"], "transfer": self.made(second.result["prompt_id"])}

    def order(self, kind: str, name: str) -> Job:
        """One job, over HTTP."""
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

    def made(self, prompt_id: str) -> str:
        """The hash of a target prompt's bytes."""
        with self.stage.database.read() as session:
            return session.get_one(PromptRow, prompt_id).sha256

    def run(self, plan: Plan) -> Found:
        """Order, strike, wait, look."""
        if plan.fault == "fill disk" and not self.stage.small_disk:
            return Found(plan, seen="skipped: no small disk can be mounted here")
        found, began, name = Found(plan), time.monotonic(), f"student-{plan.number}-{time.time_ns()}"
        job = self.order(plan.kind, name)
        try:
            found.seen = self._strike(plan, job.id)
            while True:
                try:
                    job.wait(timeout=_PATIENCE)
                    break
                except DiskFull:  # the job says what to do: make room, and order again
                    if plan.fault != "fill disk" or found.orders > 3:
                        raise
                    found.orders += 1
                    job = self.order(plan.kind, name)
        except JobFailed as error:
            found.problems.append(f"failed: {error.code}: {error.detail}")
        except Exception as error:
            found.problems.append(f"{type(error).__name__}: {error}")
        found.problems += self._faults_of(plan.kind, job.id, name)
        found.attempts = self.stage.job(job.id).attempt
        found.seconds = round(time.monotonic() - began, 2)
        return found

    def _strike(self, plan: Plan, job_id: str) -> str:
        def due() -> bool:
            row = self.stage.job(job_id)
            late = row.progress >= _LATE
            passed = PHASES[plan.kind].index(plan.phase)
            stages = PHASES[plan.kind][passed:]
            there = {"ordered": True, "loading": row.state is JobState.RUNNING, "late": late}
            return row.state.ended or late or there.get(plan.phase, row.stage in stages)

        wait_for(due, _PATIENCE, 0.01)
        time.sleep(plan.delay)
        row = self.stage.job(job_id)
        FAULTS[plan.fault](self.stage, job_id, random.Random(plan.seed))
        return f"{row.state.value} {row.stage or '-'} {row.progress:.2f}"

    # --- what must hold afterwards --------------------------------------------------------------------

    def _faults_of(self, kind: str, job_id: str, name: str) -> list[str]:
        row, events = self.stage.job(job_id), self.stage.events(job_id)
        ends = [event for event in events if event.data.get("state") in _ENDS]
        numbers = [event.sequence for event in events]
        checks = {
            f"it is {row.state.value}, not succeeded": row.state is JobState.SUCCEEDED,
            f"it ended {len(ends)} times": len(ends) == 1,
            "its events are not numbered without a gap": numbers == [*range(1, len(events) + 1)],
            "what it made was made twice, or not": self._count(kind, name),
            "its result is not the undisturbed one": self._result(kind, row.result or {}) == self.expected[kind],
            "its work folder is still there": self._goes(lambda: (self.stage.work / job_id).exists()),
            "a process is still at it": self._goes(lambda: self.stage.job_process() is not None),
            "its ring is still in Redis": self._goes(lambda: notifier.waiting(self.stage.settings) != 0),
            "a blob's bytes are not what its name says": all(map(self._is_whole, self.stage.store.list())),
        }
        return [problem for problem, holds in checks.items() if not holds]

    def _count(self, kind: str, name: str) -> bool:
        """One student of the name; as many target prompts as transfers have succeeded."""
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
        return self.made(result["prompt_id"]) if "prompt_id" in result else None

    def _goes(self, still: Any) -> bool:
        try:
            wait_for(lambda: not still(), 20.0)
        except AssertionError:
            return False
        return True

    def _is_whole(self, sha256: str) -> bool:
        digest = hashlib.sha256()
        for chunk in self.stage.store.open(sha256):
            digest.update(chunk)
        return digest.hexdigest() == sha256


# --- many runs ----------------------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many runs of each fault there were, and which ones found something."""
    return {
        "runs": len(runs),
        "by_fault": dict(sorted(Counter(run["fault"] for run in runs).items())),
        "struck_at": dict(sorted(Counter(" ".join(run["seen"].split()[:2]) for run in runs).items())),
        "attempts": sum(run["attempts"] for run in runs),
        "with_problems": [run["number"] for run in runs if run["problems"]],
    }


def play(plans: Sequence[Plan], keep: Any, deadline: float) -> None:
    """Run the plans until the deadline; after a run that found something, on a new stage."""
    waiting = list(plans)
    while waiting and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(prefix="post-") as folder:
            stage = ChaosStage(Path(folder))
            try:
                chaos = Chaos(stage)
                while waiting and time.monotonic() < deadline:
                    found = chaos.run(waiting.pop(0))
                    keep(found, stage.log() if found.problems else "")
                    if found.problems:
                        break
            finally:
                stage.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the runs to play (again)")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no run after that")
    parser.add_argument("--json", type=Path, default=Path("chaos.json"))
    options = parser.parse_args(argv)
    document = json.loads(options.json.read_text()) if options.json.exists() else {"seed": options.seed, "runs": []}
    if document["seed"] != options.seed:
        parser.error(f"{options.json} holds runs of seed {document['seed']}; name another file")
    numbers = options.only or range(options.runs)
    document["runs"] = [run for run in document["runs"] if options.only is None or run["number"] not in options.only]
    known = {run["number"] for run in document["runs"]}
    plans = [Plan.draw(options.seed, number) for number in numbers if number not in known]

    def keep(found: Found, log: str) -> None:
        document["runs"].append(found.document())
        document["summary"] = summary(document["runs"])
        aside = options.json.with_suffix(".part")
        aside.write_text(json.dumps(document, indent=1))
        aside.replace(options.json)
        plan = found.plan
        print(f"{plan.number:4} {plan.kind:9} {plan.fault:14} at {found.seen:28} {found.seconds:7.2f} s", end="  ")
        print("; ".join(found.problems) or "ok", flush=True)
        if log:
            options.json.with_suffix(f".{plan.number}.log").write_text(log)

    play(plans, keep, time.monotonic() + options.minutes * 60)
    found = document.get("summary", {})
    print(json.dumps({"seed": options.seed, **found}))
    return 1 if found.get("with_problems") else 0


if __name__ == "__main__":
    sys.exit(main())
