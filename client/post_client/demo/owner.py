"""The data owner's side of the demo: private rows go in, and only prompts and test texts are sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from post_client.client import Client
from post_client.demo.settings import DemoSettings
from post_client.demo.texts import DemoTexts
from post_client.outbound import OutboundRequest, build_upload
from post_client.students.download import student_hash
from post_client.tuning.export import prompt_file
from post_shared.data.rows import Row
from post_shared.schemas.tasks import TaskSpec

if TYPE_CHECKING:
    from post_client.tuning.tune import TuneResult
    from post_shared.data.tasks import Task
    from post_shared.model.language_model import LanguageModel
    from post_shared.training.progress import Progress

Note = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """The private rows, the student in ``folder``, and the ``public`` texts."""

    task: Task
    train: Sequence[Row]
    test: Sequence[Row]
    public: Sequence[str]
    folder: Path
    student: LanguageModel
    student_hash: str
    settings: DemoSettings

    @classmethod
    def with_student(cls, folder: Path, data: DemoTexts, settings: DemoSettings) -> Owner:
        """Load the student that was pulled into ``folder``."""
        from post_client.students.checks import load_student
        from post_shared.data.tasks import Task

        student = load_student(folder, settings.device)
        public = [row.text for row in data.public]
        task, digest = Task.preset(settings.task), student_hash(folder)
        return cls(task, data.train, data.test, public, folder, student, digest, settings)

    def tune(self, note: Note) -> TuneResult:
        """A prompt without differential privacy."""
        from post_client.students.checks import load_student
        from post_client.tuning.tune import tune

        s, student = self.settings, load_student(self.folder, self.settings.device, private=False)
        return tune(student, self.task, self.train, s.tuning, privacy=None, on_progress=note_progress(note))

    def tune_privately(self, note: Note) -> TuneResult:
        """A prompt with differential privacy."""
        from post_client.privacy import PrivacyConfig
        from post_client.tuning.tune import tune

        s = self.settings
        privacy = PrivacyConfig(epsilon=s.epsilon)
        return tune(
            self.student,
            self.task,
            self.train,
            s.private_tuning,
            privacy=privacy,
            public=self.public,
            on_progress=note_progress(note),
        )

    def upload(self, result: TuneResult) -> OutboundRequest:
        """The whole request that uploads a prompt."""
        return build_upload(prompt_file(result, self.student_hash, self.task))

    def score_student(self, result: TuneResult) -> float:
        """Accuracy of the prompted student, on this machine."""
        return score_here(self.student, self.task, self.test, result, self.settings)

    def score_target(self, client: Client, model: str, prompt: str | None, note: Note) -> float:
        """Accuracy of the target model. The provider predicts; the labels stay on this machine."""
        spec: TaskSpec | None = None if prompt else self.task.spec()
        predictions = client.predictions.create(
            model=model,
            prompt=prompt,
            task=spec,
            texts=[row.text for row in self.test],
            texts_per_request=self.settings.texts_per_request,
            progress=lambda done, count: note(f"{done}/{count}"),
        )
        correct = [prediction.label == row.label for prediction, row in zip(predictions, self.test, strict=True)]
        return sum(correct) / len(correct)


def score_here(
    model: LanguageModel, task: Task, rows: Sequence[Row], result: TuneResult, settings: DemoSettings
) -> float:
    """Accuracy of a model on this machine, with a prompt."""
    from post_shared.inference.evaluation import evaluate

    prompt = result.prompt.embeddings.to(model.device)
    return evaluate(model, task, rows, prompt, max_length=settings.tuning.max_length).accuracy


def calibrated(source: Path, test: Sequence[Row], public: Sequence[str], settings: DemoSettings) -> float:
    """Accuracy of the target model without any private row: what POST has to beat."""
    from post_shared.data.tasks import Task
    from post_shared.inference.evaluation import score
    from post_shared.method.transfer.baselines import calibrated_scores
    from post_shared.model.language_model import LanguageModel

    target, task = LanguageModel.load(source, device=settings.device), Task.preset(settings.task)
    texts, limit = [row.text for row in test], settings.tuning.max_length
    guesses = calibrated_scores(target, task, texts, public, max_length=limit).argmax(-1).tolist()
    return score(task, guesses, [str(row.label) for row in test]).accuracy


def upper_bound(source: Path, train: Sequence[Row], test: Sequence[Row], settings: DemoSettings, note: Note) -> float:
    """Accuracy of a prompt tuned on the target model itself. In reality nobody has both that model and these rows."""
    from post_client.tuning.tune import tune
    from post_shared.data.tasks import Task
    from post_shared.model.language_model import LanguageModel

    s = settings
    target, task = LanguageModel.load(source, device=s.device), Task.preset(s.task)
    result = tune(target, task, train, s.upper, privacy=None, on_progress=note_progress(note))
    return score_here(target, task, test, result, s)


def note_progress(note: Note) -> Callable[[Progress], None]:
    """A progress callback that notes step, loss and spent ε."""

    def on_progress(progress: Progress) -> None:
        parts = [f"{progress.step}/{progress.steps}"]
        parts += [f"{'ε' if name == 'epsilon' else name} {value:.3f}" for name, value in progress.metrics.items()]
        note("  ".join(parts))

    return on_progress
