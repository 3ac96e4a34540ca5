"""``Idempotency-Key``: a create that is sent twice happens once, and both get the same answer.

The answer is written in the transaction that creates, so there is no moment at which one exists without the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Header, Response
from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, IdempotencyRow, now
from post_server.http.dependencies import Context
from post_shared.errors import IdempotencyMismatch, RequestInFlight

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="A fresh random text; the same create sent again with it is answered, not repeated, for a day.",
    ),
]

Create = Callable[[Session], tuple[int, BaseModel]]
"""Creates in the session and gives the status and the document of the answer."""


@dataclass(frozen=True)
class Once:
    """One create: who asks, under which key, for what."""

    app: Context
    caller: ApiKeyRow
    key: str | None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """While a create is being worked on here, the same one is refused.

        Raises:
            RequestInFlight: this process is working on it.
        """
        if self.key is None:
            yield
            return
        mark, mine = (self.caller.id, self.key), object()
        if self.app.in_flight.setdefault(mark, mine) is not mine:
            raise RequestInFlight("The request with this Idempotency-Key is being worked on; ask again in a moment.")
        try:
            yield
        finally:
            del self.app.in_flight[mark]

    def run(self, what: str, body: str, create: Create) -> Response:
        """Create, or answer as the first time. ``what`` names the endpoint and its query, ``body`` hashes the rest.

        Raises:
            IdempotencyMismatch: the key was used for something else.
            RequestInFlight: another process is working on it.
        """
        digest = _digest(what, body)
        try:
            with self.app.database.write() as session:
                if self.key is not None:
                    guard(session)  # the same create in another process: wait for what it remembers
                if (known := self._known(session, digest)) is not None:
                    return known
                status, document = create(session)
                if self.key is not None:
                    self._remember(session, digest, status, document)
        except IntegrityError as error:  # two at once, on a database that lets two write at once
            raise RequestInFlight("The same thing is being created at this moment; ask again.") from error
        return _answer(status, document.model_dump_json())

    def known(self, what: str, body: str) -> Response | None:
        """The answer of the first time, if there was one: for creates that use up what they are made of.

        Raises:
            IdempotencyMismatch: the key was used for something else.
        """
        with self.app.database.write() as session:
            return self._known(session, _digest(what, body))

    def _known(self, session: Session, digest: str) -> Response | None:
        if self.key is None:
            return None
        session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now() - IdempotencyRow.kept))
        row = session.get(IdempotencyRow, (self.caller.id, self.key))
        if row is None:
            return None
        if row.body_hash != digest:
            raise IdempotencyMismatch("This Idempotency-Key was used for another request; take a fresh one.")
        return _answer(row.status, row.response["json"], replayed=True)

    def _remember(self, session: Session, digest: str, status: int, document: BaseModel) -> None:
        session.add(
            IdempotencyRow(
                key_id=self.caller.id,
                key=self.key,
                body_hash=digest,
                status=status,
                response={"json": document.model_dump_json()},
            )
        )


def _digest(what: str, body: str) -> str:
    return hashlib.sha256(f"{what}\n{body}".encode()).hexdigest()


def document_hash(document: BaseModel) -> str:
    """The hash of a request document, whatever the order of its members was."""
    return hashlib.sha256(document.model_dump_json().encode()).hexdigest()


def _answer(status: int, json: str, *, replayed: bool = False) -> Response:
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return Response(json, status_code=status, media_type="application/json", headers=headers)
