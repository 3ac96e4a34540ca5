"""Errors in a document are described in the sender's terms, not in pydantic's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from post_shared.schemas.distillations import DistillationCreate
from post_shared.schemas.tasks import TaskSpec
from post_shared.schemas.transfers import TransferCreate
from post_shared.schemas.validation import first_error, validation_errors


@pytest.mark.parametrize(
    ("document", "members", "where"),
    [
        (TransferCreate, {"prompt": "p", "target": "t", "dataset": "d", "alpha": 1.5}, "alpha"),
        (DistillationCreate, {"target": "t", "name": "n", "corpus": ["c"], "keep_layers": "many"}, "keep_layers"),
        (TaskSpec, {"template": 3}, "template"),
    ],
)
def test_locations_are_the_senders_and_messages_are_plain(document: Any, members: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as refused:
        document.model_validate(members)
    for location, message in validation_errors(refused.value.errors()):
        assert location == where
        assert "Value error" not in message
    assert "constrained" not in first_error(refused.value.errors())


def test_a_header_is_a_location() -> None:
    assert validation_errors([{"loc": ("header", "idempotency-key"), "msg": "Value error, too long"}]) == [
        ("header.idempotency-key", "too long")
    ]


def test_a_label_with_a_dash_is_a_location() -> None:
    with pytest.raises(ValidationError) as refused:
        TaskSpec(template="{text}", label_words={"so-so (meh)": [3]})  # type: ignore[list-item]
    assert validation_errors(refused.value.errors())[0][0] == "label_words.so-so (meh).0"
