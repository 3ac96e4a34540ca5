"""The field's usual terms in the requests of jobs, and in the copies of them that reports keep.

Revision: 0008
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NAMES: dict[str, dict[str, str]] = {
    "distil": {
        "start": "student_init",
        "answer_forms": "templates",
        "minutes": "max_minutes",
        "plateau": "early_stopping",
        "accumulate": "gradient_accumulation_steps",
    },
    "transfer": {"start": "prompt_init"},
}
"""Old name -> new name, by kind of job."""
VALUES = {"student_init": {"fold": "least_squares"}, "prompt_init": {"task": "instruction"}}
TUNING = {
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "length": "num_virtual_tokens",
    "max_length": "max_length",
}
"""A report's tuning options: old name in the request -> new name under ``tuning``."""


def renamed(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the new names."""
    if kind == "report":
        tuning = {new: request[old] for old, new in TUNING.items() if old in request}
        rest = {name: value for name, value in request.items() if name not in TUNING}
        return {**rest, **({"tuning": tuning} if tuning else {})}
    names = NAMES.get(kind, {})
    fields = {names.get(name, name): value for name, value in request.items()}
    return {
        name: VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in fields.items()
    }


def restored(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the old names."""
    if kind == "report":
        tuning = request.get("tuning") or {}
        rest = {name: value for name, value in request.items() if name != "tuning"}
        return {**rest, **{old: tuning[new] for old, new in TUNING.items() if new in tuning}}
    names = {new: old for old, new in NAMES.get(kind, {}).items()}
    old_values = {name: {new: old for old, new in renames.items()} for name, renames in VALUES.items()}
    fields = {
        name: old_values.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in request.items()
    }
    return {names.get(name, name): value for name, value in fields.items()}


def upgrade() -> None:
    """Queued jobs can still run, and finished ones stay readable."""
    _rewrite(renamed)


def downgrade() -> None:
    """Restore the old names."""
    _rewrite(restored)


def _rewrite(change: Any) -> None:
    connection = op.get_bind()
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String),
        sa.column("kind", sa.String),
        sa.column("request", sa.JSON),
        sa.column("result", sa.JSON),
    )
    for row in connection.execute(sa.select(jobs)).all():
        request, result = _plain(row.request), _plain(row.result)
        values: dict[str, Any] = {"request": change(row.kind, request)}
        if row.kind == "report" and isinstance(result, dict) and "request" in result:
            values["result"] = {**result, "request": change(row.kind, result["request"])}
        if values["request"] != request or "result" in values:
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(**values))


def _plain(value: Any) -> Any:
    """Some drivers return JSON as text."""
    return json.loads(value) if isinstance(value, str) else value
