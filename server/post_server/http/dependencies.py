"""What every endpoint may use: the settings, the records, the blobs, and who is calling."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Annotated, cast

import structlog
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool

from post_server.auth.keys import authenticate, check_scope, note_use, use_is_due
from post_server.auth.rate_limits import RateLimits
from post_server.db.database import Database
from post_server.db.tables import ApiKeyRow
from post_server.logs import where
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Forbidden, Unauthenticated
from post_shared.schemas.common import Role
from post_shared.schemas.keys import Scope

log = structlog.get_logger("post.api")

_NOTE_SECONDS = 5.0


@dataclass(frozen=True)
class Context:
    """One server's parts, made once by :func:`post_server.api.app.create_app`."""

    settings: Settings
    database: Database
    store: BlobStore
    limits: RateLimits
    in_flight: dict[tuple[str, str], object] = field(default_factory=dict)
    """(key id, Idempotency-Key) of the creates that this process is working on."""
    looks: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    """The last look at each part, by its name: whether it is ready."""
    noted: dict[str, float] = field(default_factory=dict)
    """When this process last wrote the use of a key down."""

    def writes_use(self, key_id: str) -> bool:
        """Whether this request is to write the key's use down: of many at once one does, so that none waits in line."""
        at = time.monotonic()
        if at - self.noted.get(key_id, -math.inf) < _NOTE_SECONDS:
            return False
        self.noted[key_id] = at
        return True


async def get_context(request: Request) -> Context:
    """The parts of the server that the request came to. Asynchronous, as all that never waits: no thread is needed."""
    return cast(Context, request.app.state.context)


App = Annotated[Context, Depends(get_context)]

_bearer = HTTPBearer(auto_error=False, bearerFormat="post_…", description="An API key: `post key create` makes one.")


async def get_caller(
    request: Request,
    app: App,
    scopes: SecurityScopes,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> ApiKeyRow:
    """The API key that the request carries, with the scopes that the endpoint asks for.

    Raises:
        Unauthenticated: there is none, or none that is valid.
        KeyExpired: its time is over.
        TooManyRequests: it has made too many requests of late.
        Forbidden: it lacks a scope.
    """
    caller = await admit(request, app, credentials)
    if use_is_due(caller) and app.writes_use(caller.id):
        await run_in_threadpool(_note_use, app, caller)
    for scope in scopes.scopes:
        check_scope(caller, Scope(scope))
    return caller


async def admit_first(request: Request) -> None:
    """Before a document is read: it takes time to parse, and strangers get none of it."""
    await admit(request, await get_context(request), await _bearer(request))


async def admit(request: Request, app: Context, credentials: HTTPAuthorizationCredentials | None) -> ApiKeyRow:
    """The key that a request carries, looked up and counted once."""
    if credentials is None:
        raise Unauthenticated("Pass an API key as 'Authorization: Bearer post_…'.")
    if getattr(request.state, "key", None) is None:
        request.state.key = await app.database.look(_admit, request, app, credentials.credentials)
    return cast(ApiKeyRow, request.state.key)


def _admit(request: Request, app: Context, key: str) -> ApiKeyRow:
    with app.database.read() as session:
        caller = authenticate(session, key)
    request.state.caller = caller.id
    app.limits.check(caller.id, caller.requests_per_minute)
    return caller


def _note_use(app: Context, caller: ApiKeyRow) -> None:
    try:
        with app.database.write() as session:
            note_use(session, caller.id)
    except OperationalError as error:  # nobody is refused because a note could not be made
        log.warning("use of a key not noted", error=type(error).__name__, where=where(error))


async def get_provider(caller: Annotated[ApiKeyRow, Depends(get_caller)]) -> ApiKeyRow:
    """A caller that is the provider.

    Raises:
        Forbidden: it is a data owner.
    """
    if caller.role is not Role.PROVIDER:
        raise Forbidden("Only a key of the role 'provider' may do that.")
    return caller


AnyCaller = Annotated[ApiKeyRow, Security(get_caller)]
"""With any scope: what the endpoint calls asks for more."""
Caller = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.READ.value])]
Mover = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.TRANSFER.value])]
Asker = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.PREDICT.value])]
ProviderReader = Annotated[ApiKeyRow, Security(get_provider, scopes=[Scope.READ.value])]
Provider = Annotated[ApiKeyRow, Security(get_provider, scopes=[Scope.PROVIDE.value])]
