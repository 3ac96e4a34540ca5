"""``post bench quality``: what a transferred prompt is worth, over pairs of real sets and over seeds.

Provider and owner act in one process, through the same functions as the service and the owner's commands. What
the threat model forbids is only *measured* here: private test rows choose nothing, and no step looks at them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from post_bench.methods import QualityConfig
from post_bench.models import in_type
from post_bench.results import Figure, Key, Results
from post_bench.sets import LabelledSet, check_apart, read_prose, read_set, some_prose, task_of, templates_of
from post_bench.spent import Spent
from post_client.privacy import PrivacyConfig
from post_client.students.checks import load_student
from post_client.tuning.tune import starting_prompt, tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid
from post_shared.inference.evaluation import check_labels, classify, correct_rows
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.teacher_cache import CACHE_BYTES, CacheBudget
from post_shared.method.transfer.baselines import PUBLIC_TEXTS, calibrated_scores, proxy_scores
from post_shared.method.transfer.transfer import transfer
from post_shared.method.tuning.label_bias import check_public
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import fingerprint
from post_shared.training.progress import Progress, ProgressCallback

PROSE = 500_000
"""Letters of prose that a student reads at least; it reads as many as the public sets have, if these have more."""

OTHER = "{} isn't what it was, the student of the figures so far: put that back, or name another file"


class Bench:
    """One run. Models and prompts that were made stay in ``work``, so that a run stopped anywhere goes on.

    ``teacher`` is the target as a worker loads it for distillations and transfers, maybe in another type.
    """

    def __init__(
        self,
        target: LanguageModel,
        data: Path,
        work: Path,
        config: QualityConfig,
        results: Results,
        *,
        public: Sequence[str],
        tasks: Mapping[str, str] | None = None,
        student: LanguageModel | None = None,
        teacher: LanguageModel | None = None,
        on_progress: Callable[[str, Progress], None] = lambda what, progress: None,
    ) -> None:
        self.target, self.data, self.work, self.config, self.results = target, data, work, config, results
        self.public, self.tasks = tuple(sorted(set(public))), tasks or {}
        self.given, self.teacher = student, teacher or target
        self.tell = on_progress
        self._set = lru_cache(maxsize=None)(lambda name: read_set(data, name))
        self._student_of = lru_cache(maxsize=1)(self._make_student)
        self._fast_of = lru_cache(maxsize=1)(self._make_fast)
        self._zero_shot = lru_cache(maxsize=None)(lambda name: self._measure(self.target, name, None))

    def run(self, keys: list[Key], left: Callable[[float | None], None] = lambda seconds: None) -> None:
        """Measure what isn't measured yet. ``left`` is told the seconds left, None while they can't be known."""
        for private, public in dict.fromkeys((private, public) for private, public, _, _ in keys):
            check_labels(self._task(private), self._test(private))  # what is missing is said before hours of work
            check_public(self._set(public).texts, public)
            for other in dict.fromkeys((public, *self._others(private))):
                check_apart(self._set(private), self._set(other))
        missing = self.results.missing(keys)
        while missing:
            left(self.results.seconds_left(missing))
            self.results.add(self.measure(missing[0]))
            missing = missing[1:]

    def measure(self, key: Key) -> Figure:
        """One figure: make the prompt, or take the one made earlier, and score it on the private test set."""
        private, public, method, seed = key
        plain = method.removesuffix("_dp")
        if plain == "zero_shot":
            (right, seconds), settings = self._zero_shot(private), dict[str, Any]()
        elif plain.startswith("calibrated"):
            (right, seconds), settings = self._calibrated(key), {"public_texts": PUBLIC_TEXTS}
        elif plain == "proxy":
            prompt, made, settings = self._prompt_of((private, public, method.replace("proxy", "direct_reuse"), seed))
            right, seconds = self._proxy(private, prompt)
            seconds += made
        else:
            model = self._student(private) if plain == "prompted_student" else self.target
            prompt, made, settings = self._prompt_of(key)
            right, seconds = self._measure(model, private, prompt)
            seconds += made
        epsilon = self.config.epsilon if method.endswith("_dp") else None
        bits, n_test = "".join("1" if hit else "0" for hit in right), len(right)
        accuracy = sum(right) / n_test
        return Figure(private, public, method, seed, accuracy, n_test, round(seconds, 4), epsilon, settings, bits)

    # --- what a method does ---------------------------------------------------------------------------

    def _prompt_of(self, key: Key) -> tuple[Tensor, float, dict[str, Any]]:
        """(prompt, seconds that this method spent on it, its settings)."""
        private, public, method, seed = key
        plain, secret = method.removesuffix("_dp"), method.endswith("_dp")
        if plain == "upper_bound":
            config = self._seeded(self.config.upper, seed)
            return (*self._tuned("target", self.target, private, config, public, secret=secret), config.model_dump())
        config = self._seeded(self.config.private if secret else self.config.plain, seed)
        if plain == "untuned":  # the control: what the transfer brings by itself
            start = starting_prompt(self._student(private), self._task(private), config).embeddings
            moving = self._moving("post", seed)
            return (*self._transferred(start, private, public, moving, secret=False), moving.model_dump())
        student = self._student(private) if secret else self._fast_of(self._others(private))
        prompt, seconds = self._tuned("student", student, private, config, public, secret=secret)
        if plain == "prompted_student":
            return prompt, seconds, config.model_dump()
        if plain == "direct_reuse":
            return prompt, 0.0, config.model_dump()
        moving = self._moving(plain, seed)
        return (*self._transferred(prompt, private, public, moving, secret=secret), moving.model_dump())

    def _tuned(
        self, where: str, model: LanguageModel, private: str, config: TuneOptions, public: str, *, secret: bool
    ) -> tuple[Tensor, float]:
        """An owner's prompt; a private run is helped by the public texts, as ``post tune --public`` does."""
        task, rows = self._task(private), self._set(private).train
        privacy = PrivacyConfig(epsilon=self.config.epsilon) if secret else None
        texts = self._set(public).texts if secret else None
        name = f"tuned-{private}-on-{where}{'-dp' if secret else ''}"

        def make(on_progress: ProgressCallback, checkpoint: Path) -> Tensor:
            result = tune(
                model, task, rows, config, privacy=privacy, public=texts, on_progress=on_progress, checkpoint=checkpoint
            )
            return result.prompt.embeddings

        return self._once(name, fingerprint(config, privacy, model, _plain(task, rows), texts), make)

    def _transferred(
        self, prompt: Tensor, private: str, public: str, config: TransferOptions, *, secret: bool
    ) -> tuple[Tensor, float]:
        task, texts, student = self._task(private), self._set(public).texts, self._student(private)
        name = f"{config.method}-{private}-by-{public}{'-dp' if secret else ''}"

        def make(on_progress: ProgressCallback, checkpoint: Path) -> Tensor:
            moved = transfer(
                self.teacher,
                student,
                task,
                SoftPrompt(prompt),
                texts,
                config,
                on_progress=on_progress,
                checkpoint=checkpoint,
            )
            return moved.prompt.embeddings

        work = fingerprint(config, prompt, self.teacher, student, _plain(task, ()), texts)
        return self._once(name, work, make)

    def _once(self, name: str, work: str, make: Callable[[ProgressCallback, Path], Tensor]) -> tuple[Tensor, float]:
        """(what ``make`` makes, its seconds), from ``work`` if it was made before."""
        path = self.work / f"{name}-{work[:12]}.safetensors"
        if not path.exists():
            spent = Spent(path)
            on_progress = spent.noting(lambda progress: self.tell(name, progress))
            prompt = make(on_progress, path.with_name(f"{path.name}.checkpoint"))
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.part")
            save_file({"prompt": prompt.contiguous()}, aside, {"seconds": repr(spent.over())})
            aside.replace(path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("prompt"), float(file.metadata()["seconds"])

    def _student(self, private: str) -> LanguageModel:
        return self._student_of(self._others(private))

    def _others(self, private: str) -> tuple[str, ...]:
        """The public sets of this run that the provider's student is made with: all but the private one."""
        return tuple(name for name in self.public if name != private)

    def _make_student(self, public: tuple[str, ...]) -> LanguageModel:
        """The student of a provider whose public text is prose and the public sets: no private text is in it."""
        if self.given is not None:
            return self.given
        texts = list(dict.fromkeys(text for name in public for text in self._set(name).texts))
        corpus = some_prose(read_prose(self.data), max(PROSE, sum(map(len, texts)))) + texts
        config = self.config.distil.replace(templates=self._templates(public))
        name = "-".join(("student", *public))
        folder = self.work / f"{name}-{fingerprint(config, self.teacher, corpus)[:12]}"
        known = self.results.students.get(name, {}).get("weights") if self.results.rows else None
        if not (folder / "model.safetensors").exists():
            if known:
                raise DataInvalid(OTHER.format(folder))
            spent, last = Spent(folder), dict[str, float]()

            def on_progress(progress: Progress) -> None:
                last.update(progress.metrics)
                self.tell(name, progress)

            kept, reserved = folder.with_name(f"{folder.name}.checkpoint"), CacheBudget(CACHE_BYTES)
            student = distil(
                self.teacher,
                corpus,
                config,
                on_progress=spent.noting(on_progress),
                checkpoint=kept,
                cache_budget=reserved,
            )
            aside = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            student.save(aside)
            aside.replace(folder)
            self.results.students[name] = {"seconds": spent.over(), **last}
            self.results.save()
        student = load_student(folder, str(self.target.device))
        weights = fingerprint(student)[:16]
        if known not in {None, weights}:
            raise DataInvalid(OTHER.format(folder))
        self.results.students.setdefault(name, {})["weights"] = weights
        self.results.save()
        return student

    def _make_fast(self, public: tuple[str, ...]) -> LanguageModel:
        """The student as :func:`load_student` gives it to an owner who tunes without privacy."""
        student = self._student_of(public)
        return in_type(student, student.training_precision.dtype)

    def _templates(self, public: tuple[str, ...]) -> tuple[str, ...]:
        return templates_of([self._task(name) for name in public]) if self.target.kind == "causal" else ()

    # --- small things ---------------------------------------------------------------------------------

    def _measure(self, model: LanguageModel, private: str, prompt: Tensor | None) -> tuple[list[bool], float]:
        """(which private test rows are answered right, seconds)."""
        task, texts = self._task(private), [row.text for row in self._test(private)]
        return self._timed(private, lambda: classify(model, task, texts, prompt, max_length=self.config.max_length))

    def _calibrated(self, key: Key) -> tuple[list[bool], float]:
        private, public, method, seed = key
        task, texts = self._task(private), [row.text for row in self._test(private)]
        known, limit, ensemble = self._set(public).texts, self.config.max_length, method == "calibrated"
        return self._timed(
            private,
            lambda: calibrated_scores(self.teacher, task, texts, known, ensemble=ensemble, max_length=limit, seed=seed),
        )

    def _proxy(self, private: str, prompt: Tensor) -> tuple[list[bool], float]:
        task, texts, student = self._task(private), [row.text for row in self._test(private)], self._student(private)
        limit = self.config.max_length
        return self._timed(
            private,
            lambda: proxy_scores(self.teacher, student, task, SoftPrompt(prompt), texts, max_length=limit),
        )

    def _timed(self, private: str, scores: Callable[[], Tensor]) -> tuple[list[bool], float]:
        """Scores (N, C) of the private test rows -> (which are right, seconds)."""
        began = time.monotonic()
        self.tell(f"evaluate-{private}", Progress(0, 1, "evaluate"))
        guesses, labels = scores().argmax(-1).tolist(), [row.label for row in self._test(private)]
        return correct_rows(self._task(private), guesses, labels), time.monotonic() - began

    def _test(self, private: str) -> tuple[Row, ...]:
        return self._set(private).test[: self.config.test_rows]

    def _task(self, name: str) -> Task:
        some: LabelledSet = self._set(name)
        return task_of(self.data, some, self.tasks)

    def _seeded(self, config: TuneOptions, seed: int) -> TuneOptions:
        return TuneOptions(**config.model_dump() | {"seed": seed, "max_length": self.config.max_length})

    def _moving(self, method: str, seed: int) -> TransferOptions:
        chosen = self.config.transfer.model_dump() | {"seed": seed, "max_length": self.config.max_length}
        return TransferOptions(**chosen | ({"method": "paper"} if method == "paper" else {}))


def _plain(task: Task, rows: Sequence[Row]) -> list[Any]:
    """A task and rows as :func:`fingerprint` takes them."""
    return [task.spec().model_dump(), task.description, *([row.text, row.label] for row in rows)]
