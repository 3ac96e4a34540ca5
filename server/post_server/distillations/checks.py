"""Validation of a distillation request before its job is queued."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.datasets.service import find_dataset
from post_server.db.tables import ApiKeyRow, JobRow, ModelRow
from post_server.jobs.states import ENDED
from post_server.models.service import find_model
from post_shared.errors import Conflict, InvalidInput
from post_shared.schemas.distillations import DistillationCreate
from post_shared.schemas.jobs import JobKind
from post_shared.schemas.models import ModelRole


def check_distillation(session: Session, caller: ApiKeyRow, request: DistillationCreate) -> None:
    """Check the request against the stored models, datasets and jobs.

    Raises:
        NotFound: no such target model or dataset.
        InvalidInput: layers that the target doesn't have.
        Conflict: a model or an unfinished job has the student's name.
    """
    target = find_model(session, request.target, ModelRole.TARGET)
    for reference in request.corpus:
        find_dataset(session, reference)
    _check_layers(request, target)
    if session.scalar(select(ModelRow.id).where(ModelRow.name == request.name)) is not None:
        raise Conflict(f"A model named {request.name!r} already exists; choose another name.")
    pending = select(JobRow).where(JobRow.kind == JobKind.DISTIL, JobRow.state.not_in(ENDED))
    for job in session.scalars(pending):
        if job.request.get("name") == request.name:
            raise Conflict(f"The job {job.id} is making a student named {request.name!r}.", job=job.id)


def _check_layers(request: DistillationCreate, target: ModelRow) -> None:
    """A student has a proper subset of the target's layers: with all of them it would be the target."""
    layers = request.keep_layers
    count = layers if isinstance(layers, int) else len(layers)
    if not 1 <= count < target.layers:
        raise InvalidInput(
            f"A student can't keep {count} of the {target.layers} layers of {target.name}: give keep_layers "
            f"(--keep-layers) from 1 to {target.layers - 1}."
        )
    if isinstance(layers, int):
        return
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= target.layers:
        raise InvalidInput(f"keep_layers must list each layer once, in ascending order, from 0 to {target.layers - 1}.")
    if request.layer_pattern != "front":
        raise InvalidInput("layer_pattern (--layer-pattern) needs a number of layers, but keep_layers lists them.")
