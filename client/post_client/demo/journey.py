"""The demo's stages in order, alternating between provider and data owner over HTTP."""

from __future__ import annotations

import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from post_client.client import Client
from post_client.console import interruptible, quiet_libraries
from post_client.demo import texts, tiny
from post_client.demo.display import Display
from post_client.demo.owner import Owner, calibrated, upper_bound
from post_client.demo.provider import DemoProvider
from post_client.demo.results import DemoResults, draw_results, print_results, versions
from post_client.demo.settings import DemoSettings
from post_client.demo.texts import DemoTexts
from post_shared.errors import InvalidInput
from post_shared.schemas.common import Role
from post_shared.schemas.jobs import Job as JobDocument

if TYPE_CHECKING:
    from post_client.demo.owner import Note
    from post_client.resources.jobs import Job
    from post_client.tuning.tune import TuneResult

TARGET, STUDENT, PUBLIC, CORPUS = "smollm2", "smollm2-student", "reviews", "prose"
TINY_TARGET = "tiny"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""A closed terminal or ``kill`` stops the server's process as Ctrl-C does."""
DEFAULT_RESULTS = Path("demo-results") / "results.json"


def run_demo(
    settings: DemoSettings,
    *,
    results_file: Path | None = None,
    picture_file: Path | None = None,
    home: Path | None = None,
    keep: bool = False,
) -> DemoResults:
    """Run all stages and save the results. After a failure, the folder of the run is kept."""
    quiet_libraries()
    console = Console(stderr=True)
    results_file = (results_file or DEFAULT_RESULTS).absolute()
    picture_file = (picture_file or results_file.with_suffix(".png")).absolute()
    folder = _create_folder(home)
    provider = DemoProvider(folder / "provider")
    provider.home.mkdir(parents=True, exist_ok=True)
    console.print(f"The files of this run are in {folder}", highlight=False, markup=False, soft_wrap=True)
    try:
        with interruptible(*STOPS) as stopped, Display(console, stopped) as display:
            results = Journey(settings, folder, provider, display).run()
    except KeyboardInterrupt:
        _clean_up(folder, keep or home is not None, console)
        raise
    except BaseException:
        console.print(f"[bold]The end of the server's log[/] ({provider.log}):\n{escape(provider.last_lines())}")
        console.print(f"The folder of this run is kept: {escape(str(folder))}")
        raise
    results.save(results_file)
    draw_results(results, picture_file)
    print_results(results, Console())
    console.print(f"Saved {results_file} and {picture_file}", highlight=False, markup=False, soft_wrap=True)
    _clean_up(folder, keep or home is not None, console)
    return results


