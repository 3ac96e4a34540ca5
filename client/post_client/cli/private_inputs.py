"""What the commands that read private rows share: path checks, public texts and the privacy budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from post_client.console import err, usage_error

if TYPE_CHECKING:
    from post_client.privacy import PrivacyConfig
    from post_shared.data.rows import Row
    from post_shared.data.tasks import Task

DEFAULT_EPSILON = 8.0


def check_outside(student: Path, paths: Sequence[Path | None]) -> None:
    """Refuse ``paths`` inside the student's folder: a hash of that folder is part of the prompt file."""
    for path in paths:
        if path is not None and path.resolve().is_relative_to(student.resolve()):
            usage_error(f"{path} is in the student's folder; a hash of that folder's files leaves with the prompt.")


def public_rows(
    public: Path, columns: dict[str, str | None], labelled_task: Task | None, private: Sequence[Row]
) -> list[Row]:
    """Read public rows, with labels if ``labelled_task`` is given.

    Warns on stderr, and only there, when texts of private rows are among them.

    Raises:
        DataInvalid: the file can't be read, or has too few different texts.
    """
    from post_client.privacy.statement import also_public
    from post_shared.data.rows import read_rows
    from post_shared.method.tuning.label_bias import check_public

    label_column = columns["label_column"] if labelled_task else None
    rows = read_rows(
        public,
        text_column=str(columns["text_column"]),
        label_column=label_column,
        labels=labelled_task.labels if labelled_task else None,
    )
    texts = [row.text for row in rows]
    check_public(texts, str(public))
    shared = also_public(private, texts)
    if shared:
        err.print(
            f"[bold yellow]The texts of {shared} private rows are also in {escape(str(public))}. Public texts are used "
            "without noise, so these rows have no privacy guarantee. Remove them from the public file.[/]"
        )
    return rows


def privacy_config(
    epsilon: float | None, delta: float | None, max_grad_norm: float | None, *, per_user: bool = False
) -> PrivacyConfig:
    """The privacy budget from command-line options; None means the default.

    Raises:
        PrivacyInvalid: a value is out of range.
    """
    from post_client.privacy import PrivacyConfig

    config = PrivacyConfig(
        epsilon=DEFAULT_EPSILON if epsilon is None else epsilon, delta=delta, unit="user" if per_user else "row"
    )
    return config if max_grad_norm is None else replace(config, max_grad_norm=max_grad_norm)
