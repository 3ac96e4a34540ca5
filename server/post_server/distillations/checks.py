"""What a distillation must name and fit before it becomes a queued job."""

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
    target = find_model(session, request.target, ModelRole.TARGET)
    for reference in request.corpus:
        find_dataset(session, reference)
    _check_layers(request, target)
    if session.scalar(select(ModelRow.id).where(ModelRow.name == request.name)) is not None:
        raise Conflict(f"There already is a model named {request.name!r}; choose another name.")
    pending = select(JobRow).where(JobRow.kind == JobKind.DISTIL, JobRow.state.not_in(ENDED))
    for job in session.scalars(pending):
        if job.request.get("name") == request.name:
            raise Conflict(f"The job {job.id} is making a student named {request.name!r}.", job=job.id)


def _check_layers(request: DistillationCreate, target: ModelRow) -> None:
    """A student has some of the target's layers, never all: with all of them it would be the target."""
    kept = request.keep_layers
    count = kept if isinstance(kept, int) else len(kept)
    if not 1 <= count < target.layers:
        raise InvalidInput(
            f"A student can't keep {count} of the {target.layers} layers of {target.name}: give keep_layers "
            f"(--keep-layers) from 1 to {target.layers - 1}."
        )
    if not isinstance(kept, int) and (list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= target.layers):
        raise InvalidInput(f"keep_layers lists each layer once, in request, from 0 to {target.layers - 1}.")
    if not isinstance(kept, int) and request.layer_pattern != "front":
        raise InvalidInput(
            "layer_pattern (--layer-pattern) spreads a number of layers; keep_layers lists them already."
        )