@dataclass
class Journey:
    """One run. The provider's files are in ``provider.home``, the owner's in ``folder/owner``."""

    settings: DemoSettings
    folder: Path
    provider: DemoProvider
    display: Display

    @property
    def target(self) -> str:
        return TINY_TARGET if self.settings.fast else TARGET

    def run(self) -> DemoResults:
        """Run all stages."""
        model, data = self._prepare()
        with self.display.stage("model", "provider", "add the large model, make API keys"):
            self.provider.add_model(model, self.target)
            keys = {role: self.provider.create_key(role) for role in Role}
        with self.provider.serving() as url:
            with Client(url=url, api_key=keys[Role.PROVIDER]) as client:
                self._publish(client, data)
            with Client(url=url, api_key=keys[Role.OWNER]) as client:
                figures = self._run_owner(client, data)
        with self.display.stage("calibrated", "provider", "measure the large model with public text alone"):
            baseline = calibrated(model, data.test, [row.text for row in data.public], self.settings)
        best_accuracy = None
        if self.settings.upper_bound:
            with self.display.stage("upper_bound", "nobody", "tune on the large model: forbidden in reality") as note:
                best_accuracy = upper_bound(model, data.train, data.test, self.settings, note)
        return DemoResults(
            **figures.__dict__,
            calibrated=baseline,
            upper_bound=best_accuracy,
            n_private_test=len(data.test),
            seconds=self.display.seconds,
            versions=versions(),
            seed=self.settings.seed,
        )

    # --- provider -------------------------------------------------------------------------------------

    def _prepare(self) -> tuple[Path, DemoTexts]:
        """Get the large model's file or folder, and all texts."""
        if self.settings.fast:
            with self.display.stage("fetch", "demo", "make a tiny model and synthetic reviews"):
                data = tiny.tiny_texts(self.settings)
                words = [row.text for row in data.train + data.public]
                return tiny.tiny_model(self.folder / "tiny", words, self.settings.seed), data
        from post_client.demo import fetch

        with self.display.stage("fetch", "demo", "download the model and the texts") as note:
            files = fetch.fetch(note)
            data = texts.make_texts(fetch.snippets(files), fetch.news(files), self.settings)
            return fetch.model_file(files), data

    def _publish(self, client: Client, data: DemoTexts) -> None:
        """Upload the public data and distil a student."""
        with self.display.stage("datasets", "provider", "upload the public data") as note:
            rows = texts.write_rows(self.folder / "public.jsonl", data.public)
            prose = texts.write_corpus(self.folder / "corpus.txt", data.corpus)
            client.datasets.create(name=PUBLIC, kind="rows", content=rows)
            client.datasets.create(name=CORPUS, kind="corpus", content=prose)
            note(f"{len(data.public):,} reviews, {len(data.corpus):,} paragraphs")
        with self.display.stage("distil", "provider", "distil the large model into a student") as note:
            job = client.distillations.create(
                target=self.target, name=STUDENT, corpus=[CORPUS], options=self.settings.distillation
            )
            _wait(job, note)

    # --- data owner -----------------------------------------------------------------------------------

    def _run_owner(self, client: Client, data: DemoTexts) -> Figures:
        """Pull, tune, push, transfer, predict, score."""
        stage, s = self.display.stage, self.settings
        with stage("pull", "owner", "pull the student") as note:
            folder = self.folder / "owner" / "student"
            folder.parent.mkdir(exist_ok=True)
            client.models.download(STUDENT, folder, progress=lambda done, total: note(f"{done:,} of {total:,} bytes"))
            owner = Owner.with_student(folder, data, s)
        with stage("tune", "owner", "tune a prompt without differential privacy") as note:
            plain = owner.tune(note)
        with stage("tune_dp", "owner", f"tune a prompt with differential privacy, ε = {s.epsilon:g}") as note:
            private = owner.tune_privately(note)
        with stage("push", "owner", "push both prompts, and nothing else") as note:
            requests = [owner.upload(result) for result in (plain, private)]
            prompts = [client.prompts.upload(request).id for request in requests]
            uploaded = sum(len(request.to_bytes()) for request in requests)
            note(f"{uploaded:,} bytes")
        transferred = [self._transfer(client, prompt, name) for prompt, name in zip(prompts, ("", "_dp"), strict=True)]
        with stage("predict", "owner", "predict with the large model, score locally") as note:
            scored = (None, prompts[0], transferred[0], transferred[1])
            zero, direct_reuse, post, post_dp = [owner.score_target(client, self.target, each, note) for each in scored]
            prompted_student, prompted_student_dp = [owner.score_student(result) for result in (plain, private)]
        epsilon, delta = _claim(private)
        return Figures(
            zero, prompted_student, direct_reuse, post, prompted_student_dp, post_dp, epsilon, delta, uploaded
        )

    def _transfer(self, client: Client, prompt: str, name: str) -> str:
        description = "transfer the private prompt" if name else "transfer the prompt"
        with self.display.stage(f"transfer{name}", "provider", f"{description} with public reviews") as note:
            job = client.transfers.create(
                prompt=prompt, target=self.target, dataset=PUBLIC, options=self.settings.transfer
            )
            return str(_wait(job, note).result["prompt_id"])


@dataclass(frozen=True)
class Figures:
    """What the owner measured."""

    zero_shot: float
    prompted_student: float
    direct_reuse: float
    post: float
    prompted_student_dp: float
    post_dp: float
    epsilon: float
    delta: float
    bytes_uploaded: int


def _claim(private: TuneResult) -> tuple[float, float]:
    claim = private.statement.claim if private.statement else None
    if claim is None:
        raise InvalidInput("the private prompt has no privacy guarantee; nothing was saved")
    return claim


def _wait(job: Job, note: Note) -> Job:
    def on_change(document: JobDocument) -> None:
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in document.metrics.items())
        note(f"{document.progress:4.0%}  {document.stage or document.state}  {metrics}")

    return job.wait(progress=on_change)


# --- the folder of the run ----------------------------------------------------------------------------


def _create_folder(home: Path | None) -> Path:
    if home is None:
        return Path(tempfile.mkdtemp(prefix="post-demo-"))
    home = home.expanduser().absolute()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise InvalidInput(f"{home} isn't empty; give --home a new folder")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


def _clean_up(folder: Path, keep: bool, console: Console) -> None:
    if keep:
        console.print(f"The folder of this run is kept: {escape(str(folder))}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
