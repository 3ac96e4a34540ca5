"""Shadow prompts: the prompts that ``tune`` would have made of other choices among the same rows, all tuned at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from post_client.audit.many import MICRO_BATCH, Inserted, ManyAdam, ManyDPSGD, ManyLoss, ManyOptimizer, ManyRows
from post_client.privacy import PoissonSampler, PrivacyConfig, PrivacyPlan
from post_client.student_checks import check_rows_are_apart, check_vocabulary
from post_client.tuning import TuneConfig, check_rows, encode_private, starting_prompt, work_of
from post_shared.batches import EncodedRows, ShuffledBatches
from post_shared.clock import Clock, warm_then_linear
from post_shared.data import Row
from post_shared.errors import InvalidInput
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.prompt_tuning import lean_for
from post_shared.tasks import Task
from post_shared.training import Checkpoint, Progress, Reporter, fingerprint, ignore, run_steps

Members = NDArray[np.bool_]
"""(K, N): whether prompt k was tuned on row i."""


def random_halves(prompts: int, rows: int, seed: int) -> Members:
    """A random half of the rows for each prompt.

    Drawn independently. Were each row given to exactly half of the prompts, then the number of other prompts that
    have it would betray whether this one has.
    """
    generator = np.random.default_rng(seed)
    members = np.zeros((prompts, rows), dtype=bool)
    for own in members:
        own[generator.permutation(rows)[: rows // 2]] = True
    return members


@dataclass(frozen=True)
class Shadows:
    """Prompts (K, l, d), what each was tuned on, and the plan of each run if they were private."""

    prompts: Tensor
    members: Members
    plan: PrivacyPlan | None


def tune_shadows(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    members: Members,
    config: TuneConfig,
    *,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None = None,
    nominal: int | None = None,
    inserted: Inserted | None = None,
    stage: str = "shadows",
    report: Reporter = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Shadows:
    """Tune one prompt on each choice of rows, all at once; prompt k ends as ``tune`` on its rows, seeds + k, would.

    Args:
        nominal: the number of rows that private runs count on, for sampling rate and δ; by default, that of the
            first choice. It is fixed when the choices differ in size, which must not show.
        inserted: gradients put into private steps; see :class:`~post_client.audit.many.Inserted`.
        checkpoint: a folder to go on from. It holds prompts tuned on private rows and stays on this machine.

    Raises:
        InvalidInput: a generation task.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    if task.is_generation:
        raise InvalidInput("an audit scores classes; a generation task has none")
    if config.iterate != "last":
        raise InvalidInput("an audit tunes prompts up to their last iterate; leave iterate at last")
    check_rows(task, rows)
    check_vocabulary(student)
    encoded = encode_private(student, task, rows, config)
    start = starting_prompt(student, task, config).embeddings.to(student.device)
    chosen = [np.flatnonzero(own) for own in members]
    plan: PrivacyPlan | None = None
    optimizer: ManyOptimizer
    if privacy is None:
        optimizer, draw = _plain(start, encoded, chosen, config)
    else:
        check_rows_are_apart(student, start, config.max_length)
        plan, optimizer, draw = _private(start, chosen, config, privacy, nominal or len(chosen[0]), inserted)
    every = ManyRows(encoded, len(chosen))
    own = ([rows[at] for at in some.tolist()] for some in chosen)
    leans = [  # as in ``tune``
        lean_for(student, task, some, public, config, private=privacy is not None, per_row=True) for some in own
    ]
    loss = ManyLoss(student, task, leans)
    steps = config.steps if plan is None else plan.steps

    def update(clock: Clock) -> Mapping[str, float]:
        optimizer.set_learning_rate(config.learning_rate * warm_then_linear(clock.step / steps))
        loss.look(clock.step, optimizer.prompts)
        value = optimizer.update(loss, every, every.batch(draw(clock.step)))
        return {} if value is None else {"loss": value}

    kept = None
    if checkpoint is not None:
        work = work_of(student, task, rows, config, privacy, public)
        work = fingerprint(work, members.tolist(), nominal, inserted is not None)
        kept = Checkpoint(checkpoint, work, checkpoint_seconds)
    run_steps(update, optimizer, steps=steps, stage=stage, report=report, checkpoint=kept)
    if kept is not None:  # the next part of the audit may be killed: this one is done
        kept.try_to_save(steps, 0.0, optimizer.state())
    return Shadows(optimizer.prompts.detach(), members, plan)


Draw = Callable[[int], list[Sequence[int]]]
"""``draw(step)``: the rows of each prompt in that step."""


def _plain(
    start: Tensor, encoded: EncodedRows, chosen: Sequence[NDArray[np.int64]], config: TuneConfig
) -> tuple[ManyOptimizer, Draw]:
    """The batches of plain tuning, seeded with ``config.seed + k``."""
    batches = [
        ShuffledBatches(encoded, config.batch_size, config.seed + k, rows=own.tolist()) for k, own in enumerate(chosen)
    ]

    def draw(step: int) -> list[Sequence[int]]:
        return [some(step).index for some in batches]

    return ManyAdam(start, len(chosen), config.learning_rate), draw


def _private(
    start: Tensor,
    chosen: Sequence[NDArray[np.int64]],
    config: TuneConfig,
    privacy: PrivacyConfig,
    nominal: int,
    inserted: Inserted | None,
) -> tuple[PrivacyPlan, ManyOptimizer, Draw]:
    """Each prompt's own Poisson batches and noise; where ``privacy`` has a seed, that seed + k."""
    seeded = [privacy if privacy.seed is None else replace(privacy, seed=privacy.seed + k) for k in range(len(chosen))]
    plans = [each.plan(nominal, batch_size=config.batch_size, steps=config.steps) for each in seeded]
    samplers = [
        PoissonSampler(max(1, len(own)), plan.rate, plan.randomness) for own, plan in zip(chosen, plans, strict=True)
    ]
    runs = [plan.optimizer(nn.Parameter(start.detach().clone()), config.learning_rate) for plan in plans]

    def draw(step: int) -> list[Sequence[int]]:
        return [own[some.draw(step)].tolist() for own, some in zip(chosen, samplers, strict=True)]

    return plans[0], ManyDPSGD(runs, inserted), draw


@torch.no_grad()
def confidences(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    prompts: Tensor,
    config: TuneConfig,
    *,
    stage: str = "scores",
    report: Reporter = ignore,
) -> NDArray[np.float64]:
    """log(p / (1 - p)) of each row's own label behind each prompt: (K, l, d) -> (K, N).

    Carlini et al. (2022) scale confidences so, since the result is close to a Gaussian.

    Raises:
        Cancelled: raised by ``report``.
    """
    words = label_words(model, task)
    batches = list(encode_private(model, task, rows, config).in_order_of_length(MICRO_BATCH))
    found = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    for done, batch in enumerate(batches, start=1):
        own = torch.nn.functional.one_hot(batch.labels, len(task.labels)).bool()  # (B, C)
        for k, prompt in enumerate(prompts):
            chosen = model.answer_logits_shared(batch, prompt, tokens=words.token_ids)  # (B, K)
            scores = words.scores(chosen).double().cpu()  # (B, C)
            others = scores.masked_fill(own, -torch.inf).logsumexp(1)
            found[k, list(batch.index)] = scores[own] - others
        report(Progress(done, len(batches), stage))
    return found.numpy()
