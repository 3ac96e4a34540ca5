"""What every endpoint may use: the settings, the records, the blobs, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from post_server.database import Database
from post_server.keys import authenticate
from post_server.records import ApiKeyRow
from post_server.settings import Settings
from post_server.storage import BlobStore
from post_shared.errors import Forbidden, Unauthenticated
from post_shared.schemas import Role


@dataclass(frozen=True)
class Context:
    """One server's parts, made once by :func:`post_server.api.app.create_app`."""

    settings: Settings
    database: Database
    store: BlobStore
    in_flight: dict[tuple[str, str], object] = field(default_factory=dict)
    """(key id, Idempotency-Key) of the creates that this process is working on."""


def get_context(request: Request) -> Context:
    """The parts of the server that the request came to."""
    return cast(Context, request.app.state.context)


App = Annotated[Context, Depends(get_context)]

_bearer = HTTPBearer(auto_error=False, bearerFormat="post_…", description="An API key: `post key create` makes one.")


def get_caller(
    request: Request, app: App, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> ApiKeyRow:
    """The API key that the request carries.

    Raises:
        Unauthenticated: there is none, or none that is valid.
    """
    if credentials is None:
        raise Unauthenticated("Pass an API key as 'Authorization: Bearer post_…'.")
    with app.database.read() as session:
        caller = authenticate(session, credentials.credentials)
    request.state.caller = caller.id
    return caller


Caller = Annotated[ApiKeyRow, Depends(get_caller)]


def get_provider(caller: Caller) -> ApiKeyRow:
    """A caller that is the provider.

    Raises:
        Forbidden: it is a data owner.
    """
    if caller.role is not Role.PROVIDER:
        raise Forbidden("Only a key of the role 'provider' may do that.")
    return caller


Provider = Annotated[ApiKeyRow, Depends(get_provider)]
