"""Dependencies of the endpoints: settings, database, blob store and the calling key."""

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
from post_server.logs import error_location
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Forbidden, Unauthenticated
from post_shared.schemas.common import Role
from post_shared.schemas.keys import Scope

log = structlog.get_logger("post.api")

_USE_SECONDS = 5.0


@dataclass(frozen=True)
class Context:
    """The services of one server, created by :func:`post_server.api.app.create_app`."""

    settings: Settings
    database: Database
    store: BlobStore
    limits: RateLimits
    in_flight: dict[tuple[str, str], object] = field(default_factory=dict)
    """(key id, Idempotency-Key) of the create requests that this process is handling."""
    readiness_checks: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    """The last readiness check of each service, by name."""
    use_written: dict[str, float] = field(default_factory=dict)
    """When this process last stored the use of each key."""

    def should_write_use(self, key_id: str) -> bool:
        """Whether this request stores the key's last use. Of concurrent requests only one does, so that none waits."""
        at = time.monotonic()
        if at - self.use_written.get(key_id, -math.inf) < _USE_SECONDS:
            return False
        self.use_written[key_id] = at
        return True


async def get_context(request: Request) -> Context:
    """The services of the app that handles the request. Asynchronous, because it needs no thread."""
    return cast(Context, request.app.state.context)


App = Annotated[Context, Depends(get_context)]

_bearer = HTTPBearer(auto_error=False, bearerFormat="post_…", description="An API key from `post key create`.")


async def get_caller(
    request: Request,
    app: App,
    scopes: SecurityScopes,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> ApiKeyRow:
    """The request's API key, which must have the endpoint's scopes.

    Raises:
        Unauthenticated: there is no key, or it is invalid.
        KeyExpired: it has expired.
        TooManyRequests: it has exceeded its rate limit.
        Forbidden: it lacks a scope.
    """
    caller = await authenticate_once(request, app, credentials)
    if use_is_due(caller) and app.should_write_use(caller.id):
        await run_in_threadpool(_note_use, app, caller)
    for scope in scopes.scopes:
        check_scope(caller, Scope(scope))
    return caller


async def authenticate_first(request: Request) -> None:
    """Authenticate before the body is parsed, so that strangers can't use up processor time."""
    await authenticate_once(request, await get_context(request), await _bearer(request))


async def authenticate_once(
    request: Request, app: Context, credentials: HTTPAuthorizationCredentials | None
) -> ApiKeyRow:
    """The key of a request, looked up and counted once."""
    if credentials is None:
        raise Unauthenticated("Pass an API key as 'Authorization: Bearer post_…'.")
    if getattr(request.state, "key", None) is None:
        request.state.key = await app.database.run_read(_authenticate, request, app, credentials.credentials)
    return cast(ApiKeyRow, request.state.key)


def _authenticate(request: Request, app: Context, key: str) -> ApiKeyRow:
    with app.database.read() as session:
        caller = authenticate(session, key)
    request.state.caller = caller.id
    app.limits.check(caller.id, caller.requests_per_minute)
    return caller


def _note_use(app: Context, caller: ApiKeyRow) -> None:
    try:
        with app.database.write() as session:
            note_use(session, caller.id)
    except OperationalError as error:  # a failure to store it must not refuse the request
        log.warning("use of a key not noted", error=type(error).__name__, where=error_location(error))


async def get_provider(caller: Annotated[ApiKeyRow, Depends(get_caller)]) -> ApiKeyRow:
    """A caller with the provider's role.

    Raises:
        Forbidden: it is a data owner.
    """
    if caller.role is not Role.PROVIDER:
        raise Forbidden("This needs a key with the role 'provider'.")
    return caller


AnyCaller = Annotated[ApiKeyRow, Security(get_caller)]
"""Any scope; the endpoint checks the scope itself."""
Caller = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.READ.value])]
TransferCaller = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.TRANSFER.value])]
PredictCaller = Annotated[ApiKeyRow, Security(get_caller, scopes=[Scope.PREDICT.value])]
ProviderReader = Annotated[ApiKeyRow, Security(get_provider, scopes=[Scope.READ.value])]
Provider = Annotated[ApiKeyRow, Security(get_provider, scopes=[Scope.PROVIDE.value])]
