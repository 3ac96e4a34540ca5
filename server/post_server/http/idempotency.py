"""``Idempotency-Key``: a create request that is sent twice is executed once, and both get the same response.

The response is stored in the transaction that creates, so neither ever exists without the other.
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
        description="A new random string; for a day, the same request sent again with it gets the first response.",
    ),
]

Create = Callable[[Session], tuple[int, BaseModel]]
"""Creates in the session and returns the status and the document of the response."""


@dataclass(frozen=True)
class Once:
    """One create request: the app, the caller and its Idempotency-Key."""

    app: Context
    caller: ApiKeyRow
    key: str | None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Refuse the same create request while this process handles it.

        Raises:
            RequestInFlight: this process is handling it.
        """
        if self.key is None:
            yield
            return
        request_key, mine = (self.caller.id, self.key), object()
        if self.app.in_flight.setdefault(request_key, mine) is not mine:
            raise RequestInFlight("A request with this Idempotency-Key is in progress; retry in a moment.")
        try:
            yield
        finally:
            del self.app.in_flight[request_key]

    def run(self, what: str, body: str, create: Create) -> Response:
        """Create, or repeat the first response. ``what`` is the endpoint and its query, ``body`` a hash of the rest.

        Raises:
            IdempotencyMismatch: the key was used for another request.
            RequestInFlight: another process is handling it.
        """
        digest = _digest(what, body)
        try:
            with self.app.database.write() as session:
                if self.key is not None:
                    guard(session)  # wait for the same request in another process
                if (stored := self._stored_response(session, digest)) is not None:
                    return stored
                status, document = create(session)
                if self.key is not None:
                    self._store(session, digest, status, document)
        except IntegrityError as error:  # a concurrent write, where the database allows it
            raise RequestInFlight("The same object is being created right now; retry.") from error
        return _response(status, document.model_dump_json())

    def stored_response(self, what: str, body: str) -> Response | None:
        """The first response, if there was one. For requests that consume their own input, such as an upload.

        Raises:
            IdempotencyMismatch: the key was used for another request.
        """
        with self.app.database.write() as session:
            return self._stored_response(session, _digest(what, body))

    def _stored_response(self, session: Session, digest: str) -> Response | None:
        if self.key is None:
            return None
        session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now() - IdempotencyRow.kept))
        row = session.get(IdempotencyRow, (self.caller.id, self.key))
        if row is None:
            return None
        if row.body_hash != digest:
            raise IdempotencyMismatch("This Idempotency-Key was used for another request; send a new one.")
        return _response(row.status, row.response["json"], replayed=True)

    def _store(self, session: Session, digest: str, status: int, document: BaseModel) -> None:
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
    """The hash of a request document, independent of the order of its members."""
    return hashlib.sha256(document.model_dump_json().encode()).hexdigest()


def _response(status: int, json: str, *, replayed: bool = False) -> Response:
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return Response(json, status_code=status, media_type="application/json", headers=headers)
